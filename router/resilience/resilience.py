"""The parts put together for one process: guards, retry budgets, hedges, fallbacks, and what looks after them."""

from __future__ import annotations

import asyncio
import random as stdlib_random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from helios.config import RouterSettings
from helios.errors import UsageError
from helios.metrics import RouterMetrics
from router.resilience import hedging
from router.resilience.budget import RetryBudget
from router.resilience.cells import Cells, LocalCells
from router.resilience.fallback import Fallbacks, Target
from router.resilience.guard import Guard
from router.resilience.outlier import room, worst
from router.resilience.retry import STATUSES, Failure, repeatable
from router.routes import InferenceRoute

if TYPE_CHECKING:
    from router.relay.relay import Relay
    from router.shared import Shared
    from router.workers import Worker, Workers

RESULTS: Final = ("ok", "failed", "busy", "unable")
FOLLOW_S: Final = 0.1
"""How often a process looks whether another one has found something."""
FAILING: Final = frozenset({500, 502, 503, 504})
"""Statuses that speak against a worker."""


class Resilience:
    """Everything runs in the event loop's thread. Raises UsageError for settings that can't work."""

    def __init__(
        self, settings: RouterSettings, metrics: RouterMetrics, clock: Callable[[], float] = time.monotonic,
        random: Callable[[], float] = stdlib_random.random, shared: Shared | None = None,
    ) -> None:  # fmt: skip
        """``clock`` gives seconds, ``random`` numbers from 0 to 1. ``shared``: with other processes; None: alone."""
        _check(settings)
        self._shared = shared
        self._heard = 0 if shared is None else shared.moment
        self._settings, self._metrics, self._clock, self._random = settings, metrics, clock, random
        self._budgets: dict[str, RetryBudget] = {}
        self.fallbacks = Fallbacks(settings.fallbacks, self._endpoint)
        for endpoint in self.fallbacks.endpoints:
            self._measure(endpoint.url, endpoint.guard)
        self.hedges = hedging.make(settings, clock)
        """When late requests go to a second worker; None: never."""
        limited = {429} if settings.retries.retry_429 else set()
        self.retried_statuses = frozenset({502, 503, 504, *limited}) if settings.retries.most else frozenset()
        """Error answers that are held back until it is clear whether they are retried."""

    def guard(self, url: str) -> Guard:
        """The guard of a new worker."""
        return self._guard(url, LocalCells() if self._shared is None else self._shared.standing(url))

    def _endpoint(self, url: str) -> Guard:
        return self._guard(url, LocalCells() if self._shared is None else self._shared.endpoint(url))

    def _guard(self, name: str, cells: Cells) -> Guard:
        openings, forced = self._metrics.breaker_openings, self._metrics.failed_open
        return Guard(
            name, self._settings, self._clock, self._random,
            opened=lambda name: openings.labels(name).inc(), forced=lambda name: forced.labels(name).inc(), cells=cells,
        )  # fmt: skip

    def joined(self, worker: Worker) -> None:
        self._measure(worker.url, worker.guard)

    def left(self, worker: Worker) -> None:
        pass

    def gone(self, worker: Worker) -> None:
        """Nothing is measured of it any more."""
        metrics, url = self._metrics, worker.url
        for metric in (metrics.breaker_state, metrics.hung, metrics.breaker_openings, metrics.failed_open):
            with suppress(KeyError):
                metric.remove(url)
        for metric, values in ((metrics.ejections, ("slow", "failing")), (metrics.token_checks, RESULTS)):
            for value in values:
                with suppress(KeyError):
                    metric.remove(url, value)

    def _measure(self, name: str, guard: Guard) -> None:
        """Gauges that read the guard when they are asked."""
        self._metrics.breaker_state.labels(name).set_function(lambda: float(guard.breaker.state.value))
        self._metrics.hung.labels(name).set_function(lambda: float(guard.hung))

    # --- retries ---

    def began(self, model: str) -> None:
        """A request for a known model, which pays for retries."""
        budget = self._budgets.get(model)
        if budget is None:
            retries = self._settings.retries
            budget = RetryBudget(retries.budget_ratio, retries.budget_floor_per_s, self._clock)
            self._budgets[model] = budget
        budget.request()

    @property
    def came(self) -> Mapping[str, RetryBudget]:
        """What came of each model that is known; its budget counts that."""
        return self._budgets

    def repeats(self, route: InferenceRoute, failure: Failure, before: int) -> bool:
        """Whether a request that was sent again ``before`` times may be once more; ``pay`` for it then."""
        retries = self._settings.retries
        return before < retries.most and repeatable(route, failure, retries)

    def pay(self, model: str) -> bool:
        """Whether the model's budget allows a retry, which is counted."""
        if self._budgets[model].take():
            return True
        self._metrics.budget_exhausted.labels(model).inc()
        return False

    def failure_of(self, status: int) -> Failure | None:
        """Why an answer with this status would be retried; None: it is not."""
        return STATUSES[status] if status in self.retried_statuses else None

    def fell_back(self, model: str, target: Target) -> None:
        self._metrics.fallbacks.labels(model, target.name).inc()

    # --- what runs ---

    async def run(self, workers: Workers, relay: Relay) -> None:
        """Compare workers, ask those that are doubted, and hear what others have found, until cancelled."""
        from router.resilience.tokens import TokenChecks

        settings = self._settings
        checks = TokenChecks(workers, settings.hang, relay.keys, self._metrics, relay.hung, relay.tls)
        async with asyncio.TaskGroup() as tasks:
            if settings.hang.enabled:
                tasks.create_task(checks.run())
            if settings.outliers.enabled:
                tasks.create_task(self._compare(workers))
            if self._shared is not None:
                tasks.create_task(self._follow(self._shared, workers))

    async def _follow(self, shared: Shared, workers: Workers) -> None:
        """Leave out, or use again, what another process has found to be bad or good."""
        while True:
            await asyncio.sleep(FOLLOW_S)
            if self._heard != shared.moment:
                self._heard = shared.moment  # before they are looked at: what changes meanwhile is seen the next time
                for guard in [*(one.guard for one in workers.all), *(one.guard for one in self.fallbacks.endpoints)]:
                    guard.refresh()

    async def _compare(self, workers: Workers) -> None:
        while True:
            await asyncio.sleep(self._settings.outliers.interval_s)
            for model in workers.models:
                self.compare(model, workers)
                await asyncio.sleep(0)

    def compare(self, model: str, workers: Workers) -> None:
        """Eject those of a model's workers that are much worse than the others."""
        settings, now = self._settings.outliers, self._clock()
        peers = [worker for worker in workers.of(model) if worker.role != "prefill"]
        standings = [worker.guard.standing(now) for worker in peers]
        found = worst(standings, now, settings)
        for place, reason in found:
            worker = peers[place]
            if not worker.guard.ejected and all(self._room(workers.of(one)) for one in worker.models):
                worker.guard.eject(reason)
                self._metrics.ejections.labels(worker.url, reason).inc()
        bad = {place for place, _ in found}
        for place, standing in enumerate(standings):
            if standing is not None and standing.at == now and place not in bad:
                peers[place].guard.spared()

    def _room(self, workers: list[Worker]) -> bool:
        peers = [worker for worker in workers if worker.role != "prefill"]
        return room(len(peers), sum(worker.guard.ejected for worker in peers), self._settings.outliers)


_MORE_THAN_0: Final = {
    "breaker": ("failures", "failure_ratio", "min_requests", "window_s", "open_s", "max_open_s", "probes", "successes"),
    "outliers": ("interval_s", "min_requests", "slow_factor", "failure_margin", "eject_s", "max_eject_s"),
    "hang": ("quiet_s", "factor", "timeout_s", "every_s"),
}
_NOT_BELOW_0: Final = {
    "retries": ("most", "budget_ratio", "budget_floor_per_s"),
    "breaker": ("jitter",),
    "outliers": ("slow_margin_s", "max_share"),
}
_SHARES: Final = {"breaker": ("failure_ratio", "jitter"), "outliers": ("failure_margin", "max_share")}


def _check(settings: RouterSettings) -> None:
    checks: tuple[tuple[Mapping[str, Sequence[str]], Callable[[float], bool], str], ...] = (
        (_MORE_THAN_0, lambda value: value <= 0, "must be more than 0"),
        (_NOT_BELOW_0, lambda value: value < 0, "must not be less than 0"),
        (_SHARES, lambda value: value > 1, "is a share, at most 1"),
    )
    for names, wrong, what in checks:
        for section, keys in names.items():
            for key in keys:
                value = getattr(getattr(settings, section), key)
                if wrong(value):
                    raise UsageError(f"router.{section}.{key} {what}, not {value}")
    breaker = settings.breaker
    if breaker.max_open_s < breaker.open_s:
        raise UsageError("router.breaker.max_open_s must not be less than router.breaker.open_s")
