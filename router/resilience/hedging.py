"""Hedged requests: one that is late is sent to a second worker, and the answer that begins first counts.

J. Dean and L. A. Barroso, "The Tail at Scale", CACM 2013: a second copy that is sent only after what 95% of requests
take cuts the tail and adds a twentieth to the load. That bound holds while few are late; when all are, because the
fleet is overloaded, copies make it worse. So a second attempt is sent only where all of this is true:

- the model has a rule, and the request may be repeated after a worker may have begun it (``retry.repeatable``);
- it has waited for the model's ``Hedge.delay_s`` without a byte of an answer;
- nobody waits in the model's queue, and another worker has little to do and nothing held against it (``spare``);
- the model's budget for this allows it, which is beside the one of retries: requests that are merely late must not use
  up what those that failed need.

No I/O, and the clock is given. Everything is synchronous and runs in the event loop's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Final

from helios.config import HedgeSettings, RouterSettings
from helios.errors import UsageError
from router.resilience.budget import RetryBudget
from router.resilience.latency import Latencies
from router.resilience.retry import Failure, repeatable
from router.routes import InferenceRoute
from router.worker import Worker

ENOUGH: Final = 100
"""Times from which a percentile is taken; before, nothing is hedged by one."""
KEPT: Final = 1024
"""Times after which the older ones count half."""
READINGS: Final = 3
"""A reading of a worker's metrics counts for so many intervals."""


class Hedge:
    """One model's rule and books. ``clock`` gives seconds."""

    __slots__ = ("_budget", "_rule", "_times")

    def __init__(self, rule: HedgeSettings, budget: RetryBudget) -> None:
        self._rule, self._budget = rule, budget
        self._times: dict[tuple[str, bool], Latencies] = {}
        """Times of first attempts to their first byte, by path, and for streams apart: one is a prompt's time, the
        other a whole answer's."""

    def request(self) -> None:
        """A request that may be hedged has come, which pays for second attempts."""
        self._budget.request()

    def delay_s(self, path: str, streamed: bool) -> float | None:
        """Seconds from the first attempt to the second; None: too little is known of what is usual."""
        rule = self._rule
        if rule.after_s:
            return rule.after_s
        times = self._times.get((path, streamed))
        if times is None or times.count < ENOUGH:
            return None
        return max(rule.least_s, times.quantile(rule.percentile / 100))

    def took(self, path: str, streamed: bool, seconds: float) -> None:
        """What a first attempt took to its first byte; at least so long where it was overtaken.

        One for each request, so that a share of ``percentile`` stays below the delay however many are hedged: what is
        only known to be longer is longer than the delay anyway."""
        if self._rule.after_s:
            return
        key = path, streamed
        times = self._times.get(key)
        if times is None:
            times = self._times[key] = Latencies()
        times.add(seconds)
        if times.count > KEPT:
            times.halve()

    def refusal(self, *, queued: bool, others: int, spare: int) -> str:
        """Why there is no second attempt now, as the metric's label; "": there is, and it is paid for.

        ``queued``: somebody waits for a worker of the model; ``others``: workers that could be asked, of which
        ``spare`` have little to do."""
        if not others:
            return "nobody"
        if queued or not spare:
            return "busy"
        return "" if self._budget.take() else "budget"


class Hedges:
    """Those of a process's models."""

    def __init__(self, settings: RouterSettings, clock: Callable[[], float]) -> None:
        """Raises UsageError for settings that can't work."""
        _check(settings)
        hedging = self._settings = settings.hedging
        self._retries, self._clock = settings.retries, clock
        self._fresh_s = READINGS * settings.scrape_interval_s
        self._hedges = {
            model: Hedge(rule, RetryBudget(hedging.budget_ratio, hedging.budget_floor_per_s, clock))
            for model, rule in hedging.models.items()
        }

    def of(self, model: str, route: InferenceRoute) -> Hedge | None:
        """The model's, where requests of the route may be hedged."""
        hedge = self._hedges.get(model)
        if hedge is None or route.body != "json" or not repeatable(route, Failure.HUNG, self._retries):
            return None
        return hedge

    def spare(self, workers: Collection[Worker]) -> list[Worker]:
        """Those that have little to do and nothing held against them."""
        now, most = self._clock(), self._settings.max_in_flight
        found = []
        for worker in workers:
            metrics = worker.fresh_metrics(now, self._fresh_s)
            waiting = metrics is not None and metrics.waiting > 0
            if worker.guard.clear and worker.in_flight < most and not waiting:
                found.append(worker)
        return found


def make(settings: RouterSettings, clock: Callable[[], float]) -> Hedges | None:
    """What the settings ask for; None: nothing is hedged. Raises UsageError."""
    hedges = Hedges(settings, clock)
    return hedges if settings.hedging.models else None


def _check(settings: RouterSettings) -> None:
    hedging = settings.hedging
    if not 0 <= hedging.budget_ratio <= 1:
        raise UsageError(f"router.hedging.budget_ratio is a share, 0 to 1, not {hedging.budget_ratio}")
    if hedging.budget_floor_per_s < 0:
        raise UsageError(f"router.hedging.budget_floor_per_s must not be less than 0, not {hedging.budget_floor_per_s}")
    if hedging.max_in_flight < 1:
        raise UsageError(f"router.hedging.max_in_flight must be 1 at least, not {hedging.max_in_flight}")
    for model, rule in hedging.models.items():
        where = f"router.hedging.models.{model!r}"
        if model in settings.aliases:
            raise UsageError(f"{where} is an alias", hint=f"Give the rule to {settings.aliases[model]!r}.")
        if bool(rule.after_s) == bool(rule.percentile):
            raise UsageError(f"{where} needs either after_s or percentile: when the second attempt is sent")
        if rule.after_s < 0:
            raise UsageError(f"{where}.after_s must be more than 0, not {rule.after_s}")
        if rule.percentile and not 50 <= rule.percentile < 100:
            raise UsageError(f"{where}.percentile must be at least 50 and below 100, not {rule.percentile}")
        if rule.least_s <= 0:
            raise UsageError(f"{where}.least_s must be more than 0, not {rule.least_s}")
