"""Reading chunks out of an object store: from the bytes that are stored to bytes that were checked."""

from __future__ import annotations

from blake3 import blake3

from helios.errors import IntegrityError
from heliosfs.store import codec
from heliosfs.store.objects import Good, ObjectStore
from heliosfs.store.placement import ChunkLocation


def stored(store: ObjectStore, at: ChunkLocation, buffer: memoryview) -> memoryview:
    """A chunk's bytes as they are stored, in ``buffer``, which holds ``at.encoded_length`` bytes at least.

    Raises NotFound, IntegrityError for an object that is too short, Unavailable.
    """
    data = buffer[: at.encoded_length]
    store.read_into(at.object_key, at.offset, data)
    return data


def opened(at: ChunkLocation, data: memoryview) -> memoryview:
    """The chunk whose stored bytes are ``data``, not compared with its hash: ``data`` itself if it is not encoded.

    Raises IntegrityError for bytes that can't be decoded.
    """
    return codec.decode(at.codec, data, at.length)


def read(store: ObjectStore, at: ChunkLocation, buffer: memoryview) -> memoryview:
    """A chunk, not compared with its hash. It may lie in ``buffer``; see ``stored``."""
    return opened(at, stored(store, at, buffer))


def good(at: ChunkLocation, id_: bytes) -> Good:
    """Says whether stored bytes are those of the chunk with this BLAKE3: what ``ObjectStore.heal`` asks."""

    def answer(data: memoryview) -> bool:
        try:
            return bool(blake3(opened(at, data)).digest() == id_)
        except IntegrityError:
            return False

    return answer


def load(store: ObjectStore, at: ChunkLocation, id_: bytes, buffer: memoryview) -> memoryview | None:
    """The chunk with this BLAKE3, from whichever copy of the object has it; None where none has.

    A store that keeps several repairs those that are wrong. Raises what ``stored`` does.
    """
    found = _matching(at, id_, stored(store, at, buffer))
    if found is None and store.heal(at.object_key, at.offset, at.encoded_length, good(at, id_)):
        found = _matching(at, id_, stored(store, at, buffer))
    return found


def _matching(at: ChunkLocation, id_: bytes, data: memoryview) -> memoryview | None:
    try:
        found = opened(at, data)
    except IntegrityError:
        return None
    return found if blake3(found).digest() == id_ else None
