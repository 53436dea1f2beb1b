"""The document of ``GET /demand``: what was counted, beside what the workers do and say at this moment."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from helios.demand import Demand, Model, Reading, Role
from router.demand.book import Book, Sum, answers_of, waiting_of
from router.worker import Worker
from router.worker_metrics import WorkerMetrics
from router.workers import Workers

WANTED_S: Final = 60.0
"""After a look at the demand workers are asked for their metrics for so long, in seconds."""


class Shown:
    """One router's. ``max_age_s``: how old readings of workers may be; ``clock``: the machine's, in seconds."""

    def __init__(
        self, book: Book, workers: Workers, max_age_s: float, clock: Callable[[], float],
        draining: Callable[[], bool],
    ) -> None:  # fmt: skip
        self.book, self._workers, self._max_age_s = book, workers, max_age_s
        self._clock, self._draining = clock, draining
        self._looked_at = -WANTED_S
        self.over = False
        """Whether nothing will be known any more: whoever watches is to leave."""

    @property
    def wanted(self) -> bool:
        """Whether somebody has looked lately, for whom workers are asked for their metrics."""
        return self._clock() - self._looked_at < WANTED_S

    def end(self) -> None:
        """This process ends."""
        self.over = True
        self.book.pulse.beat()

    def document(self) -> Demand:
        """What it is now."""
        now = self._looked_at = self._clock()
        sums, nothing = self.book.sums(), Sum()
        served: dict[str, list[Worker]] = {}
        for worker in (*self._workers.all, *self._workers.draining):
            for name in worker.names:
                served.setdefault(name, []).append(worker)
        models = tuple(
            self._model(name, sums.get(name, nothing), served.get(name, []), now) for name in sorted({*sums, *served})
        )
        return Demand(self.book.epoch, self.book.complete, self._draining(), models)

    def _model(self, name: str, counted: Sum, workers: Iterable[Worker], now: float) -> Model:
        groups: dict[tuple[str, str], list[Worker]] = {}
        for worker in workers:
            groups.setdefault((worker.role, worker.revision), []).append(worker)
        return Model(
            name,
            counted.requests,
            round(max(0.0, now - counted.last_at), 3) if counted.last_at > 0 else None,
            None if counted.queued is None else waiting_of(counted.queued, now),
            tuple(self._role(groups[key], now) for key in sorted(groups)),
            tuple(answers_of(counted.ended[revision]) for revision in sorted(counted.ended)),
        )

    def _role(self, workers: list[Worker], now: float) -> Role:
        first = workers[0]
        return Role(
            first.role,
            first.revision,
            sum(not worker.draining for worker in workers),
            sum(_takes(worker) for worker in workers),
            sum(worker.load.requests for worker in workers),
            sum(worker.load.tokens for worker in workers),
            sum(worker.load.prefill for worker in workers),
            tuple(
                _reading(worker.url, read, now)
                for worker in workers if (read := worker.fresh_metrics(now, self._max_age_s)) is not None
            ),
        )  # fmt: skip


def _takes(worker: Worker) -> bool:
    return worker.up and not (worker.draining or worker.cordoned or worker.unready) and worker.guard.admits()


def _reading(url: str, read: WorkerMetrics, now: float) -> Reading:
    apart = round(read.new_gap_sum_s / read.new_gaps, 6) if read.new_gaps else None
    return Reading(
        url,
        round(max(0.0, now - read.at), 3),
        read.running,
        read.waiting,
        round(read.kv_usage, 4),
        read.new_gaps,
        apart,
    )
