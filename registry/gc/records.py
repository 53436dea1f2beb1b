"""Getting damaged records back: manifests, recipes, commit records.

What a source gives is believed only if it has the digest that the record is named by; a commit record is what SQL has.
It is written where the damaged one lies, because that is its name.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from helios.errors import HeliosError, NotFound
from helios.names import RepoId
from heliosfs.store.keys import blob_key, domain_of
from heliosfs.store.manifest import FileEntry, Manifest
from heliosfs.store.recipe import Recipe
from registry.catalog import Catalog
from registry.metadata import claims, content, inventory, mirror, moving, repositories
from registry.metadata.database import Changes
from registry.metadata.repositories import Repository
from registry.pull.listing import Snapshot, choose, decode_listing
from registry.pull.upstream import Upstream
from registry.transfer.peer import Peer


@dataclass(frozen=True, slots=True)
class Record:
    """A record that is damaged or missing: ``kind`` as in its key, ``name`` its digest or commit; ``repo`` that it is
    a commit of, ``blobs`` whose recipe it is."""

    key: str
    kind: str
    name: str
    repo: str = ""
    blobs: tuple[str, ...] = ()

    @property
    def domain(self) -> str:
        return domain_of(self.key)


Try = tuple[str, Callable[[], bytes]]
"""Where bytes may come from (a field of ``Repairs``), and how; raises HeliosError where they don't."""


class RecordSources:
    """Where records may be found besides. ``upstream``: None where it must not be asked."""

    def __init__(
        self, catalog: Catalog, peers: Sequence[Peer], upstream: Upstream | None, stop: threading.Event
    ) -> None:
        self._catalog, self._peers, self._upstream, self._stop = catalog, peers, upstream, stop
        self._of = {"commits": self._commit, "manifests": self._manifest, "recipes": self._recipe}

    def heal(self, record: Record) -> bool:
        """Whether the store has a right copy of a record that is named by its digest, and sees to the others itself."""
        if record.kind == "commits":
            return False
        store = self._catalog.store.lasting
        try:
            size = store.info(record.key).size
        except NotFound:
            return False
        return store.heal(record.key, 0, size, lambda data: hashlib.sha256(data).hexdigest() == record.name)

    def find(self, record: Record) -> tuple[str, bytes]:
        """The record's bytes and the source that had them. Raises NotFound saying what each source did."""
        problems = []
        for source, fetch in self._of.get(record.kind, self._nowhere)(record):
            try:
                data = fetch()
            except HeliosError as error:
                problems.append(error.message)
                continue
            if record.kind == "commits" or hashlib.sha256(data).hexdigest() == record.name:
                return source, data
            problems.append(f"{source}: another record")
        raise NotFound("; ".join(problems) or "no source has it")

    def put(self, record: Record, data: bytes) -> None:
        """Write a record in the place of the damaged one. Raises NotFound when nothing names it any more."""
        catalog = self._catalog
        with catalog.publisher.claiming({record.key}) as claimed:
            with catalog.database.read() as connection:
                if not claims.named(connection, [record.key]):
                    raise NotFound("nothing needs it any more")
            catalog.store.delete(record.key)
            catalog.store.put_bytes(record.key, data)
            with catalog.database.write(changes=Changes.NOTHING) as connection:
                claimed.end(connection)

    def _nowhere(self, _record: Record) -> Iterator[Try]:
        return iter(())

    # --- commits ---

    def _commit(self, record: Record) -> Iterator[Try]:
        def in_sql() -> bytes:
            with self._catalog.database.read() as connection:
                repository = repositories.require(connection, RepoId.from_canonical(record.repo))
                return repositories.require_commit(connection, repository, record.name).record

        yield "metadata", in_sql

    # --- manifests ---

    def _manifest(self, record: Record) -> Iterator[Try]:
        with self._catalog.database.read() as connection:
            held = inventory.commits_with(connection, record.domain, record.name)
        for repository, commit in held:
            repo = RepoId.from_canonical(repository.name)
            yield "metadata", lambda at=repository, repo=repo, commit=commit: self._listed(at, repo, commit)  # type: ignore[misc]
        for peer in self._peers:
            for repository, commit in held:
                repo = RepoId.from_canonical(repository.name)
                yield (
                    "peers",
                    lambda peer=peer, repo=repo, commit=commit: peer.manifest_of(  # type: ignore[misc]
                        repo, commit, record.name
                    ).encode(),
                )
        if self._upstream is not None:
            for repository, commit in held:
                yield "upstream", lambda at=repository, commit=commit: self._at_upstream(at, commit)  # type: ignore[misc]

    def _listed(self, repository: Repository, repo: RepoId, commit: str) -> bytes:
        """From what the upstream listed when the commit was learnt."""
        with self._catalog.database.read() as connection:
            found = mirror.find_snapshot(connection, repo, commit)
        if found is None:
            raise NotFound(f"the metadata has no listing of {repository.name}@{commit}")
        return self._composed(repository, decode_listing(found[0]))

    def _at_upstream(self, repository: Repository, commit: str) -> bytes:
        assert self._upstream is not None
        repo = RepoId.from_canonical(repository.name)
        record = self._catalog.commit_record(repo, commit)
        if "upstream" not in record.lineage:
            raise NotFound(f"{repository.name}@{commit} did not come from an upstream")
        return self._composed(repository, self._upstream.snapshot(repo, commit, self._stop))

    def _composed(self, repository: Repository, snapshot: Snapshot) -> bytes:
        """The manifest that a pull of the snapshot makes of blobs that are here."""
        with self._catalog.database.read() as connection:
            shown = content.find_blobs(connection, repository.domain, repositories.blobs_of(connection, repository))
        by_oid = {blob.git_oid: blob for blob in shown.values()}
        files = {}
        for file in choose(snapshot.files)[0]:
            blob = by_oid.get(file.git_oid) if file.sha256 is None else shown.get(file.sha256)
            if blob is None:
                raise NotFound(f"{file.path} of {repository.name}@{snapshot.commit} is not here")
            files[file.path] = FileEntry(blob.sha256, blob.size, file.git_oid, blob.recipe, file.lfs, executable=False)
        return Manifest(files).encode()

    # --- recipes ---

    def _recipe(self, record: Record) -> Iterator[Try]:
        for blob in record.blobs:
            yield "metadata", lambda blob=blob: self._rows(record.domain, blob)  # type: ignore[misc]
        for peer in self._peers:
            for blob in record.blobs:
                with self._catalog.database.read() as connection:
                    known = content.find_blob(connection, record.domain, blob)
                    held = inventory.holders(connection, record.domain, blob)
                for name in held if known is not None else ():
                    repo = RepoId.from_canonical(name)
                    yield (
                        "peers",
                        lambda peer=peer, repo=repo, known=known: peer.recipe(  # type: ignore[misc]
                            repo, known.sha256, known.recipe, known.size
                        ).encode(),
                    )

    def _rows(self, domain: str, blob: str) -> bytes:
        """From the rows of a blob that is an object by itself: its chunks, where none of them comes twice."""
        with self._catalog.database.read() as connection:
            stored = inventory.find_object(connection, blob_key(domain, blob))
            held = [] if stored is None else moving.chunks_in(connection, stored.number)
        return Recipe.build(blob, [(chunk.id, chunk.at.length) for chunk in held]).encode()
