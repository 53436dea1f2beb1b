"""Decides how a blob is stored, while it streams by.

A blob whose chunks are new becomes one object that *is* the blob, so that a redirect or sendfile can serve any range of
it. It is written that way from the first byte on, and chunk ids are looked up behind the writing. Once more than 1/64
of its bytes turn out to be known (in the domain, or from earlier in the same blob), the new chunks so far are copied
into packs inside the kernel, the raw file goes, and from then on only new chunks are written, to packs.

Why 1/64: otherwise a single shared chunk (a common tokenizer table, a tensor of zeros) would turn a blob of many
gigabytes into packs for ever. At 1/64 the copy costs at most 1.6% of space, less than what one run over many packs
costs in requests.
"""

from __future__ import annotations

from typing import Final

from blake3 import blake3

from helios.errors import NoSpace
from heliosfs.store.keys import blob_key
from heliosfs.store.placement import ChunkLocation
from registry.ingest.slabs import SLAB, Slab
from registry.ingest.staged import Packs, StagedFile
from registry.ingest.types import ChunkIndex, NewObject, Target

KNOWN_SHIFT: Final = 6
"""A blob stays raw while at most size >> KNOWN_SHIFT of its bytes are known."""

RESCUE: Final = 8 << 20
"""Fewer bytes of a blob that broke off are not worth a pack."""

LOOKUP: Final = 64
"""Most chunk ids of one look-up in the index."""


class BlobWriter:
    """Takes a blob's chunks in order and keeps those that the store lacks.

    One thread at a time. ``size`` is the blob's length in bytes. With ``known`` the caller expects that the blob is in
    the store already: it starts without a raw file. Nothing is visible before ``put``; ``abort`` removes everything
    that is not, and may be called at any time once no other call runs.
    """

    def __init__(self, store: Target, index: ChunkIndex, domain: str, size: int, *, known: bool) -> None:
        self._store, self._index, self._domain = store, index, domain
        self._limit = size >> KNOWN_SHIFT
        self.chunks: list[tuple[bytes, int]] = []
        # Of every chunk looked up; None while it is new and only in the raw file.
        self._places: dict[bytes, ChunkLocation | None] = {}
        self._looked_up = 0
        self._batch = 1
        self._known_bytes = 0
        self._packs = Packs(store, domain)
        self._raw: StagedFile | None = None if known else self._open_raw(size)

    def add(self, slab: Slab) -> None:
        """Take the next chunks, ids computed. Raises NoSpace."""
        written = len(self.chunks)
        self.chunks.extend(zip(slab.ids, slab.lengths, strict=True))
        if self._raw is not None and len(self.chunks) - self._looked_up >= self._batch:
            self._decide(written)
        if self._raw is not None:
            self._raw.write_slab(slab)
            return
        self._look_up()
        for chunk, data in zip(slab.ids, slab.chunks(), strict=True):
            if self._places[chunk] is None:
                self._places[chunk] = self._packs.write(chunk, data)

    def put(self, sha256: str, stored: list[NewObject]) -> tuple[list[ChunkLocation], int]:
        """Move what was written into the store, naming each object in ``stored`` before it can be there.

        Returns the locations of all chunks in order, and how many of the blob's bytes were new.
        """
        if self._raw is not None and self.chunks:
            self._decide(len(self.chunks))
        if self._raw is not None:
            return self._put_raw(sha256, stored)
        before = len(stored)
        self._packs.put(stored)
        ours = {o.key for o in stored[before:]}
        new = sum(at.length for at in self._places.values() if at is not None and at.object_key in ours)
        return self._locations(), new

    def rescue(self, slab: Slab, stored: list[NewObject]) -> list[tuple[bytes, ChunkLocation]]:
        """After the blob broke off: put the new chunks of its raw file into packs, as ``put`` does; returns where.

        Each is read back and checked: who knows what else has failed meanwhile. ``slab`` is room for one.
        """
        if self._raw is None or sum(length for _, length in self.chunks) < RESCUE:
            return []
        self._look_up()
        self._raw.settle()
        placed: dict[bytes, ChunkLocation] = {}
        offset = 0
        for chunk, length in self.chunks:
            if self._places[chunk] is None and chunk not in placed:
                data = slab.assign(0, [length])
                if not self._raw.read(offset, data) or blake3(data).digest() != chunk:
                    break
                placed[chunk] = self._packs.write(chunk, data)
            offset += length
        self._packs.put(stored)
        return list(placed.items())

    def abort(self) -> None:
        """Remove what is still in staging."""
        if self._raw is not None:
            self._raw.abort()
        self._packs.abort()

    def _locations(self) -> list[ChunkLocation]:
        locations = []
        for chunk, _ in self.chunks:
            at = self._places[chunk]
            assert at is not None  # every chunk was found or written
            locations.append(at)
        return locations

    def _put_raw(self, sha256: str, stored: list[NewObject]) -> tuple[list[ChunkLocation], int]:
        assert self._raw is not None
        key = blob_key(self._domain, sha256)
        self._raw.close()
        stored.append(NewObject(key, self._raw.size))
        self._store.put_file(key, self._raw.path)
        locations = []
        offset = 0
        for _, length in self.chunks:
            locations.append(ChunkLocation(key, offset, length, length))
            offset += length
        return locations, offset

    def _open_raw(self, size: int) -> StagedFile | None:
        """A raw file with room for the whole blob. None without that room: known chunks may make it fit yet."""
        file = StagedFile(self._store, direct=size > SLAB)
        try:
            file.reserve(size)
        except NoSpace:
            file.abort()
            return None
        except BaseException:
            file.abort()
            raise
        return file

    def _decide(self, written: int) -> None:
        """Look up what was not yet; leave the raw file, which holds the first ``written`` chunks, when too much of the
        blob is known."""
        found = self._look_up()
        self._batch = 1 if found else min(2 * self._batch, LOOKUP)
        if self._known_bytes > self._limit:
            self._leave_raw(written)

    def _look_up(self) -> bool:
        """Look up the chunks that were not yet; returns whether any of their bytes are known."""
        known = self._known_bytes
        while self._looked_up < len(self.chunks):
            batch = self.chunks[self._looked_up : self._looked_up + LOOKUP]
            ids = list(dict.fromkeys(chunk for chunk, _ in batch if chunk not in self._places))
            found = dict(zip(ids, self._index.find(self._domain, ids), strict=True)) if ids else {}
            for chunk, length in batch:
                if chunk in self._places or found[chunk] is not None:
                    self._known_bytes += length
                self._places.setdefault(chunk, found.get(chunk))
            self._looked_up += len(batch)
        return self._known_bytes > known

    def _leave_raw(self, written: int) -> None:
        """Copy the new chunks written so far into packs and remove the raw file; all of them are looked up."""
        assert self._raw is not None
        offset = 0
        for chunk, length in self.chunks[:written]:
            if self._places[chunk] is None:
                self._places[chunk] = self._packs.copy(chunk, self._raw, offset, length)
            offset += length
        self._raw.abort()
        self._raw = None
