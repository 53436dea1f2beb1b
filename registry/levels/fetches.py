"""Pulls that somebody asked for without waiting for them: a router that holds a request, a person who looks again.

They are this process' pulls (registry/pull/pulls.py), joined or started; here it is only remembered how the last one of
each revision went, for a while, since nobody watches it. One that failed is not tried again at once, however often it
is asked for. What other processes fetch: registry/levels/shared.py.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from helios.errors import HeliosError, Unavailable
from helios.names import RepoId
from helios.registry_answers import Fetch as Told
from helios.registry_answers import FetchError
from registry.pull.pulls import Pull, Pulls

MOST: Final = 64
"""Pulls that may be under way because of somebody who does not wait."""
REMEMBERED: Final = 256
KEEP_S: Final = 600.0
"""How long it is told how a pull went, in seconds."""
AGAIN_S: Final = 30.0
"""How long one that failed is not tried again, in seconds."""
RETRY_S: Final = (1, 30)
"""Least and most of what an asker is told to wait, in seconds."""


@dataclass(frozen=True, slots=True)
class Fetch:
    """A pull that was asked for; times by the clock of ``Fetches``."""

    pull: Pull
    started: float
    ended: float | None = None


class Fetches:
    """Threads may share it."""

    def __init__(self, pulls: Pulls, clock: Callable[[], float] = time.monotonic) -> None:
        self._pulls, self._clock = pulls, clock
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[RepoId, str], Fetch] = OrderedDict()

    def start(self, repo: RepoId, revision: str) -> Fetch:
        """Have a revision pulled, unless it is being pulled or that failed a moment ago. Raises Unavailable."""
        with self._lock:
            found = self._find(repo, revision)
            if found is not None and (found.ended is None or self._failed_lately(found)):
                return found
            under_way = sum(not fetch.pull.finished.is_set() for fetch in self._known.values())
            if under_way >= MOST:
                raise Unavailable(
                    f"{MOST} models are being fetched already", hint="Ask again when some of them are here."
                )
            fetch = Fetch(self._pulls.start(repo, revision), self._clock())
            self._known.pop((repo, revision), None)
            self._known[repo, revision] = fetch
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
            return fetch

    def find(self, repo: RepoId, revision: str) -> Fetch | None:
        """The pull of a revision that was asked for and is under way, or ended not long ago."""
        with self._lock:
            return self._find(repo, revision)

    def retry_after_s(self, fetch: Fetch) -> int:
        """When it is worth asking again, by how fast it went so far."""
        least, most = RETRY_S
        now = self._clock()
        if fetch.ended is not None:
            return max(least, min(most, round(fetch.ended + AGAIN_S - now)))
        done, total, files = fetch.pull.progress.totals()
        if not files or not done:
            return least if not files else min(most, 5)
        left = (total - done) * (now - fetch.started) / done
        return max(least, min(most, round(left)))

    def _find(self, repo: RepoId, revision: str) -> Fetch | None:
        now = self._clock()
        fetch = self._known.get((repo, revision))
        if fetch is not None and fetch.ended is None and fetch.pull.finished.is_set():
            fetch = self._known[repo, revision] = Fetch(fetch.pull, fetch.started, now)
        if fetch is not None and fetch.ended is not None and now - fetch.ended > KEEP_S:
            del self._known[repo, revision]
            return None
        return fetch

    def _failed_lately(self, fetch: Fetch) -> bool:
        return fetch.ended is not None and fetch.pull.error is not None and self._clock() - fetch.ended < AGAIN_S


def told(fetch: Fetch, retry_after_s: int) -> Told:
    """How far a pull is."""
    done, total, files = fetch.pull.progress.totals()
    error: HeliosError | None = fetch.pull.error
    state = "running" if not fetch.pull.finished.is_set() else "done" if error is None else "failed"
    why = None if error is None else FetchError(error.code, error.message, error.hint)
    return Told(state, done, total, files, why, None if state == "done" else retry_after_s)
