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


async def within(content: Content, limit: int) -> bytes | None:
    """All of it; None where it is longer than that, of which no more is read."""
    found = await at_most(content, limit + 1)
    return found if len(found) <= limit else None
