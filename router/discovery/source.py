"""What a source of workers is, and how it tells what it knows."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Protocol

import msgspec

from helios.config import WorkerSettings
from helios.errors import UsageError
from helios.metrics import RouterMetrics
from router.disaggregation.bootstrap import wrong_with as wrong_bootstrap
from router.kv.publishers import wrong_with
from router.membership import said_of
from router.workers import check_url

log = logging.getLogger("helios.router.discovery")

Apply = Callable[[str, Sequence[WorkerSettings]], object]
"""Takes a source's name and all workers it knows. Those that it knew before and are not among them are drained."""

MOST_NAMED: Final = 5
"""Problems that one line of the log names."""


class Source(Protocol):
    """Something that knows workers."""

    async def run(self) -> None:
        """Look, and tell, until cancelled."""
        ...


@dataclass(frozen=True, slots=True)
class Found:
    """All workers that a source knows, in the order of their URLs, and what it says that can't be used."""

    workers: tuple[WorkerSettings, ...] = ()
    problems: tuple[str, ...] = ()

    def __add__(self, other: Found) -> Found:
        return Found(self.workers + other.workers, self.problems + other.problems)


class Teller:
    """Tells of one source: to whoever keeps the workers, the log and the metrics."""

    def __init__(
        self, name: str, apply: Apply, metrics: RouterMetrics, *, wall: Callable[[], float] = time.time
    ) -> None:
        self._name, self._apply, self._metrics, self._wall = name, apply, metrics, wall
        self._told: Found | None = None

    def knows(self, found: Found) -> None:
        """The source was heard of, and this is all it knows. What is not new is not told again."""
        self.heard()
        before, self._told = self._told, found
        if before is None or before.problems != found.problems:
            self._metrics.discovery_problems.labels(self._name).set(len(found.problems))
            if found.problems:
                log.warning(
                    "a source of workers says what can't be used",
                    extra={
                        "source": self._name,
                        "problems": found.problems[:MOST_NAMED],
                        "count": len(found.problems),
                    },
                )
        if before is not None and before.workers == found.workers:
            return
        workers = len({worker.url for worker in found.workers if worker.url})
        log.info("workers have changed", extra={"source": self._name, "workers": workers})
        self._metrics.discovered.labels(self._name).set(workers)
        self._apply(self._name, found.workers)

    def heard(self) -> None:
        """The source answers, whether it says anything new or not."""
        self._metrics.discovery_fresh.labels(self._name).set(self._wall())

    def ended(self, who: Sequence[str]) -> None:
        """The leases of these workers have ended without a word of theirs."""
        self._metrics.discovery_failures.labels(self._name, "expired").inc(len(who))
        extra = {"source": self._name, "workers": list(who[:MOST_NAMED]), "count": len(who)}
        log.warning("workers did not renew their leases", extra=extra)

    def failed(self, reason: str, why: str) -> None:
        """The source can't be looked at: what it said last counts."""
        self._metrics.discovery_failures.labels(self._name, reason).inc()
        log.log(
            logging.INFO if reason == "silent" else logging.WARNING,  # a quiet server may be silent for long
            "a source of workers can't be looked at; what it said last counts",
            extra={"source": self._name, "reason": reason, "why": why},
        )


def checked(worker: WorkerSettings) -> WorkerSettings:
    """The settings with a clean URL; raises UsageError for what no worker can be."""
    url = check_url(worker.url)
    if not worker.model:
        raise UsageError(f"the worker {url} has no model name")
    if not (math.isfinite(worker.weight) and worker.weight > 0):
        raise UsageError(f"the worker {url} has the weight {worker.weight:g}: it must be more than 0")
    if wrong := wrong_with(said_of(worker)) or wrong_bootstrap(worker.bootstrap):
        raise UsageError(f"the worker {url}: {wrong}")
    clean: WorkerSettings = msgspec.structs.replace(worker, url=url, adapters=sorted(set(worker.adapters)))
    return clean


def checked_all(workers: Iterable[WorkerSettings]) -> tuple[WorkerSettings, ...]:
    """All of them, sorted; raises UsageError where one is wrong or two contradict each other."""
    found = sorted(map(checked, workers), key=lambda one: (one.url, one.model))
    for one, other in pairwise(found):
        if one.url != other.url:
            continue
        if one.model == other.model:
            raise UsageError(f"{one.model}={one.url} is there twice")
        if one.role != other.role:
            raise UsageError(f"{one.url} is there with two roles: {one.role} and {other.role}")
    return tuple(found)
