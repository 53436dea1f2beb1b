"""A second look at bytes that somebody found to be wrong."""

from __future__ import annotations

import logging

from blake3 import blake3

from helios.errors import IntegrityError, NotFound
from heliosfs.store.objects import ObjectStore
from heliosfs.store.placement import PlacedBlob

log = logging.getLogger("helios.registry")


def heal_chunk(store: ObjectStore, placed: PlacedBlob, index: int) -> bool:
    """Whether reading the chunk gives the right bytes from now on: they are looked at in every copy there is."""
    at, offset, length = placed.locate(index)
    digest = placed.recipe.id(index)

    def good(data: memoryview) -> bool:
        return blake3(data).digest() == digest

    if store.heal(at.key, offset, length, good):
        return True
    buffer = memoryview(bytearray(length))
    try:
        store.read_into(at.key, offset, buffer)
        if good(buffer):
            return True
        reason = "its content has another hash"
    except (IntegrityError, NotFound) as error:
        reason = error.message
    log.error(
        "a chunk in the store is damaged",
        extra={"blob": placed.recipe.blob, "chunk": index, "object": at.key, "reason": reason},
    )
    return False
