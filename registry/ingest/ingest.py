"""Ingest: one file's bytes into the object store."""

from __future__ import annotations

import copy
import hashlib
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import msgspec
from blake3 import blake3

from helios.errors import HeliosError, IntegrityError, InvalidInput, Unavailable
from helios.metrics import RegistryMetrics
from heliosfs.store.cutting import cut, groups
from heliosfs.store.keys import PUBLIC, check_domain, recipe_key
from heliosfs.store.manifest import FileEntry, git_blob_oid, lfs_pointer
from heliosfs.store.placement import ChunkLocation
from heliosfs.store.recipe import MAX_BLOB, Recipe
from registry.ingest.kinds import SNIFF, is_lfs
from registry.ingest.pipeline import Pipeline
from registry.ingest.reader import Reader
from registry.ingest.slabs import SLAB, Slab, SlabPool
from registry.ingest.staged import flush
from registry.ingest.types import ChunkIndex, GrowingIndex, IngestedBlob, NewObject, SenderGone, Source, Target
from registry.ingest.writer import LOOKUP, BlobWriter

log = logging.getLogger("helios.registry.ingest")

TURN_S: Final = 600.0
"""Longest wait for an equal blob that is being made visible, in seconds."""


class Ingest:
    """Writes files into one domain of an object store. Share one object among threads: it bounds their memory."""

    def __init__(
        self,
        store: Target,
        index: ChunkIndex,
        domain: str = PUBLIC,
        metrics: RegistryMetrics | None = None,
    ) -> None:
        self._store, self._index, self._domain, self._metrics = store, index, check_domain(domain), metrics
        self.pool = SlabPool()
        self._finishing = _Turns()

    def on(self, store: Target, index: ChunkIndex, domain: str) -> Ingest:
        """The same ingest, with the same bound on memory, on another view of store and index, into a domain."""
        other = copy.copy(self)
        other._store, other._index, other._domain = store, index, check_domain(domain)
        return other

    def ingest(
        self,
        path: str,
        size: int,
        source: Source,
        *,
        executable: bool = False,
        lfs: bool | None = None,
        expect_sha256: str | None = None,
        expect_git_oid: str | None = None,
        recipe: Recipe | None = None,
        stored: bool = False,
        rescue: GrowingIndex | None = None,
    ) -> IngestedBlob:
        """Store the ``size`` bytes of ``source`` as the file ``path`` of a repository, and record them in the index.

        Blocks until everything is durable. ``lfs`` says how the file's upstream keeps it; None decides by the Hub's
        rules. ``expect_sha256`` and ``expect_git_oid`` are what the content must hash to; for an LFS file with a known
        sha256 the git oid is the upstream's name for its pointer file and is taken as it is. ``recipe`` says where to
        cut, and what the chunks must hash to, where another registry has cut the file already. ``stored`` says that all
        its chunks should be in the index, so that no room is made for them. ``rescue`` takes the chunks that have come
        of a new file whose sender is gone.

        Raises InvalidInput for a source that is shorter or longer than ``size`` and for a malformed safetensors header,
        IntegrityError for content that is not the expected, NoSpace, and whatever the source raises. Then no object of
        this ingest is left, unless an equal one was there before, no staging file and no thread.
        """
        if not 0 <= size <= MAX_BLOB:
            raise InvalidInput(f"{path}: a file can't have {size} bytes; {MAX_BLOB} are the most")
        reader = Reader(source, path, size)
        with self.pool.user():
            lengths = cut(path, size, reader.peek)
            if recipe is not None:
                lengths = [length for _, length in recipe.chunks()]
            if lfs is None:
                lfs = is_lfs(path, size, reader.peek(min(size, SNIFF)))
            known = stored or (expect_sha256 is not None and self._recorded(expect_sha256))
            writer = BlobWriter(self._store, self._index, self._domain, size, known=known)
            try:
                hashes = _FileHashes(size, git=not lfs)
                self._stream(reader, lengths, hashes, writer)
                entry = hashes.entry(path, executable, expect_sha256, expect_git_oid)
                if recipe is not None and writer.chunks != list(recipe.chunks()):
                    raise IntegrityError(f"{path}: its bytes are not those of its recipe (blob {recipe.blob})")
                with self._finishing.turn(f"{self._domain}:{entry.sha256}"):
                    blob = self._finish(path, entry, writer)
            except SenderGone as gone:
                if rescue is not None:
                    gone.kept = self._rescue(path, writer, rescue)
                raise
            finally:
                writer.abort()
        if self._metrics is not None:
            self._metrics.ingested_bytes.labels(result="new").inc(blob.new_bytes)
            self._metrics.ingested_bytes.labels(result="deduplicated").inc(blob.deduplicated_bytes)
        return blob

    def _stream(self, reader: Reader, lengths: list[int], hashes: _FileHashes, writer: BlobWriter) -> None:
        size, offset = sum(lengths), 0
        gone: SenderGone | None = None
        with Pipeline(self.pool, hashes.add, _hash_chunks, writer.add, flush, threads=size > SLAB) as pipeline:
            for group in groups(lengths, SLAB):
                slab = pipeline.slab()
                try:
                    reader.fill(slab.assign(offset, group))
                except SenderGone as error:  # what has come goes through yet
                    pipeline.drop(slab)
                    gone = error
                    break
                except BaseException:
                    pipeline.drop(slab)
                    raise
                pipeline.put(slab)
                offset += sum(group)
            else:
                reader.expect_end()
        if gone is not None:
            raise gone

    def _rescue(self, path: str, writer: BlobWriter, index: GrowingIndex) -> int:
        """Keep what came; returns how many bytes. That it came to nothing is no news to who has left."""
        stored: list[NewObject] = []
        try:
            slab = self.pool.acquire()
            try:
                placed = writer.rescue(slab, stored)
            finally:
                self.pool.release(slab)
            if placed:
                index.add_chunks(self._domain, path, placed, stored)
            return sum(at.length for _, at in placed)
        except HeliosError as error:
            log.warning("what came of a file was not kept", extra={"path": path, "error": str(error)})
            for made in stored:
                self._store.delete(made.key)
            return 0

    def _finish(self, path: str, entry: FileEntry, writer: BlobWriter) -> IngestedBlob:
        """Make the verified blob visible: objects first, then the index."""
        recipe = Recipe.build(entry.sha256, writer.chunks)
        if (known := self._known(path, entry, recipe)) is not None:
            return known
        record = recipe.encode()
        digest = hashlib.sha256(record).hexdigest()
        entry = msgspec.structs.replace(entry, recipe=digest)
        stored: list[NewObject] = []
        try:
            locations, new = writer.put(entry.sha256, stored)
            stored.append(NewObject(recipe_key(self._domain, digest), len(record)))
            self._store.put_bytes(stored[-1].key, record)
            blob = IngestedBlob(path, entry, recipe, record, locations, tuple(stored), new, entry.size - new)
            self._index.add_blob(self._domain, blob)
        except BaseException:
            self._undo(stored, entry.sha256)
            raise
        return blob

    def _recorded(self, sha256: str) -> bool:
        return self._index.recipe_of(self._domain, sha256) is not None

    def _known(self, path: str, entry: FileEntry, recipe: Recipe) -> IngestedBlob | None:
        """The blob as it is in the store already; None where it is not, or not all of it is found.

        The recipe that was recorded first stands, though an earlier version may have cut the blob in another way.
        """
        digest = self._index.recipe_of(self._domain, entry.sha256)
        if digest is None:
            return None
        record = recipe.encode()
        if hashlib.sha256(record).hexdigest() != digest:
            record = self._read(recipe_key(self._domain, digest))
            recipe = Recipe.decode(record, digest)
        locations = self._locate(recipe)
        if locations is None:
            return None
        entry = msgspec.structs.replace(entry, recipe=digest)
        return IngestedBlob(path, entry, recipe, record, locations, (), 0, entry.size)

    def _locate(self, recipe: Recipe) -> list[ChunkLocation] | None:
        """Where all chunks lie by what the index says now; None when it lacks one."""
        ids = [chunk for chunk, _ in recipe.chunks()]
        locations: list[ChunkLocation] = []
        for start in range(0, len(ids), LOOKUP):
            found = self._index.find(self._domain, ids[start : start + LOOKUP])
            locations.extend(at for at in found if at is not None)
        return locations if len(locations) == len(ids) else None

    def _read(self, key: str) -> bytes:
        buffer = bytearray(self._store.info(key).size)
        self._store.read_into(key, 0, memoryview(buffer))
        return bytes(buffer)

    def _undo(self, stored: list[NewObject], sha256: str) -> None:
        """Delete the objects of an ingest that failed, unless the index has recorded the blob after all."""
        try:
            if self._index.recipe_of(self._domain, sha256) is None:
                for made in stored:
                    self._store.delete(made.key)
        except HeliosError as error:
            log.warning("objects of a failed ingest are left in the store", extra={"blob": sha256, "error": str(error)})


class _FileHashes:
    """sha256 of a file, and sha1 as git computes it where ``git`` is set."""

    def __init__(self, size: int, *, git: bool) -> None:
        self._size = size
        self._sha256 = hashlib.sha256()
        self._sha1 = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False) if git else None

    def add(self, slab: Slab) -> None:
        data = slab.data
        self._sha256.update(data)
        if self._sha1 is not None:
            self._sha1.update(data)

    def entry(self, path: str, executable: bool, expect_sha256: str | None, expect_git_oid: str | None) -> FileEntry:
        """The file's line for a manifest, still without its recipe. Raises IntegrityError for unexpected content."""
        sha256 = self._sha256.hexdigest()
        if expect_sha256 not in (None, sha256):
            raise IntegrityError(f"{path}: its sha256 is {sha256}, but {expect_sha256} was expected")
        if self._sha1 is not None:
            git_oid = self._sha1.hexdigest()
        elif expect_sha256 is not None and expect_git_oid is not None:
            git_oid = expect_git_oid
        else:
            git_oid = git_blob_oid(lfs_pointer(sha256, self._size))
        if expect_git_oid not in (None, git_oid):
            raise IntegrityError(f"{path}: its git oid is {git_oid}, but {expect_git_oid} was expected")
        return FileEntry(sha256, self._size, git_oid, "", self._sha1 is None, executable)


class _Turns:
    """One holder at a time for each name."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held: set[str] = set()

    @contextmanager
    def turn(self, name: str) -> Iterator[None]:
        with self._changed:
            if not self._changed.wait_for(lambda: name not in self._held, TURN_S):
                raise Unavailable(f"another publish of {name} did not end within {TURN_S:g} s")
            self._held.add(name)
        try:
            yield
        finally:
            with self._changed:
                self._held.remove(name)
                self._changed.notify_all()


def _hash_chunks(slab: Slab) -> None:
    slab.ids = [blake3(chunk).digest() for chunk in slab.chunks()]
