"""What the event loop knows about one open or filling blob, and about a READ that waits for some of its chunks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import trio

from helios.errors import HeliosError
from heliosfs.fetch.source import BlobRef
from heliosfs.store.recipe import Recipe
from heliosfs.tiers.local import LocalBlob


class Waiter:
    """A READ of ``view`` at ``offset`` that waits for chunks.

    A chunk that could not be stored is copied into the view when it arrives; ``copied`` says which were.
    """

    __slots__ = ("copied", "error", "event", "need", "offset", "since", "view")

    def __init__(self, view: memoryview, offset: int, since: float) -> None:
        self.view, self.offset, self.since = view, offset, since
        self.need: set[int] = set()
        self.copied: set[int] = set()
        self.error: HeliosError | None = None
        self.event = trio.Event()

    def arrived(self, index: int) -> None:
        self.need.discard(index)
        if not self.need:
            self.event.set()

    def copy(self, index: int, start: int, data: memoryview) -> None:
        """Take what the READ needs from a chunk that starts at ``start`` in the blob."""
        first = max(start, self.offset)
        last = min(start + len(data), self.offset + len(self.view))
        self.view[first - self.offset : last - self.offset] = data[first - start : last - start]
        self.copied.add(index)

    def fail(self, error: HeliosError) -> None:
        self.error = error
        self.event.set()


@dataclass(slots=True, eq=False)
class Blob:
    """One blob. All fields belong to the event loop; only ``local`` is shared with threads.

    ``key`` names it in the planner, and is never used again: what a given-up thread still reports about an earlier
    life of the same blob can't be mistaken for news.
    """

    key: str
    want: BlobRef
    local: LocalBlob
    recipe: Recipe | None = None
    whole: bool = False
    loaded: bool = False
    preparing: trio.Lock = field(default_factory=trio.Lock)
    handles: int = 0
    users: int = 0
    """Tasks, other than handles, that need the blob to stay open."""
    waiters: dict[int, list[Waiter]] = field(default_factory=dict)
    unflushed: list[int] = field(default_factory=list)
    unflushed_bytes: int = 0
    unflushed_since: float = 0.0
    settling: bool = False
    """A flush or the finish is under way: there is one at a time."""
    retired: list[LocalBlob] = field(default_factory=list)
    """Files that turned out to be wrong: descriptors of them may still be used by whoever has the blob open."""

    @property
    def planned(self) -> bool:
        """Whether the planner knows it: chunks can be asked for."""
        return self.recipe is not None and not self.whole

    def renew(self, key: str, local: LocalBlob) -> None:
        """Nothing is here any more: its whole file turned out to be wrong."""
        self.retired.append(self.local)
        self.key, self.local, self.recipe = key, local, None
        self.whole = self.loaded = False

    def wait(self, waiter: Waiter, chunks: Iterable[int]) -> None:
        for index in chunks:
            waiter.need.add(index)
            self.waiters.setdefault(index, []).append(waiter)

    def leave(self, waiter: Waiter) -> list[int]:
        """Take a waiter out; returns the chunks that nobody waits for any more."""
        idle = []
        for index in waiter.need:
            others = self.waiters.get(index)
            if others is not None and waiter in others:
                others.remove(waiter)
                if not others:
                    del self.waiters[index]
                    idle.append(index)
        return idle
