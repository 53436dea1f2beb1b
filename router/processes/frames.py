"""Frames on a stream of bytes between processes: a length of 4 bytes, big endian, and as many bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

M = TypeVar("M")


def framed(body: bytes, most: int, what: str) -> bytes:
    """One frame. Raises ValueError for more than ``most`` bytes of ``what``."""
    if len(body) > most:
        raise ValueError(f"a {what} of {len(body)} bytes is too long for the channel")
    return len(body).to_bytes(4, "big") + body


class Cutter(Generic[M]):
    """Cuts a stream of bytes into messages. ``most``: longest one, in bytes."""

    __slots__ = ("_buffer", "_decode", "_most")

    def __init__(self, decode: Callable[[bytes | bytearray], M], most: int) -> None:
        self._buffer, self._decode, self._most = bytearray(), decode, most

    def feed(self, data: bytes) -> list[M]:
        """The messages that are whole now. Raises ValueError for what is none (msgspec's errors are ValueErrors)."""
        buffer = self._buffer
        buffer += data
        found: list[M] = []
        at = 0
        while len(buffer) - at >= 4:
            size = int.from_bytes(buffer[at : at + 4], "big")
            if size > self._most:
                raise ValueError(f"a frame of {size} bytes")
            if len(buffer) - at - 4 < size:
                break
            found.append(self._decode(buffer[at + 4 : at + 4 + size]))
            at += 4 + size
        del buffer[:at]
        return found
