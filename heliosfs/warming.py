"""Making a commit's files local, in the order in which they are wanted: small ones first, weights as they are loaded.

What fetches one file is the caller's: a client reads it, a mount fills it in the background.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Generic, Protocol, TypeVar

import trio

from heliosfs.tree.snapshot import WEIGHTS

T = TypeVar("T")

AT_ONCE: Final = 8
"""Small files fetched at a time."""

LARGE: Final = 4 << 20
LARGE_AT_ONCE: Final = 2
"""Files of at least ``LARGE`` bytes are fetched two at a time: one file's ranges fill a link, the next is ready."""


class Sized(Protocol):
    """A file: its path in the repository, its size in bytes."""

    @property
    def path(self) -> str: ...
    @property
    def size(self) -> int: ...


F = TypeVar("F", bound=Sized)

Note = Callable[[int], None]
"""Told how many bytes of one file are local."""


@dataclass(frozen=True, slots=True)
class WarmProgress:
    """How far ``warm`` is; ``path`` is a file that it is at, empty at the end."""

    files_done: int
    files: int
    bytes_done: int
    bytes: int
    path: str = ""


@dataclass(slots=True)
class Tally(Generic[F]):
    """The files to warm, in loading order, and how far that is."""

    files: Sequence[F]
    files_done: int = 0
    bytes_done: int = 0
    under_way: dict[str, int] = field(default_factory=dict)

    def now(self) -> WarmProgress:
        """How far it is now."""
        done = self.bytes_done + sum(self.under_way.values())
        total = sum(file.size for file in self.files)
        return WarmProgress(self.files_done, len(self.files), done, total, next(iter(self.under_way), ""))


def in_loading_order(paths: Iterable[str]) -> list[str]:
    """Weights come last, by name: their shards are numbered."""
    return sorted(paths, key=lambda path: (path.endswith(WEIGHTS), path))


def select(files: Collection[str], wanted: Iterable[str], missing: Callable[[str], object]) -> set[str]:
    """The files that these paths and patterns name; ``missing`` is called for one that names none, and may raise."""
    chosen: set[str] = set()
    for path in wanted:
        found = [path] if path in files else fnmatch.filter(files, path)
        if not found:
            missing(path)
        chosen.update(found)
    return chosen


async def warm(
    tally: Tally[F],
    fetch: Callable[[F, Note], Awaitable[bool]],
    announce: Callable[[Sequence[F]], None],
) -> None:
    """Fetch every file of the tally; ``fetch`` says whether it is local now. The first error that it raises ends it.

    ``announce`` is told of the large files before they are fetched one by one: what is behind may begin with the next.
    """

    async def one(file: F) -> None:
        def note(count: int) -> None:
            tally.under_way[file.path] = count

        note(0)
        try:
            if await fetch(file, note):
                tally.files_done += 1
                tally.bytes_done += file.size
        finally:
            del tally.under_way[file.path]

    await each([file for file in tally.files if file.size < LARGE], AT_ONCE, one)
    large = [file for file in tally.files if file.size >= LARGE]
    announce(large)
    await each(large, LARGE_AT_ONCE, one)


async def each(items: Iterable[T], at_once: int, work: Callable[[T], Awaitable[None]]) -> None:
    """Do the work for every item, in order, so many at a time; the first error ends it."""
    left = iter(items)

    async def worker() -> None:
        for item in left:
            await work(item)

    async with trio.open_nursery() as nursery:
        for _ in range(at_once):
            nursery.start_soon(worker)
