"""The catalog: which repositories there are, what their revisions hold, and where the bytes lie.

Every method blocks (SQL, small reads of the store); routes call them with ``asyncio.to_thread``. A write is on disk
when its method returns, and the hot caches no longer hold what it changed. Records are in the store as objects and in
SQL, objects first: a crash between the two leaves an object that nobody names, never a name without its object.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time as clock
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import EllipsisType
from typing import IO, TYPE_CHECKING
from urllib.parse import quote

from sqlalchemy.engine import Connection

from helios.errors import (
    Conflict,
    EntryNotFound,
    HeliosError,
    IntegrityError,
    InvalidInput,
    NotFound,
    Quarantined,
    RepoNotFound,
    Retired,
    RevisionNotFound,
)
from helios.names import RepoId, check_ref, check_revision
from heliosfs.store.bulk import check_bulk
from heliosfs.store.content import MAX_BLOBS, MAX_BYTES, BlobContent, CommitContent
from heliosfs.store.keys import PUBLIC, commit_key, manifest_key, recipe_key
from heliosfs.store.manifest import CommitRecord, FileEntry, Manifest, check_tree, local_commit
from heliosfs.store.objects import ObjectStore
from heliosfs.store.placement import PlacedBlob, Placement
from heliosfs.store.recipe import Recipe
from registry.admission.admission import Admission, Verdict
from registry.burial import bury
from registry.cache import Cache
from registry.member import Member
from registry.metadata import claims, content, inventory, mirror, notices, pins, quarantine, repositories
from registry.metadata.content import SqlChunkIndex
from registry.metadata.database import Changes, Database

if TYPE_CHECKING:
    from registry.blobs import BlobReader

log = logging.getLogger("helios.registry.catalog")

Expected = str | None | EllipsisType


@dataclass(frozen=True, slots=True)
class RepoInfo:
    """One repository: its refs, the bytes of its distinct blobs, and when a ref last moved (unix seconds)."""

    repo: RepoId
    refs: dict[str, str]
    bytes: int
    updated: int


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a revision names: a commit (40 hex) and its manifest's digest (64 hex)."""

    commit: str
    manifest_digest: str
    notice: str | None = None
    """What whoever uses it should know: it is deprecated."""


@dataclass(frozen=True, slots=True)
class Published:
    """The outcome of a publish: the commit's record, and whether the ref moved."""

    record: CommitRecord
    moved: bool


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes: every commit as a full copy; distinct blobs; what the store keeps for them."""

    logical: int
    unique: int
    stored: int


@dataclass(frozen=True, slots=True)
class Claimed:
    """A session that only claims what is being written; see ``Catalog.claiming``."""

    session: str

    def end(self, connection: Connection) -> None:
        """Give the claims back, in the transaction whose rows name the objects."""
        claims.end(connection, [self.session])


class Catalog:
    """Reads and writes of one registry's metadata."""

    def __init__(
        self,
        database: Database,
        store: ObjectStore,
        *,
        domain: str = PUBLIC,
        lease_s: float = 300.0,
        admission: Admission | None = None,
        member: Member | None = None,
        now: Callable[[], float] = clock.time,
    ) -> None:
        self.database, self.store, self.domain, self.lease_s = database, store, domain, lease_s
        self.index = SqlChunkIndex(database)
        self.member = member or Member(database)
        self.admission = admission or Admission()
        self._now = now
        self._listeners: list[Callable[[], None]] = []
        self._confirming = threading.Lock()
        self._generations: dict[str, int] = {}
        self._resolved: Cache[tuple[str, str], Resolved] = Cache(4096)
        self._held: Cache[tuple[str, str], content.KnownBlob] = Cache(4096)
        self._manifests: Cache[str, tuple[bytes, Manifest]] = Cache(128)
        self._placements: Cache[str, PlacedBlob] = Cache(256)
        database.watch(self.forget)

    def check(self) -> None:
        """Raises Unavailable, or another error, unless the metadata answers and the store is there."""
        self.count()
        self.store.check()

    def count(self) -> int:
        """How many repositories there are."""
        with self.database.read() as connection:
            return repositories.count(connection)

    # --- names ---

    def repos(self, kind: str | None = None) -> list[RepoInfo]:
        """All repositories, sorted by their canonical text."""
        with self.database.read() as connection:
            found = repositories.listing(connection, kind)
            sizes = repositories.sizes(connection)
        return [RepoInfo(RepoId.from_canonical(r.name), refs, sizes.get(r.id, 0), r.updated) for r, refs in found]

    def refs(self, repo: RepoId) -> dict[str, str]:
        """Ref name -> commit, sorted. Raises RepoNotFound."""
        with self.database.read() as connection:
            return repositories.refs_of(connection, repositories.require(connection, repo))

    def ref_kinds(self, repo: RepoId) -> dict[str, str]:
        """Which refs are tags or aliases; the others are branches. Raises RepoNotFound."""
        with self.database.read() as connection:
            return repositories.kinds_of(connection, repositories.require(connection, repo))

    def ref_history(self, repo: RepoId, ref: str | None, limit: int) -> list[repositories.Move]:
        """Who moved which ref when, newest first; also of refs and repositories that are gone."""
        with self.database.read() as connection:
            return repositories.moves_of(connection, repo, ref, limit)

    def resolve(self, repo: RepoId, rev: str) -> Resolved:
        """The commit that a ref or a commit id names. Raises RepoNotFound or RevisionNotFound."""
        return self._resolved.get((str(repo), check_revision(rev)), lambda: self._resolve(repo, rev))

    def _resolve(self, repo: RepoId, rev: str) -> Resolved:
        with self.database.read(single=True) as connection:
            found = repositories.resolve(connection, repo, rev)
        if found is not None:
            commit, manifest, noticed = found
            return self._noticed(repo, commit, manifest) if noticed else Resolved(commit, manifest)
        with self.database.read() as connection:  # what is missing?
            repository = repositories.require(connection, repo)
            known = ", ".join(list(repositories.refs_of(connection, repository))[:20])
            raise RevisionNotFound(f"{repo.id} has no revision {rev!r}; its refs: {known or 'none'}")

    def _noticed(self, repo: RepoId, commit: str, manifest: str) -> Resolved:
        with self.database.read() as connection:
            told = notices.of(connection, repositories.require(connection, repo), commit)
        texts = [each.text(f"{repo.id}{'@' + each.commit if each.commit else ''}") for each in told]
        for each, text in zip(told, texts, strict=True):
            if each.state == "retired":
                raise Retired(text)
        return Resolved(commit, manifest, "; ".join(texts) or None)

    def notice_now(self, repo: RepoId, rev: str | None) -> str | None:
        """The notice on a revision that was resolved a moment ago, for clients (``topic; message``). Never waits."""
        resolved = self._resolved.peek((str(repo), rev or "main"))
        return None if resolved is None or resolved.notice is None else f"deprecated; {resolved.notice}"

    def holds(self, repo: RepoId, commit: str) -> bool:
        """Whether the commit is here."""
        try:
            self.resolve(repo, commit)
        except (RepoNotFound, RevisionNotFound):
            return False
        return True

    def notices_on(self, repo: RepoId) -> list[notices.Notice]:
        """What is deprecated or retired of a repository."""
        with self.database.read() as connection:
            return notices.of(connection, repositories.require(connection, repo))

    def put_notice(self, repo: RepoId, notice: notices.Notice) -> None:
        """Deprecate or retire a repository or a commit; ``notice.time`` is set here."""
        with self.database.write(changes=Changes.NAMES) as connection:
            repository = repositories.require(connection, repo)
            if notice.commit:
                repositories.require_commit(connection, repository, notice.commit)
            notices.put(connection, repository, replace(notice, time=int(self._now())))
        log.warning("put a notice up", extra={"repo": str(repo), "commit": notice.commit, "state": notice.state})

    def remove_notice(self, repo: RepoId, commit: str) -> None:
        """Take a notice down. Raises NotFound where there is none."""
        with self.database.write(changes=Changes.NAMES) as connection:
            notices.take_down(connection, repositories.require(connection, repo), commit)

    def hot(self, repo: RepoId, rev: str, path: str) -> tuple[Resolved, Manifest, FileEntry] | None:
        """A file of a revision that may be read, if all of it is in memory. Does not block: for the event loop."""
        resolved = self._resolved.peek((str(repo), rev))
        found = None if resolved is None else self._manifests.peek(resolved.manifest_digest)
        entry = None if found is None else found[1].files.get(path)
        if resolved is None or found is None or entry is None or not self._held.peek((str(repo), entry.sha256)):
            return None
        return resolved, found[1], entry

    def knows(self, repo: RepoId, rev: str) -> bool:
        """Whether it is in memory what the revision names. Does not block."""
        return self._resolved.peek((str(repo), rev)) is not None

    def commit_record(self, repo: RepoId, commit: str) -> CommitRecord:
        """Who published a commit, and when."""
        with self.database.read() as connection:
            repository = repositories.require(connection, repo)
            return CommitRecord.decode(repositories.require_commit(connection, repository, commit).record)

    def history(self, repo: RepoId, rev: str, limit: int = 50) -> list[CommitRecord]:
        """At most ``limit`` commit records from a revision back along the parents, newest first."""
        commit: str | None = self.resolve(repo, rev).commit
        out: list[CommitRecord] = []
        with self.database.read() as connection:
            repository = repositories.require(connection, repo)
            while commit is not None and len(out) < limit:
                found = repositories.find_commit(connection, repository, commit)
                if found is None:
                    break  # a parent that the Hub knows and this registry does not
                out.append(CommitRecord.decode(found.record))
                commit = found.parent
        return out

    # --- content ---

    def manifest(self, repo: RepoId, commit: str) -> Manifest:
        """What a commit holds. Raises RepoNotFound, RevisionNotFound, IntegrityError."""
        return self._manifest(repo, commit)[1]

    def manifest_bytes(self, repo: RepoId, commit: str) -> bytes:
        """The manifest's record."""
        return self._manifest(repo, commit)[0]

    def _manifest(self, repo: RepoId, commit: str) -> tuple[bytes, Manifest]:
        digest = self.resolve(repo, commit).manifest_digest
        return self._manifests.get(digest, lambda: self._load_manifest(digest))

    def manifest_of(self, digest: str) -> Manifest:
        """A manifest by its digest, whoever's it is, for work of the registry's own. Not kept in memory."""
        return self._load_manifest(digest)[1]

    def _load_manifest(self, digest: str) -> tuple[bytes, Manifest]:
        data = self._read_object(manifest_key(self.domain, digest))
        return data, Manifest.decode(data, digest)

    def recipe_bytes(self, repo: RepoId, blob: str) -> bytes:
        """The recipe record of a blob that the repository holds."""
        return self._recipe(self.held(repo, blob).recipe)

    def recipe(self, digest: str) -> Recipe:
        """A recipe by its digest, whoever's it is, for work of the registry's own."""
        return Recipe.decode(self._recipe(digest), digest)

    def _recipe(self, digest: str) -> bytes:
        data = self._read_object(recipe_key(self.domain, digest))
        Recipe.decode(data, digest)
        return data

    def placement(self, repo: RepoId, blob: str) -> Placement:
        """Where the chunks of a blob lie that the repository holds."""
        return self.placed(repo, blob).placement

    def placed(self, repo: RepoId, blob: str) -> PlacedBlob:
        """Recipe and placement, checked against each other, of a blob that the repository holds."""
        known = self.held(repo, blob)
        return self._placements.get(known.sha256, lambda: self._place(known))

    def placed_blob(self, sha256: str) -> PlacedBlob | None:
        """Like ``placed``, of any blob that is stored, whoever holds it: for what a mirrored commit lists."""
        with self.database.read() as connection:
            known = content.find_blob(connection, self.domain, sha256)
        return None if known is None else self._placements.get(known.sha256, lambda: self._place(known))

    def _place(self, known: content.KnownBlob) -> PlacedBlob:
        recipe = Recipe.decode(self._recipe(known.recipe), known.recipe)
        ids = [digest for digest, _ in recipe.chunks()]
        with self.database.read() as connection:
            located = content.locate(connection, self.domain, ids)
            sizes = content.object_sizes(connection, {place.object_key for place in located.values()})
        for index, digest in enumerate(ids):
            if digest not in located:
                raise IntegrityError(f"chunk {index} ({digest.hex()}) of blob {known.sha256} is not in the index")

        def describe(key: str) -> tuple[str, int]:
            return f"/api/v1/objects/{quote(key)}", sizes[key]

        places = (located[digest] for digest in ids)
        return PlacedBlob(recipe, Placement.build(recipe, places, known.version, self.lease_s, describe))

    def commit_content(self, repo: RepoId, commit: str) -> CommitContent:
        """Recipes and placements of a commit's blobs, the largest first, as many as an answer holds.

        One that is damaged is left out: who asks for it alone is told what is wrong. Raises RepoNotFound,
        RevisionNotFound, IntegrityError.
        """
        files = {entry.sha256: entry for entry in self.manifest(repo, commit).files.values() if entry.size}
        blobs: list[BlobContent] = []
        total = 0
        for entry in sorted(files.values(), key=lambda entry: (-entry.size, entry.sha256))[:MAX_BLOBS]:
            try:
                placed = self.placed(repo, entry.sha256)
            except (NotFound, Quarantined, IntegrityError) as error:
                log.info("a blob's content can't be told ahead", extra={"blob": entry.sha256, "reason": str(error)})
                continue
            blobs.append(BlobContent(placed.recipe.encode(), placed.placement))
            total += len(blobs[-1].recipe)
            if total >= MAX_BYTES:
                break
        return CommitContent(blobs)

    def blob_reader(self, repo: RepoId, blob: str) -> BlobReader:
        """A reader of the whole blob or of ranges of it."""
        from registry.blobs import BlobReader

        placed = self.placed(repo, blob)
        return BlobReader(self.store, placed.recipe, placed.placement)

    def stored_blob(self, sha256: str) -> BlobReader:
        """A reader of a stored blob, whoever holds it, for work of the registry's own. Raises NotFound."""
        from registry.blobs import BlobReader

        with self.database.read() as connection:
            known = content.find_blob(connection, self.domain, sha256)
        if known is None:
            raise NotFound(f"the store does not hold blob {sha256}")
        placed = self._place(known)
        return BlobReader(self.store, placed.recipe, placed.placement)

    def has_blob(self, sha256: str) -> FileEntry | None:
        """The line for a manifest of a blob whose every byte is stored, or None.

        ``git_oid`` and ``lfs`` are those of its first publisher; another repository may show the blob differently.
        """
        with self.database.read() as connection:
            known = content.find_blob(connection, self.domain, sha256)
        return None if known is None else known.entry()

    def held(self, repo: RepoId, blob: str) -> content.KnownBlob:
        """The blob, if one of the repository's commits holds it; else EntryNotFound. Raises Quarantined."""
        return self._held.get((str(repo), blob), lambda: self._find_held(repo, blob))

    def _find_held(self, repo: RepoId, blob: str) -> content.KnownBlob:
        with self.database.read() as connection:
            repository = repositories.require(connection, repo)
            known = content.find_blob(connection, repository.domain, blob)
            if known is None or not repositories.holds_blob(connection, repository, blob):
                raise EntryNotFound(f"{repo.id} holds no blob {blob}")
            findings = quarantine.is_held(connection, repository, blob)
        if findings is not None and not self.admission.may_be_read(repo):
            raise Quarantined(
                f"{repo.id}: blob {blob} is kept back: {findings}",
                hint=f"Look at it, then let it go with: helios quarantine release {repo.id} {blob}",
            )
        return known

    def holders(self, sha256: str) -> list[RepoId]:
        """The repositories that have a commit with the blob."""
        with self.database.read() as connection:
            return repositories.holders(connection, self.domain, sha256)

    def usage(self, repo: RepoId | None = None) -> Usage:
        """Bytes used by a repository, or by all. Chunks that repositories share count for each of them."""
        with self.database.read() as connection:
            repository = None if repo is None else repositories.require(connection, repo)
            logical = repositories.logical_bytes(connection, repository)
            digests = repositories.blobs_of(connection, repository)
            known = content.find_blobs(connection, self.domain, digests)
            unique = sum(blob.size for blob in known.values())
            if repository is None:
                return Usage(logical, unique, content.stored_bytes(connection))
        stored: dict[bytes, int] = {}
        for blob in known.values():
            stored.update(Recipe.decode(self._recipe(blob.recipe), blob.recipe).chunks())
        return Usage(logical, unique, sum(stored.values()))

    def shares(self) -> tuple[list[inventory.Share], float]:
        """Every repository's bytes, and the stored bytes that none holds: of pushes under way, and garbage."""
        with self.database.read() as connection:
            return inventory.shares(connection, self.domain)

    # --- writes ---

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
        also: Callable[[Connection], None] = lambda _connection: None,
    ) -> Published:
        """Make a snapshot of stored blobs visible and point a ref at it (None: at no ref), in one transaction.

        ``commit`` is the Hub's id, or None for a local commit. ``parent`` defaults to where the ref points now;
        ``expect`` is what the ref must point at now (None: nothing; default: anything), else Conflict. ``lineage``
        defaults to what the README's card says. A commit that is there already keeps its record. ``also`` runs last in
        the transaction, and undoes it by raising. Raises InvalidInput for bad paths, NotFound for a blob that is not
        stored.
        """
        if ref is not None:
            check_ref(ref)
        if not files:
            raise InvalidInput(f"{repo.id}: there is nothing to publish, no file at all")
        check_bulk(files)
        check_tree(files)
        now = int(self._now())
        manifest = Manifest(self._canonical(files))
        verdict = self._examine(repo, manifest.files)
        lineage = self._lineage(manifest) if lineage is None else lineage
        commit = commit or local_commit(repo, manifest.digest)
        recipes = {entry.sha256: entry.recipe for entry in manifest.files.values()}
        size = sum(entry.size for entry in manifest.files.values())
        record_key = commit_key(self.domain, repo, commit)
        with self.claiming({manifest_key(self.domain, manifest.digest), record_key}) as claimed:
            self.store.put_bytes(manifest_key(self.domain, manifest.digest), manifest.encode())
            with self.database.write(changes=Changes.NAMES) as connection:
                content.publish_blobs(connection, self.domain, recipes)
                repository = repositories.ensure(connection, repo, self.domain, now)
                record = self._existing(connection, repository, commit, manifest.digest)
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
                moved = ref is not None and repositories.move_ref(
                    connection, repository, ref, commit, expect=expect, author=author, now=now
                )
                if ref is not None and "upstream" not in record.lineage:
                    mirror.forget(connection, repo, ref)  # somebody's own now
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
        with self.database.write(lazy=True, changes=Changes.NOTHING) as connection:
            self.member.begin(connection, claimed.session)
            claims.claim(connection, claimed.session, keys)
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

    def set_ref(
        self, repo: RepoId, ref: str, commit: str, expect: Expected = ..., *, author: str = "", kind: str = "branch"
    ) -> bool:
        """Point a ref at a commit of the repository by compare-and-swap; returns whether it moved. See ``move_ref``."""
        check_ref(ref)
        with self.database.write(changes=Changes.NAMES) as connection:
            repository = repositories.require(connection, repo)
            repositories.require_commit(connection, repository, commit)
            now = int(self._now())
            return repositories.move_ref(
                connection, repository, ref, commit, expect=expect, author=author, now=now, kind=kind
            )

    def delete_ref(self, repo: RepoId, ref: str, expect: Expected = ..., *, author: str = "") -> None:
        """Remove a ref. Its commits stay, and can be asked for by their id."""
        check_ref(ref)
        with self.database.write(changes=Changes.NAMES) as connection:
            repository = repositories.require(connection, repo)
            now = int(self._now())
            repositories.move_ref(connection, repository, ref, None, expect=expect, author=author, now=now)
            mirror.forget(connection, repo, ref)

    def delete_repo(self, repo: RepoId, *, author: str = "") -> None:
        """Remove a repository with its refs and commits. Its content stays in the store until it is collected."""
        with self.database.write() as connection:
            followed = mirror.restricted(connection, repo) is not None
            mirror.forget(connection, repo)
            if not followed or repositories.find(connection, repo) is not None:
                repository = repositories.require(connection, repo)
                records: set[str] = set()
                for commit, manifest in repositories.commits_of(connection, repository):
                    records |= {commit_key(self.domain, repo, commit), manifest_key(self.domain, manifest)}
                # Answers that are under way may read them yet.
                claims.doom(connection, records, pins.clock(connection, self.database.kind.now) + self.lease_s)
                repositories.delete(connection, repository, author=author, now=int(self._now()))
        log.info("removed", extra={"repo": str(repo)})

    def _lineage(self, manifest: Manifest) -> dict[str, str]:
        """Where the content comes from, as far as its own card says."""
        entry = manifest.files.get("README.md")
        if entry is None or not entry.size:
            return {}
        from registry.card import MAX_CARD, lineage, read_card

        with self.open_stored(entry) as content_:
            return lineage(read_card(content_.read(MAX_CARD)))

    def _examine(self, repo: RepoId, files: Mapping[str, FileEntry]) -> Verdict:
        """What the rules say of a snapshot of stored blobs, looked at before others are kept waiting."""
        if not self.admission.concerns(repo, files):
            return Verdict()
        return self.admission.examine(repo, files, self.open_stored)

    def open_stored(self, entry: FileEntry) -> IO[bytes]:
        """A stored blob as a file, be it held by a commit or not; its bytes are checked as they are read."""
        from registry.blobs import as_file

        return as_file(self.stored_reader(entry))

    def stored_reader(self, entry: FileEntry) -> BlobReader:
        """A reader of a stored blob that no commit may hold yet."""
        from registry.blobs import BlobReader

        with self.database.read() as connection:
            known = content.find_blob(connection, self.domain, entry.sha256)
        if known is None:
            raise NotFound(f"the store does not hold blob {entry.sha256}; publish the file again")
        placed = self._place(known)
        return BlobReader(self.store, placed.recipe, placed.placement)

    # --- quarantine ---

    def kept(self, repo: RepoId | None = None, *, released: bool = False) -> list[quarantine.Kept]:
        """Files that are kept back, in a repository or in all; with ``released`` also those that were let go."""
        with self.database.read() as connection:
            repository = None if repo is None else repositories.require(connection, repo)
            return quarantine.listing(connection, repository, released=released)

    def release(self, repo: RepoId, sha256: str, by: str) -> None:
        """Let a file go that is kept back. Raises RepoNotFound or NotFound."""
        with self.database.write() as connection:
            repository = repositories.require(connection, repo)
            quarantine.release(connection, repository, sha256, by, int(self._now()))
        self.forget()
        log.warning("released from quarantine", extra={"repo": str(repo), "blob": sha256, "by": by})

    def signer(self, repo: RepoId, commit: str) -> str | None:
        """Who signed a commit; None where nobody did, or it was not asked for."""
        with self.database.read() as connection:
            return quarantine.signer(connection, repositories.require(connection, repo), commit)

    def _canonical(self, files: Mapping[str, FileEntry]) -> dict[str, FileEntry]:
        """The entries with the recipe that the store has for their blobs.

        The same bytes under two names (``a.bin``, ``a.safetensors``) can be cut in two ways; the first recipe stands
        for the blob, and every manifest names that one.
        """
        with self.database.read() as connection:
            known = content.find_blobs(connection, self.domain, (entry.sha256 for entry in files.values()))
        out = {}
        for path, entry in files.items():
            blob = known.get(entry.sha256)
            if blob is None:
                raise NotFound(f"{path}: the store does not hold blob {entry.sha256}; publish the file again")
            if blob.size != entry.size:
                raise IntegrityError(f"{path}: blob {entry.sha256} has {blob.size} bytes, not {entry.size}")
            out[path] = FileEntry(entry.sha256, entry.size, entry.git_oid, blob.recipe, entry.lfs, entry.executable)
        return out

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

    def _read_object(self, key: str) -> bytes:
        buffer = bytearray(self.store.info(key).size)
        self.store.read_into(key, 0, memoryview(buffer))
        return bytes(buffer)

    def forget(self, changes: Changes = Changes.ALL) -> None:
        """Drop what is in memory and may have changed. Called for every write before it is acknowledged."""
        self._resolved.clear()
        self._held.clear()
        if changes is Changes.ALL:
            self._placements.clear()
        for listener in self._listeners:
            listener()

    def listen(self, forget: Callable[[], None]) -> None:
        """Call ``forget`` whenever something in memory may have changed."""
        self._listeners.append(forget)

    def confirm(self) -> None:
        """Make sure that what is in memory is as new as the last write that was acknowledged, by any process."""
        if not self.database.kind.shared:
            return  # every write was ours, and ``forget`` has seen it
        found = self.database.generations()
        with self._confirming:
            # Answers may come in another order than questions were asked: an older one says nothing new.
            newer = {name for name, value in found.items() if value > self._generations.get(name, -1)}
            for name in newer:
                self._generations[name] = found[name]
            if newer:
                self.forget(Changes.ALL if "content" in newer else Changes.NAMES)
