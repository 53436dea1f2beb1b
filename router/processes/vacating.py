"""When the row of a worker that left is given up: the supervisor's decision, without I/O.

A row may go when no process will begin anything under its name: all are of a configuration without the worker, and
have said that they go by a membership without it (``Hub.released``). One that comes back meanwhile keeps its row; one
that comes back and leaves again is waited for anew, since a process may be at the membership in between.
"""

from __future__ import annotations

from collections.abc import Callable

from router.processes.hub import Hub
from router.processes.members import Members


class Vacating:
    """The rows of one router's workers. ``release``: gives up that of a URL, unless something is counted in it."""

    def __init__(self, members: Members, hub: Hub, release: Callable[[str], bool], configured: set[str]) -> None:
        """``configured``: workers of the configuration, by URL."""
        self._members, self._hub, self._release, self._configured = members, hub, release, configured
        self._unwanted: dict[str, int] = {}
        """Workers whose rows are to be given up, and the epoch from which on no process counts there."""

    def renew(self, configured: set[str]) -> None:
        """There is a new configuration, whose epoch the members have begun."""
        for url in self._configured - configured:
            self._unwanted[url] = self._members.epoch
        self._configured = configured

    def step(self) -> None:
        """Give up what can be given up now."""
        for url in self._hub.released():
            self._unwanted.setdefault(url, self._members.epoch)
        if not self._unwanted:
            return
        wanted = self._configured | self._hub.found() | self._hub.leaving
        for url, epoch in list(self._unwanted.items()):
            past = all(member.epoch >= epoch for member in self._members.all.values())
            if url in wanted or (past and self._release(url)):
                del self._unwanted[url]
