"""What the commits of a registry hold: manifests, recipes, where the chunks lie, and readers of them.

Every method blocks but ``hot``; see ``registry/catalog.py``, which says what names mean.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING
from urllib.parse import quote

from helios.errors import EntryNotFound, IntegrityError, NotFound, Quarantined
from helios.names import RepoId
from heliosfs.store.content import MAX_BLOBS, MAX_BYTES, BlobContent, CommitContent
from heliosfs.store.keys import manifest_key, recipe_key
from heliosfs.store.manifest import FileEntry, Manifest
from heliosfs.store.objects import ObjectStore
from heliosfs.store.placement import PlacedBlob, Placement
from heliosfs.store.recipe import Recipe
from registry.admission.admission import Admission
from registry.cache import Cache
from registry.last_reads import LastReads
from registry.metadata import content, inventory, quarantine, repositories
from registry.metadata.database import Changes, Database

if TYPE_CHECKING:
    from registry.blobs import BlobReader
    from registry.catalog import Resolved

log = logging.getLogger("helios.registry.contents")


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes: every commit as a full copy; distinct blobs; what the store keeps for them."""

    logical: int
    unique: int
    stored: int


class Contents:
    """Reads content of one registry. Owns what is in memory of it: manifests, placements, and who holds which blob."""

    def __init__(
        self,
        database: Database,
        store: ObjectStore,
        lease_s: float,
        admission: Admission,
        resolve: Callable[[RepoId, str], Resolved],
    ) -> None:
        """``resolve`` says what a revision of a repository names, or raises."""
        self.database, self.store, self.lease_s = database, store, lease_s
        self.admission, self._resolve = admission, resolve
        self._held: Cache[tuple[str, str], content.KnownBlob] = Cache(4096)
        # By domain and hash: what one domain holds says nothing of another.
        self._manifests: Cache[tuple[str, str], tuple[bytes, Manifest]] = Cache(128)
        self._placements: Cache[tuple[str, str], PlacedBlob] = Cache(256)
        self.reads = LastReads(database)

    def forget(self, changes: Changes) -> None:
        """Drop what is in memory and may have changed."""
        self._held.clear()
        if changes is Changes.ALL:
            self._placements.clear()

    def manifest(self, repo: RepoId, commit: str) -> Manifest:
        """What a commit holds. Raises RepoNotFound, RevisionNotFound, IntegrityError."""
        return self._manifest(repo, commit)[1]

    def manifest_bytes(self, repo: RepoId, commit: str) -> bytes:
        """The manifest's record."""
        return self._manifest(repo, commit)[0]

    def _manifest(self, repo: RepoId, commit: str) -> tuple[bytes, Manifest]:
        at = self._resolve(repo, commit)
        key = at.domain, at.manifest_digest
        return self._manifests.get(key, lambda: self._load_manifest(*key))

    def manifest_of(self, domain: str, digest: str) -> Manifest:
        """A manifest by its digest, whoever's it is, for work of the registry's own. Not kept in memory."""
        return self._load_manifest(domain, digest)[1]

    def _load_manifest(self, domain: str, digest: str) -> tuple[bytes, Manifest]:
        data = self._read_object(manifest_key(domain, digest))
        return data, Manifest.decode(data, digest)

    def recipe_bytes(self, repo: RepoId, blob: str) -> bytes:
        """The recipe record of a blob that the repository holds."""
        known = self.held(repo, blob)
        return self._recipe(known.domain, known.recipe)

    def recipe(self, domain: str, digest: str) -> Recipe:
        """A recipe by its digest, whoever's it is, for work of the registry's own."""
        return Recipe.decode(self._recipe(domain, digest), digest)

    def _recipe(self, domain: str, digest: str) -> bytes:
        data = self._read_object(recipe_key(domain, digest))
        Recipe.decode(data, digest)
        return data

    def placement(self, repo: RepoId, blob: str) -> Placement:
        """Where the chunks of a blob lie that the repository holds."""
        return self.placed(repo, blob).placement

    def placed(self, repo: RepoId, blob: str) -> PlacedBlob:
        """Recipe and placement, checked against each other, of a blob that the repository holds."""
        known = self.held(repo, blob)
        self.reads.note(known.domain, known.sha256)
        return self._placements.get((known.domain, known.sha256), lambda: self._place(known))

    def placed_blob(self, domain: str, sha256: str) -> PlacedBlob | None:
        """Like ``placed``, of any blob of the domain, whoever holds it: for what a mirrored commit lists."""
        with self.database.read() as connection:
            known = content.find_blob(connection, domain, sha256)
        if known is None:
            return None
        self.reads.note(domain, sha256)
        return self._placements.get((domain, sha256), lambda: self._place(known))

    def _place(self, known: content.KnownBlob) -> PlacedBlob:
        recipe = self.recipe(known.domain, known.recipe)
        ids = [digest for digest, _ in recipe.chunks()]
        with self.database.read() as connection:
            located = content.locate(connection, known.domain, ids)
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

    def open_stored(self, domain: str, entry: FileEntry) -> IO[bytes]:
        """A stored blob as a file, be it held by a commit or not; its bytes are checked as they are read."""
        from registry.blobs import as_file

        return as_file(self.stored_blob(domain, entry.sha256))

    def stored_blob(self, domain: str, sha256: str) -> BlobReader:
        """A reader of a blob of the domain, whoever holds it and be it held or not. Raises NotFound."""
        from registry.blobs import BlobReader

        with self.database.read() as connection:
            known = content.find_blob(connection, domain, sha256)
        if known is None:
            raise NotFound(f"the store does not hold blob {sha256}; publish the file again")
        placed = self._place(known)
        return BlobReader(self.store, placed.recipe, placed.placement)

    def has_blob(self, domain: str, sha256: str) -> FileEntry | None:
        """The line for a manifest of a blob whose every byte is stored in the domain, or None.

        ``git_oid`` and ``lfs`` are those of its first publisher; another repository may show the blob differently.
        """
        with self.database.read() as connection:
            known = content.find_blob(connection, domain, sha256)
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

    def holders(self, domain: str, sha256: str) -> list[RepoId]:
        """The repositories of the domain that have a commit with the blob."""
        with self.database.read() as connection:
            return repositories.holders(connection, domain, sha256)

    def hot(self, repo: RepoId, at: Resolved, path: str) -> tuple[Manifest, FileEntry] | None:
        """A file of a commit that may be read, if all of it is in memory. Does not block: for the event loop."""
        found = self._manifests.peek((at.domain, at.manifest_digest))
        entry = None if found is None else found[1].files.get(path)
        if found is None or entry is None or not self._held.peek((str(repo), entry.sha256)):
            return None
        return found[1], entry

    def _read_object(self, key: str) -> bytes:
        buffer = bytearray(self.store.info(key).size)
        self.store.read_into(key, 0, memoryview(buffer))
        return bytes(buffer)

    # --- how much it is ---

    def usage(self, repo: RepoId | None = None) -> Usage:
        """Bytes used by a repository, or by all. Chunks that repositories share count for each of them."""
        with self.database.read() as connection:
            if repo is None:
                logical = repositories.logical_bytes(connection, None)
                return Usage(logical, content.held_bytes(connection), content.stored_bytes(connection))
            repository = repositories.require(connection, repo)
            logical = repositories.logical_bytes(connection, repository)
            digests = repositories.blobs_of(connection, repository)
            domain = repository.domain
            known = content.find_blobs(connection, domain, digests)
        ids: set[bytes] = set()
        for blob in known.values():
            ids.update(id_ for id_, _ in self.recipe(domain, blob.recipe).chunks())
        with self.database.read() as connection:
            stored = content.encoded_bytes(connection, domain, ids)
        return Usage(logical, sum(blob.size for blob in known.values()), stored)

    def shares(self) -> tuple[list[inventory.Share], float]:
        """Every repository's bytes, and the stored bytes that none holds: of pushes under way, and garbage."""
        with self.database.read() as connection:
            found = [inventory.shares(connection, domain) for domain in content.domains(connection)]
        return [share for shares, _ in found for share in shares], sum(unheld for _, unheld in found)
