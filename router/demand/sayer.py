"""What this process has counted, told to the control process: what changed, every second, and who waits, at once.

Nothing is counted for it on a request's way: arrivals are those of the retry budgets, what became of requests is in the
accounts that the metrics are made of, and who waits is in the queue. All of it is read here, by a timer. Only a request
that begins to wait, while no other of its model does, is told of in the same turn of the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

from helios.metrics import LATENCY_S
from helios.series import Time
from router.demand.counts import Ended, ModelCounts, Queued
from router.relay.course import UNKNOWN
from router.relay.relay import BAD

if TYPE_CHECKING:
    from router.relay.relay import Relay

TICK_S: Final = 0.1
"""How often it is looked who waits, in seconds..."""
EACH_S: Final = 15e-6
"""...but no more often than this for each who does: looking at one takes about a hundredth of it."""
COUNT_S: Final = 1.0
"""How often it is told what was counted, in seconds, if only that it is as before."""
MOST: Final = 500
"""Models in one message."""

Say = Callable[[list[ModelCounts]], None]


class Sayer:
    """One process's. ``say`` sends to the control process; ``clock`` is the machine's, in seconds."""

    def __init__(self, relay: Relay, say: Say, clock: Callable[[], float]) -> None:
        self._relay, self._say, self._clock = relay, say, clock
        self._said: dict[str, ModelCounts] = {}
        self._began: dict[str, None] = {}
        """Models for which somebody has just begun to wait."""
        self._count_at = self._look_at = clock()
        if relay.admission is not None:
            relay.admission.begins_to_wait = self.begins

    async def run(self) -> None:
        """Tell until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            self.tick()

    def begins(self, model: str) -> None:
        """A request of the model waits."""
        said = self._said.get(model)
        if said is None or said.queued is None:
            if not self._began:
                asyncio.get_running_loop().call_soon(self._tell_began)
            self._began[model] = None

    def anew(self) -> None:
        """Another control process counts from now on, which has heard nothing."""
        self._said.clear()
        self._count()

    def tick(self) -> None:
        """Some time has passed."""
        now = self._clock()
        if now - self._count_at >= COUNT_S:
            self._count()
        elif now >= self._look_at:
            waited = [model for model, one in self._said.items() if one.queued is not None]
            line = None if self._relay.admission is None else self._relay.admission.line
            models = dict.fromkeys(waited if line is None else (*waited, *line.models()))
            if models:
                self._tell(models)

    def _count(self) -> None:
        self._count_at = self._clock()
        ended: dict[str, None] = dict.fromkeys(key[1] for key, _ in self._relay.accounts.all())
        ended.pop(UNKNOWN, None)
        line = [] if self._relay.admission is None else self._relay.admission.line.models()
        self._tell({**ended, **dict.fromkeys(self._relay.resilience.came), **dict.fromkeys(line)}, always=True)

    def _tell_began(self) -> None:
        began, self._began = self._began, {}
        self._tell(began)

    def _tell(self, models: dict[str, None], *, always: bool = False) -> None:
        """Of these models what is another thing than was said; ``always``: though that be nothing."""
        ended = self._ended(models)
        changed, waiting = [], 0
        for model in models:
            now = self._counts(model, ended.get(model, []))
            waiting += 0 if now.queued is None else now.queued.requests
            if now != self._said.get(model):
                self._said[model] = now
                changed.append(now)
        self._look_at = self._clock() + EACH_S * waiting
        for begin in range(0, max(len(changed), int(always)), MOST):
            self._say(changed[begin : begin + MOST])

    def _counts(self, model: str, ended: list[Ended]) -> ModelCounts:
        relay, came = self._relay, self._relay.resilience.came.get(model)
        admission = relay.admission
        tickets = [] if admission is None else admission.line.tickets(model)
        queued = None
        if tickets:
            tokens, since = sum(one.claim.cost for one in tickets), min(one.since for one in tickets)
            queued = Queued(len(tickets), int(tokens), since, not relay.workers.candidates(model, ()))
        total, last_at = (0, 0.0) if came is None else (came.total, came.last_at)
        return ModelCounts(model, total, last_at, queued, ended)

    def _ended(self, models: dict[str, None]) -> dict[str, list[Ended]]:
        """What became of requests of these models, by revision."""
        accounts = self._relay.accounts
        sums: dict[tuple[str, str], _Sum] = {}
        for (_, model, status, revision, streamed, cut), account in accounts.all():
            if model in models:
                one = sums.setdefault((model, revision), _Sum())
                one.count(status, int(account.count.value), cut=cut)
                if streamed and status == HTTPStatus.OK:
                    one.times.add(account.first_byte)
        for (model, revision), tries in accounts.elsewhere.items():
            if model in models:
                sums.setdefault((model, revision), _Sum()).elsewhere = tries
        found: dict[str, list[Ended]] = {}
        for (model, revision), one in sums.items():
            found.setdefault(model, []).append(
                Ended(revision, one.ok, one.failed, one.refused, one.elsewhere, one.times.counts, one.times.sum)
            )
        return found


class _Sum:
    def __init__(self) -> None:
        self.ok = self.failed = self.refused = self.elsewhere = 0
        self.times = Time(LATENCY_S)

    def count(self, status: int, requests: int, *, cut: bool) -> None:
        if cut or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            self.failed += requests
        elif status >= BAD:
            self.refused += requests
        else:
            self.ok += requests
