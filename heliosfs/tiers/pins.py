"""What was given a class: pins that last (``pins`` in the cache directory), and what volumes keep while they exist.

All methods run on the trio loop. Changes of what lasts are made one at a time, the disk's before the memory's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

import trio

from helios.errors import InvalidInput, NoSpace
from heliosfs.tiers.classes import Classes
from heliosfs.tiers.keeping import KeepingFiles, Pin
from heliosfs.tiers.policy import Priority

MAX_PINS: Final = 4096
NAMES: Final = {priority.name.lower(): priority for priority in Priority}
"""The classes by the names that people use."""


class Pins:
    """Which blobs have which class; ``classify`` is told after every change, and has the same mapping each time."""

    def __init__(self, files: KeepingFiles, classify: Callable[[Mapping[str, Priority]], None]) -> None:
        self._files, self._classify = files, classify
        self._pins: dict[tuple[str, str], Pin] = {}
        self._kept: dict[str, tuple[Priority, frozenset[str]]] = {}
        self._classes = Classes()
        self._changing = trio.Lock()
        self._take_up({(pin.repo, pin.revision): pin for pin in files.load_pins()})

    def all(self) -> list[Pin]:
        """The pins that last, by repository and revision."""
        return [pin for _, pin in sorted(self._pins.items())]

    async def pin(self, repo: str, revision: str, commit: str, blobs: Iterable[str], priority: str) -> Pin:
        """Give a commit's blobs a class; a pin of the same name before is replaced. Durable when it returns.

        Raises InvalidInput for an unknown class; NoSpace, Unavailable.
        """
        if priority not in NAMES:
            raise InvalidInput(f"{priority!r} is no class: there are {', '.join(NAMES)}")
        pin = Pin(repo, revision, commit, priority, sorted(set(blobs)))
        async with self._changing:
            pins = self._pins | {(repo, revision): pin}
            if len(pins) > MAX_PINS:
                raise NoSpace(f"there are {len(self._pins)} pins, and no more are kept", hint="Unpin some.")
            await self._save(pins)
        return pin

    async def unpin(self, repo: str, revision: str) -> list[Pin]:
        """Forget the pins that were made with this revision, or of this commit; returns them."""
        async with self._changing:
            gone = [pin for pin in self._pins.values() if pin.repo == repo and revision in (pin.revision, pin.commit)]
            if gone:
                await self._save({key: pin for key, pin in self._pins.items() if pin not in gone})
        return gone

    def keep(self, key: str, blobs: Iterable[str], priority: Priority) -> None:
        """Give blobs a class until ``drop(key)``, or until this process ends."""
        before, now = self._kept.get(key), (priority, frozenset(blobs))
        self._kept[key] = now
        self._classes.give(now[1], priority)
        if before is not None:
            self._classes.take(before[1], before[0])
        self._classify(self._classes.of)

    def drop(self, key: str) -> None:
        """The opposite of ``keep``."""
        if (kept := self._kept.pop(key, None)) is not None:
            self._classes.take(kept[1], kept[0])
            self._classify(self._classes.of)

    async def _save(self, pins: dict[tuple[str, str], Pin]) -> None:
        await trio.to_thread.run_sync(self._files.save_pins, list(pins.values()))  # never abandoned: then it counts
        self._take_up(pins)

    def _take_up(self, pins: dict[tuple[str, str], Pin]) -> None:
        """These are the pins from now on."""
        before, self._pins = self._pins, pins
        for key, pin in pins.items():
            if before.get(key) is not pin:
                self._classes.give(frozenset(pin.blobs), _class(pin))
        for key, pin in before.items():
            if pins.get(key) is not pin:
                self._classes.take(frozenset(pin.blobs), _class(pin))
        self._classify(self._classes.of)


def _class(pin: Pin) -> Priority:
    """A pin's class; the highest for a name that a later version wrote."""
    return NAMES.get(pin.priority, Priority.PINNED)
