"""What is remembered of a service between two leaders: the policy's states and the forecast, as text for its status.

It is in the status, and not in an object of its own, because what was decided and what is remembered of it are then one
write: nobody sees the one without the other, and nothing has to be cleaned up. It is some 5 kB, most of it the forecast
(a week of quarter-hours), compressed; states have bounds of their own, with which it stays below 24 kB in any case. A
text that can't be read is as none: what is there stays until windows have filled.
"""

from __future__ import annotations

import binascii
import zlib
from base64 import b64decode, b64encode
from collections.abc import Mapping
from typing import Final

import msgspec

from helios.decoding import from_json

VERSION: Final = 1
MOST: Final = 1 << 18
"""Longest content that is read, in bytes: anybody may have written it."""


class Memory(msgspec.Struct, frozen=True):
    """``states``: by role, what ``scaling.state.encode`` made; ``forecast``: what ``Forecast.encode`` made;
    ``busy_s``: by role, seconds that requests lately took at its workers."""

    states: Mapping[str, str] = {}
    forecast: str = ""
    busy_s: Mapping[str, float] = {}
    version: int = VERSION


def encode(memory: Memory) -> str:
    return b64encode(zlib.compress(msgspec.json.encode(memory), 9)).decode()


def decode(text: str) -> Memory:
    """What ``encode`` made; an empty one where it is of another version, or damaged."""
    try:
        content = zlib.decompressobj().decompress(b64decode(text, validate=True), MOST)
        found = from_json(content, Memory)
    except (ValueError, binascii.Error, zlib.error, msgspec.DecodeError):
        return Memory()
    return found if found.version == VERSION else Memory()
