"""The scrubber: looks at every whole blob again and again, slowly, for bits that rotted on the disk.

It goes through a tier's blobs by name, reads a chunk at a time past the page cache and compares it with the sum that
was made when it was verified (tiers/sums.py). Blobs that are in use are left out, but for one pass in ``IN_USE_EVERY``:
else one that a server has open for weeks would never be looked at. Where it is survives a restart.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
import trio

from helios.errors import IntegrityError
from helios.metrics import MountMetrics
from heliosfs.blob_status import Tier
from heliosfs.blobs import BlobStore
from heliosfs.care import Care
from heliosfs.tiers.keeping import read_record, write_record

log = logging.getLogger("heliosfs.tiers")

MAGIC: Final = b"helios-scrub 1\n"

LEAST_BYTES: Final = 4e9
"""A pass takes at least as long as this many bytes would: a small cache is not read over and over."""

START_S: Final = 60.0
"""The first look comes at most this long after the start, in seconds: others have more to do then."""

IN_USE_EVERY: Final = 4
"""One pass in so many looks at blobs that are in use, too."""

SAVE_S: Final = 60.0
"""How often the place is written down, in seconds."""


class Place(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a pass is: ``after`` is the last blob that was done, ``chunk`` the next chunk of the one that follows it,
    ``blob``; ``passes`` were done before."""

    after: str = ""
    blob: str = ""
    chunk: int = 0
    passes: int = 0


class Pace:
    """At most ``rate`` bytes a second, without bursts. No I/O in here; times in seconds."""

    def __init__(self, rate: float, clock: Callable[[], float]) -> None:
        self._rate, self._clock = rate, clock
        self._due = clock()

    def wait(self, count: float) -> float:
        """How long to wait after ``count`` bytes."""
        now = self._clock()
        self._due = max(self._due, now) + count / self._rate
        return self._due - now


class Scrubber:
    """Scrubs the tiers of ``store`` at ``rate`` bytes a second; 0: not at all. All methods run on the trio loop."""

    def __init__(
        self,
        store: BlobStore,
        care: Care,
        rate: float,
        metrics: MountMetrics,
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        self._store, self._care, self._rate, self._metrics, self._clock = store, care, rate, metrics, clock
        self._places: dict[str, Place] = {}
        self._going = trio.Event()
        self._going.set()
        self._saved = 0.0
        self.checked = 0
        """Bytes looked at by this process."""
        self.bad = 0

    async def run(self) -> None:
        """Scrub until cancelled."""
        if not self._rate:
            return
        for tier in self._store.tiers:
            await self._find_place(tier)
        await trio.sleep(min(START_S, LEAST_BYTES / self._rate))
        self._saved = self._clock()
        try:
            while True:
                began = self._clock()
                for tier in self._store.tiers:
                    await self._find_place(tier)
                    await self._pass(tier, Pace(self._rate, self._clock))
                await trio.sleep(max(0.05, began + LEAST_BYTES / self._rate - self._clock()))
        finally:
            with trio.CancelScope(shield=True):
                for tier in self._store.tiers:
                    if tier.name in self._places:
                        await self._save(tier)

    def pause(self) -> None:
        """Look at nothing more until ``resume``."""
        if self._going.is_set():
            self._going = trio.Event()

    def resume(self) -> None:
        """The opposite of ``pause``."""
        self._going.set()

    def document(self) -> dict[str, Any]:
        """What the control API says of it; of each tier the ``passes``, and how far this one is as a share."""
        places = {
            name: {"passes": place.passes, "progress": round(int(place.after[:4] or "0", 16) / 0x10000, 4)}
            for name, place in self._places.items()
        }
        return {
            "rate": self._rate,
            "paused": not self._going.is_set(),
            "checked_bytes": self.checked,
            "bad": self.bad,
            "tiers": places,
        }

    async def _find_place(self, tier: Tier) -> None:
        """A tier may come later than we did."""
        if tier.name not in self._places:
            self._places[tier.name] = await trio.to_thread.run_sync(_load, tier)

    async def _pass(self, tier: Tier, pace: Pace) -> None:
        """Look at every blob once, from where the last run was. A tier that is away is left where it is."""
        name, files = tier.name, tier.files
        while True:
            await self._going.wait()
            if tier.room.directory is not files or not tier.room.health.readable:
                return
            place = self._places[name]
            sha256 = await trio.to_thread.run_sync(_next, files.root, place.after)
            if not sha256:
                break
            if not tier.room.policy.holds(sha256) or place.passes % IN_USE_EVERY == IN_USE_EVERY - 1:
                await self._look(tier, sha256, pace)
            place = self._places[name]
            self._places[name] = Place(after=sha256, passes=place.passes)
        self._places[name] = Place(passes=self._places[name].passes + 1)
        await trio.to_thread.run_sync(_drop_orphans, files.root)
        await self._save(tier)

    async def _look(self, tier: Tier, sha256: str, pace: Pace) -> None:
        place = self._places[tier.name]
        chunk = place.chunk if place.blob == sha256 else 0

        async def paced(count: int) -> None:
            nonlocal chunk
            chunk += 1
            self._places[tier.name] = msgspec.structs.replace(place, blob=sha256, chunk=chunk)
            self.checked += count
            self._metrics.scrubbed_bytes.inc(count)
            if self._clock() - self._saved >= SAVE_S:
                await self._save(tier)
            await trio.sleep(pace.wait(count))
            await self._going.wait()

        found = await self._care.check_whole(tier, sha256, paced, strong=False, start=chunk)
        if found is not None and found.taken:
            self.bad += 1

    async def _save(self, tier: Tier) -> None:
        self._saved = self._clock()
        place = self._places[tier.name]
        try:
            await trio.to_thread.run_sync(write_record, tier.files.root / "scrub", MAGIC, place)
        except OSError as error:
            log.info("the scrubber's place can't be kept", extra={"reason": error.strerror})


def _load(tier: Tier) -> Place:
    try:
        return read_record(tier.files.root / "scrub", MAGIC, Place())
    except (OSError, IntegrityError) as error:
        log.info("the scrubber starts from the beginning", extra={"reason": str(error)})
        return Place()


def _next(root: Path, after: str) -> str:
    """The name of the whole blob that follows this one, empty after the last."""
    blobs = root / "blobs"
    for fan in sorted(name for name in _names(blobs) if name >= after[:2]):
        later = [name for name in _names(blobs / fan) if name > after]
        if later:
            return min(later)
    return ""


def _drop_orphans(root: Path) -> None:
    """Remove sums of blobs that are not here any more: somebody else removed those."""
    for fan in _names(root / "sums"):
        for name in set(_names(root / "sums" / fan)) - set(_names(root / "blobs" / fan)):
            with contextlib.suppress(OSError):
                os.unlink(root / "sums" / fan / name)


def _names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []
