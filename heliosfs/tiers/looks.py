"""What was seen of the disk may be old when it is told: looks that threads take, and what changed meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class Looks:
    """The looks at one tier's disk that are under way. All methods run on the trio loop."""

    def __init__(self) -> None:
        self._under_way: dict[object, set[str]] = {}

    @contextmanager
    def begin(self, changing: Iterable[str] = ()) -> Iterator[set[str]]:
        """A look, for as long as the block runs. Gives the blobs of which what it sees is not to be relied on: those
        that are ``changing`` as it begins, and all that are touched until it ends."""
        look, changed = object(), set(changing)
        self._under_way[look] = changed
        try:
            yield changed
        finally:
            del self._under_way[look]

    def touch(self, key: str) -> None:
        """A blob was opened, closed, written or removed, or that begins."""
        for changed in self._under_way.values():
            changed.add(key)
