"""Placements: where a blob's chunks lie.

The JSON form is what docs/native-api.md and docs/format.md describe; the registry makes it, nodes read it. A placement
says nothing that has to be believed: it is checked against the blob's recipe here, and every chunk against its hash
after it was read.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from helios.errors import IntegrityError, InvalidInput
from heliosfs.store.keys import check_key
from heliosfs.store.recipe import Recipe

FORMAT: Final = 1
"""Version of the JSON form."""

NO_CODEC: Final = "none"


@dataclass(frozen=True, slots=True)
class ChunkLocation:
    """Where one chunk lies: bytes ``offset`` to ``offset + encoded_length`` of an object.

    ``length`` is the chunk's own length in bytes, ``encoded_length`` what it takes in the object after ``codec`` and,
    with a ``key`` id, encryption. This version writes only ``none`` and no key, where the two are equal.
    """

    object_key: str
    offset: int
    length: int
    encoded_length: int
    codec: str = NO_CODEC
    key: str | None = None


class PlacedObject(msgspec.Struct, frozen=True):
    """An object that holds chunks of the blob. ``url`` is relative to the registry that answered, or absolute."""

    key: str
    url: str
    size: int


class Run(msgspec.Struct, frozen=True):
    """``count`` chunks from number ``first`` lie back to back in object number ``object`` from byte ``offset``.

    ``encoded`` lists their encoded lengths; None where the codec is ``none`` and no key is used: the recipe has them.
    """

    first: int
    count: int
    object: int
    offset: int
    codec: str = NO_CODEC
    key: str | None = None
    encoded: list[int] | None = None


class Placement(msgspec.Struct, frozen=True):
    """Where the chunks of one blob lie now.

    ``version`` grows with every change of the blob's placement; ``lease_s`` is how long a reader may rely on it, in
    seconds; ``format`` is the version of this form.
    """

    blob: str
    version: int
    lease_s: float
    objects: list[PlacedObject]
    runs: list[Run]
    format: int = FORMAT

    def encode(self) -> bytes:
        """The JSON form."""
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> Placement:
        """Read the JSON form; raises IntegrityError. Unknown fields are ignored, an unknown format is refused."""
        try:
            head = msgspec.json.decode(data, type=_Head)
            if head.format != FORMAT:
                raise IntegrityError(f"placement format {head.format} is newer than this Helios; upgrade it")
            return msgspec.json.decode(data, type=cls, strict=True)
        except (msgspec.DecodeError, RecursionError) as error:
            raise IntegrityError(f"a placement does not decode: {error}") from None


class _Head(msgspec.Struct):
    format: int = FORMAT
