"""Answers of others, read whole and with a bound."""

from __future__ import annotations

from typing import Protocol


class Content(Protocol):
    """aiohttp's ``StreamReader``, whose ``read(n)`` gives what has come so far."""

    async def read(self, n: int = -1, /) -> bytes:
        """At most ``n`` bytes; none at the end."""
        ...


async def at_most(content: Content, limit: int) -> bytes:
    """All of it, or its first ``limit`` bytes: whoever reads a document finds that it is cut off."""
    parts = bytearray()
    while len(parts) < limit and (part := await content.read(limit - len(parts))):
        parts += part
    return bytes(parts)
