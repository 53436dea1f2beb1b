"""Publishing: a snapshot of stored blobs becomes a commit that a ref names, in one transaction."""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from sqlalchemy.engine import Connection

from helios.errors import Conflict, HeliosError, IntegrityError, InvalidInput, NotFound
from helios.names import RepoId, check_ref
from heliosfs.store.bulk import check_bulk
from heliosfs.store.keys import commit_key, manifest_key
from heliosfs.store.manifest import CommitRecord, FileEntry, Manifest, check_tree, local_commit
from heliosfs.store.objects import ObjectStore
from registry.admission.admission import Admission, Verdict
from registry.burial import bury, claim_unburied
from registry.contents import Contents
from registry.member import Member
from registry.metadata import claims, content, mirror, quarantine, repositories
from registry.metadata.database import Changes, Database
from registry.metadata.repositories import Expected
from registry.quotas.quotas import Quotas

log = logging.getLogger("helios.registry.publisher")


@dataclass(frozen=True, slots=True)
class Published:
    """The outcome of a publish: the commit's record, and whether the ref moved."""

    record: CommitRecord
    moved: bool


@dataclass(frozen=True, slots=True)
class Claimed:
    """A session that only claims what is being written; see ``Publisher.claiming``."""

    session: str

    def end(self, connection: Connection) -> None:
        """Give the claims back, in the transaction whose rows name the objects.

        Raises Unavailable where others took this process for dead and ended the session: they may have deleted these.
        """
        claims.require(connection, self.session)
        claims.end(connection, [self.session])


class Publisher:
    """Adds commits to one registry."""

    def __init__(
        self,
        database: Database,
        store: ObjectStore,
        domain_of: Callable[[RepoId], str],
        member: Member,
        admission: Admission,
        quotas: Quotas,
        contents: Contents,
        now: Callable[[], float],
    ) -> None:
        self.database, self.store, self._domain_of, self.member = database, store, domain_of, member
        self.admission, self._quotas, self._contents, self._now = admission, quotas, contents, now

    def publish(
        self,
        repo: RepoId,
        ref: str | None,
        files: Mapping[str, FileEntry],
        *,
        commit: str | None = None,
        author: str,
        message: str,
        time: int | None = None,
        lineage: Mapping[str, str] | None = None,
        parent: Expected = ...,
        expect: Expected = ...,
        kind: str = "branch",
        payer: str | None = None,
        also: Callable[[Connection], None] = lambda _connection: None,
    ) -> Published:
        """Make a snapshot of stored blobs visible and point a ref at it (None: at no ref), in one transaction.

        ``commit`` is the Hub's id, or None for a local commit. ``parent`` defaults to where the ref points now;
        ``expect`` is what the ref must point at now (None: nothing; default: anything), else Conflict, as it is for a
        ref that follows an upstream unless the commit is from there. ``kind`` is what a new ref becomes. ``lineage``
        defaults to what the README's card says. A commit that is there already keeps its record. ``payer`` is the
        session that has reserved what this takes (registry/quotas). ``also`` runs last in the transaction, and undoes
        it by raising. Raises InvalidInput for bad paths, NotFound for a blob that is not stored, QuotaExceeded.
        """
        if ref is not None:
            check_ref(ref)
        if not files:
            raise InvalidInput(f"{repo.id}: there is nothing to publish, no file at all")
        check_bulk(files)
        check_tree(files)
        now, domain = int(self._now()), self._domain_of(repo)
        manifest = Manifest(self._canonical(domain, files))
        verdict = self._examine(domain, repo, manifest.files)
        lineage = self._lineage(domain, manifest) if lineage is None else lineage
        commit = commit or local_commit(repo, manifest.digest)
        recipes = {entry.sha256: entry.recipe for entry in manifest.files.values()}
        size = sum(entry.size for entry in manifest.files.values())
        record_key = commit_key(domain, repo, commit)
        with self.claiming({manifest_key(domain, manifest.digest), record_key}) as claimed:
            if self._quotas.concerning(repo) and not self._is_there(repo, commit):
                self._quotas.reserve_commit(claimed.session, payer, repo, size)
            self.store.put_bytes(manifest_key(domain, manifest.digest), manifest.encode())
            with self.database.write(changes=Changes.NAMES) as connection:
                content.publish_blobs(connection, domain, recipes)
                repository = repositories.ensure(connection, repo, domain, now)
                record = self._existing(connection, repository, commit, manifest.digest)
                self._quotas.settle(connection, payer, repo, size if record is None else 0, recipes.keys())
                if record is None:
                    if parent is ...:
                        parent = None if ref is None else repositories.ref_target(connection, repository, ref)
                    when = now if time is None else time
                    record = CommitRecord(
                        str(repo),
                        commit,
                        manifest.digest,
                        author,
                        when,
                        message,
                        None if parent == commit else parent,
                        dict(lineage),
                    )
                    # A record of a removed repository may lie there; SQL says it means nothing.
                    self.store.delete(record_key)
                    self.store.put_bytes(record_key, record.encode())
                repositories.add_commit(connection, repository, record, size, recipes, now)
                held = ((file.path, file.sha256, file.findings) for file in verdict.held)
                quarantine.hold(connection, repository, held, now)
                if verdict.signer is not None:
                    quarantine.sign(connection, repository, commit, verdict.signer, now)
                upstreams = "upstream" in record.lineage
                if ref is not None and not upstreams:
                    mirror.refuse_followed(connection, repo, ref)
                moved = ref is not None and repositories.move_ref(
                    connection, repository, ref, commit, expect=expect, author=author, now=now, kind=kind,
                    tags_move=upstreams,
                )  # fmt: skip
                claimed.end(connection)
                also(connection)
        log.info("published", extra={"repo": str(repo), "ref": ref, "commit": commit, "moved": moved})
        return Published(record, moved)

    @contextlib.contextmanager
    def claiming(self, keys: set[str]) -> Iterator[Claimed]:
        """Objects that are about to be written, claimed. Whoever makes rows of them ends the claim in the same
        transaction; objects that no row names in the end are deleted.
        """
        claimed = Claimed(secrets.token_hex(16))

        def claim(connection: Connection) -> None:
            self.member.begin(connection, claimed.session)
            claims.claim(connection, claimed.session, keys)

        claim_unburied(self.database, keys, claim)
        try:
            yield claimed
        except BaseException:
            try:
                with self.database.write(changes=Changes.NOTHING) as connection:
                    claims.end(connection, [claimed.session])
                bury(self.database, self.store)
            except HeliosError as error:
                log.warning("what was written in vain is left for a while", extra={"error": str(error)})
            raise

    def _lineage(self, domain: str, manifest: Manifest) -> dict[str, str]:
        """Where the content comes from, as far as its own card says."""
        entry = manifest.files.get("README.md")
        if entry is None or not entry.size:
            return {}
        from registry.card import MAX_CARD, lineage, read_card

        with self._contents.open_stored(domain, entry) as content_:
            return lineage(read_card(content_.read(MAX_CARD)))

    def _examine(self, domain: str, repo: RepoId, files: Mapping[str, FileEntry]) -> Verdict:
        """What the rules say of a snapshot of stored blobs, looked at before others are kept waiting."""
        if not self.admission.concerns(repo, files):
            return Verdict()
        return self.admission.examine(repo, files, partial(self._contents.open_stored, domain))

    def _canonical(self, domain: str, files: Mapping[str, FileEntry]) -> dict[str, FileEntry]:
        """The entries with the recipe that the store has for their blobs.

        The same bytes under two names (``a.bin``, ``a.safetensors``) can be cut in two ways; the first recipe stands
        for the blob, and every manifest names that one.
        """
        with self.database.read() as connection:
            known = content.find_blobs(connection, domain, (entry.sha256 for entry in files.values()))
        out = {}
        for path, entry in files.items():
            blob = known.get(entry.sha256)
            if blob is None:
                raise NotFound(f"{path}: the store does not hold blob {entry.sha256}; publish the file again")
            if blob.size != entry.size:
                raise IntegrityError(f"{path}: blob {entry.sha256} has {blob.size} bytes, not {entry.size}")
            out[path] = FileEntry(entry.sha256, entry.size, entry.git_oid, blob.recipe, entry.lfs, entry.executable)
        return out

    def _is_there(self, repo: RepoId, commit: str) -> bool:
        with self.database.read() as connection:
            repository = repositories.find(connection, repo)
            return repository is not None and repositories.find_commit(connection, repository, commit) is not None

    def _existing(
        self, connection: Connection, repository: repositories.Repository, commit: str, manifest: str
    ) -> CommitRecord | None:
        found = repositories.find_commit(connection, repository, commit)
        if found is None:
            return None
        if found.manifest != manifest:
            raise Conflict(
                f"{repository.name}: commit {commit} is here already with other content",
                hint="A commit's content never changes; whoever offers this one is wrong.",
            )
        return CommitRecord.decode(found.record)
