"""Chunks of a file that come before the file: into packs, each checked against its name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from blake3 import blake3

from helios.errors import InvalidInput
from heliosfs.store.batch import Chunk
from heliosfs.store.placement import ChunkLocation
from registry.ingest.reader import Reader
from registry.ingest.slabs import SlabPool
from registry.ingest.staged import Packs
from registry.ingest.types import GrowingIndex, NewObject, Source, Target

LOOKUP: Final = 256
"""Most chunk ids of one look-up in the index."""


def store_chunks(
    store: Target, index: GrowingIndex, domain: str, pool: SlabPool, chunks: Sequence[Chunk], source: Source, where: str
) -> int:
    """Store those of the chunks that the domain lacks; ``source`` gives the bytes of all, one after another.

    Blocks until everything is durable and recorded; returns how many bytes were new. Raises InvalidInput for bytes that
    have another hash, and what the source raises; then nothing of it is left.
    """
    reader = Reader(source, where, sum(length for _, length in chunks))
    known: set[bytes] = set()
    for start in range(0, len(chunks), LOOKUP):
        ids = [id_ for id_, _ in chunks[start : start + LOOKUP]]
        known |= {id_ for id_, at in zip(ids, index.find(domain, ids), strict=True) if at is not None}
    packs, placed, stored = Packs(store, domain), dict[bytes, ChunkLocation](), list[NewObject]()
    try:
        with pool.user():
            slab = pool.acquire()
            try:
                for id_, length in chunks:
                    data = slab.assign(0, [length])
                    reader.fill(data)
                    if blake3(data).digest() != id_:
                        raise InvalidInput(f"{where}: what came as chunk {id_.hex()} has another hash")
                    if id_ not in known and id_ not in placed:
                        placed[id_] = packs.write(id_, data)
            finally:
                pool.release(slab)
        reader.expect_end()
        if placed:
            packs.put(stored)
            index.add_chunks(domain, where, list(placed.items()), stored)
    except BaseException:
        for made in stored:
            store.delete(made.key)
        raise
    finally:
        packs.abort()
    return sum(at.length for at in placed.values())
