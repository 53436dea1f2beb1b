"""A second look at bytes that somebody found to be wrong, and what a person can do about them."""

from __future__ import annotations

import logging

from blake3 import blake3

from helios.errors import IntegrityError, NotFound
from heliosfs.store.chunks import good, opened, stored
from heliosfs.store.objects import ObjectStore
from heliosfs.store.placement import PlacedBlob

log = logging.getLogger("helios.registry")


def how_to_repair(key: str) -> str:
    """The hint of errors about damaged chunks."""
    return (
        "`helios store verify --repair` gets it from another copy, a peer or the upstream; "
        f"where none has it, restore the object {key} from a backup of the store."
    )


def heal_chunk(store: ObjectStore, placed: PlacedBlob, index: int) -> bool:
    """Whether reading the chunk gives the right bytes from now on: they are looked at in every copy there is."""
    at, digest = placed.locate(index), placed.recipe.id(index)
    if store.heal(at.object_key, at.offset, at.encoded_length, good(at, digest)):
        return True
    try:
        found = stored(store, at, memoryview(bytearray(at.encoded_length)))
        if blake3(opened(at, found)).digest() == digest:
            return True
        reason = "its content has another hash"
    except (IntegrityError, NotFound) as error:
        reason = error.message
    log.error(
        "a chunk in the store is damaged",
        extra={"blob": placed.recipe.blob, "chunk": index, "object": at.object_key, "reason": reason},
    )
    return False
