"""What the event loop knows about the blobs in use, and about a READ that waits for some of the chunks of one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import trio

from helios.errors import HeliosError, IntegrityError
from heliosfs.fetch.source import BlobRef
from heliosfs.fetch.tried import Tried
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
    proved: bool = False
    """Whether it is the one of its content that may be kept: of several sizes or recipes one at a time is believed."""
    preparing: trio.Lock = field(default_factory=trio.Lock)
    handles: int = 0
    users: int = 0
    """Tasks, other than handles, that need the blob to stay open."""
    waiters: dict[int, list[Waiter]] = field(default_factory=dict)
    tried: Tried = field(default_factory=Tried)
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
        self.key, self.local, self.recipe, self.tried = key, local, None, Tried()
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


class Blobs:
    """The blobs in use. Two manifests may give one content different sizes or recipes: those are two blobs, of which
    one at most is kept on the disk, since only one is ever ``proved``. All methods run on the trio loop."""

    def __init__(self) -> None:
        self._blobs: dict[str, dict[tuple[str, int, str], Blob]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._blobs.values()))

    def __iter__(self) -> Iterator[Blob]:
        """Those that are in use now, whatever is done to them meanwhile."""
        return iter([blob for claims in self._blobs.values() for blob in claims.values()])

    def __contains__(self, blob: Blob) -> bool:
        return self.get(blob.want) is blob

    def get(self, want: BlobRef) -> Blob | None:
        """The one that a manifest means."""
        return self._blobs.get(want.sha256, {}).get(want.claim)

    def add(self, blob: Blob) -> None:
        self._blobs.setdefault(blob.want.sha256, {})[blob.want.claim] = blob

    def remove(self, blob: Blob) -> None:
        claims = self._blobs[blob.want.sha256]
        del claims[blob.want.claim]
        if not claims:
            del self._blobs[blob.want.sha256]

    def clear(self) -> None:
        self._blobs.clear()

    def of(self, sha256: str) -> list[Blob]:
        """Those of a content, one for each size and recipe that it is said to have."""
        return list(self._blobs.get(sha256, {}).values())

    def proved(self, sha256: str) -> Blob | None:
        """The one of a content that may be kept on the disk."""
        return next((blob for blob in self.of(sha256) if blob.proved), None)

    def prove(self, blob: Blob) -> None:
        """A recipe or a whole file has the size that was claimed. Raises IntegrityError if another size was proved.

        Where another recipe was, either may be a liar's until the content is whole: this one is read, and not kept.
        """
        other = self.proved(blob.want.sha256)
        if other is not None and other.want.size != blob.want.size:
            raise wrong_size(blob, other.want.size)
        blob.proved = other is None or other is blob


def wrong_size(blob: Blob, right: int) -> IntegrityError:
    """What is said of a blob whose manifest gives a wrong size; both in bytes."""
    want = blob.want
    return IntegrityError(
        f"{want.path}: its manifest gives the blob {want.sha256} {want.size} bytes, and it has {right}",
        hint=f"The manifest of {want.repo} at {want.commit} is wrong: publish that model again.",
    )
