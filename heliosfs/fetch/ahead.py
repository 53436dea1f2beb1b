"""What reading a commit's files will need is asked for when its names are looked up, before a file is opened.

Without it the first READ of a file would wait for the recipe, the placement and a connection, a round trip each.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

import trio

from helios.errors import HeliosError
from helios.names import RepoId
from heliosfs.fetch.lanes import Lanes

log = logging.getLogger("heliosfs.fetch")

MAX_COMMITS: Final = 256
"""Commits remembered as asked for."""

MAX_ASKING: Final = 4
"""Questions at a time. Further commits are not asked for: opening a file of theirs asks for what it needs."""

WAIT_S: Final = 1.0
"""A file that is opened waits for the answer for so long, in seconds; then it asks for itself."""

FAILED_S: Final = 5.0
"""After a failure a commit is asked for again when so many seconds have passed."""

LEASE_PART: Final = 0.5
"""Part of a lease after which the answer is asked for anew, if the commit is looked up again."""

LONGEST_S: Final = 600.0

WARM_S: Final = 15.0
"""Connections are looked after at most this often, in seconds."""


class Ahead:
    """Asks ahead for whole commits. All methods run on the trio loop."""

    def __init__(self, lanes: Lanes, clock: Callable[[], float]) -> None:
        self._lanes, self._clock = lanes, clock
        self._until: OrderedDict[tuple[RepoId, str], float] = OrderedDict()
        self._asking: dict[tuple[RepoId, str], trio.Event] = {}
        self._warmed = float("-inf")

    def warm(self, nursery: trio.Nursery) -> None:
        """Something may be read soon, nobody knows what: have connections to the first source ready."""
        now = self._clock()
        if now - self._warmed >= WARM_S:
            self._warmed = now
            nursery.start_soon(self._lanes.warm)

    def expect(self, repo: RepoId, commit: str, nursery: trio.Nursery) -> None:
        """Files of the commit may be read soon. Returns at once."""
        key = (repo, commit)
        if key in self._asking or self._clock() < self._until.get(key, float("-inf")):
            return
        if len(self._asking) < MAX_ASKING:
            self._asking[key] = trio.Event()
            nursery.start_soon(self._ask, key)

    async def settled(self, repo: RepoId, commit: str) -> None:
        """Wait for the answer about a commit, if one is under way."""
        event = self._asking.get((repo, commit))
        if event is not None:
            with trio.move_on_after(WAIT_S):
                await event.wait()

    async def _ask(self, key: tuple[RepoId, str]) -> None:
        repo, commit = key
        holds_s = FAILED_S
        try:
            told_s = await self._lanes.ask(
                f"what {repo}@{commit} needs", lambda source, s: source.ahead(repo, commit, s)
            )
            holds_s = max(FAILED_S, min(told_s * LEASE_PART, LONGEST_S))
        except HeliosError as error:
            log.info("what a commit needs can't be learnt ahead", extra={"model": str(repo), "reason": str(error)})
        finally:
            self._asking.pop(key).set()
            self._until[key] = self._clock() + holds_s
            self._until.move_to_end(key)
            if len(self._until) > MAX_COMMITS:
                self._until.popitem(last=False)
