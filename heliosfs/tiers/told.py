"""Classes that the registry knows of models (``helios priority``), for nodes where nobody has said otherwise.

The registry is asked now and then; what it said last holds while it is away. A model that somebody pinned on this node,
in whatever class, keeps that. A blob is scratch only if every commit seen here that has it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol, TypeVar

import trio

from helios.errors import HeliosError, NotFound
from helios.names import RepoId
from heliosfs.tiers.keeping import Pin
from heliosfs.tiers.policy import Priority
from heliosfs.tree.snapshot import Snapshot

log = logging.getLogger("heliosfs.tiers")

T = TypeVar("T")

ASK_S: Final = 30.0
"""How often the registry is asked, in seconds."""
LOOK_S: Final = 2.0
"""How often it is looked whether another commit was seen, or something pinned."""
ANSWER_S: Final = 10.0
MAX_SEEN: Final = 200
"""Commits whose blobs get a class."""
MAX_BLOBS: Final = 50_000
"""Their blobs, in all."""
CLASSES: Final = {"critical": Priority.CRITICAL, "normal": Priority.NORMAL, "scratch": Priority.SCRATCH}

Given = Mapping[tuple[RepoId, str], str]
"""Class by repository and ref; the empty ref stands for all."""


class Teller(Protocol):
    """Whoever knows classes: a registry. Blocks."""

    def priorities(self, timeout_s: float) -> Given:
        """All that were given."""


class Seen(Protocol):
    """What is known here of commits (heliosfs/catalog.py)."""

    def commits(self, most: int) -> list[tuple[RepoId, str]]: ...
    def refs_at(self, repo: RepoId, commit: str) -> list[str]: ...
    async def told(self, repo: RepoId, commit: str, summary: Callable[[Snapshot], T]) -> T | None: ...


class Keeper(Protocol):
    """Who keeps blobs by class (heliosfs/tiers/pins.py)."""

    def all(self) -> Sequence[Pin]: ...
    def keep(self, key: str, blobs: Sequence[str], priority: Priority) -> None: ...
    def drop(self, key: str) -> None: ...


class ToldClasses:
    """Gives blobs the classes that the registry knows, until cancelled."""

    def __init__(self, teller: Teller, seen: Seen, keeper: Keeper) -> None:
        self._teller, self._seen, self._keeper = teller, seen, keeper
        self._given: Given = {}
        self._blobs: dict[tuple[RepoId, str], frozenset[str]] = {}
        self._kept: dict[str, frozenset[str]] = {}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Ask and look for ever."""
        task_status.started()
        ask_at = trio.current_time()
        while True:
            if trio.current_time() >= ask_at:
                ask_at = trio.current_time() + ASK_S
                await self.ask()
            await self.look()
            await trio.sleep(LOOK_S)

    async def ask(self) -> None:
        """Ask the registry; without an answer what it said before holds."""
        try:
            self._given = await trio.to_thread.run_sync(self._teller.priorities, ANSWER_S, abandon_on_cancel=True)
        except NotFound:  # an older registry
            self._given = {}
        except HeliosError as error:
            log.debug("the registry does not tell classes now", extra={"reason": error.message})

    async def look(self) -> None:
        """Give what was seen here its class."""
        wanted: dict[str, set[str]] = {"critical": set(), "scratch": set()}
        if any(name != "normal" for name in self._given.values()):
            await self._learn()
            pinned = {(pin.repo, pin.commit) for pin in self._keeper.all()}
            others: set[str] = set()
            for (repo, commit), blobs in self._blobs.items():
                name = "normal" if (str(repo), commit) in pinned else self._class(repo, commit)
                wanted.get(name, others).update(blobs)
            wanted["scratch"] -= others | wanted["critical"]
        for name, found in wanted.items():
            if self._kept.get(name, frozenset()) == found:
                continue
            self._kept[name] = frozenset(found)
            if found:
                self._keeper.keep(f"told:{name}", sorted(found), CLASSES[name])
            else:
                self._keeper.drop(f"told:{name}")

    async def _learn(self) -> None:
        """Find out the blobs of commits that are new here."""
        keys = self._seen.commits(MAX_SEEN)
        self._blobs = {key: self._blobs[key] for key in keys if key in self._blobs}
        for key in keys:
            if key in self._blobs or sum(map(len, self._blobs.values())) >= MAX_BLOBS:
                continue
            blobs = await self._seen.told(*key, _blobs)
            if blobs is not None:
                self._blobs[key] = blobs

    def _class(self, repo: RepoId, commit: str) -> str:
        """The highest class of the refs that name the commit; the repository's where none has one."""
        found = {self._given.get((repo, ref)) for ref in self._seen.refs_at(repo, commit)}
        for name in CLASSES:
            if name in found:
                return name
        return self._given.get((repo, ""), "normal")


def _blobs(snapshot: Snapshot) -> frozenset[str]:
    return frozenset(entry.sha256 for entry in snapshot.files.values() if entry.size)
