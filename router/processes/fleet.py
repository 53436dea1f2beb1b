"""The workers as the administration sees them, in the control process: which has no requests itself, only the board."""

from __future__ import annotations

from collections.abc import Callable, Collection

from helios.errors import NotFound
from router.resilience.guard import Guard
from router.workers import Worker, Workers, check_url


class Fleet:
    """A ``router.fleet.Fleet``, of workers whose load is ``Watched``.

    ``changed`` hears of a worker that is cordoned, or is so no more."""

    def __init__(self, workers: Workers, changed: Callable[[Worker], None]) -> None:
        self._workers, self._changed = workers, changed
        self._departed: dict[str, Worker] = {}
        """Those that no source names any more, by URL; data processes may have requests there."""
        workers.watch(self)

    @property
    def all(self) -> Collection[Worker]:
        return self._workers.all

    @property
    def draining(self) -> Collection[Worker]:
        self._departed = {url: worker for url, worker in self._departed.items() if worker.in_flight}
        return self._departed.values()

    def cordon(self, url: str) -> None:
        """Give the worker no new requests until ``uncordon``; raises NotFound."""
        self._set_cordon(url, True)

    def uncordon(self, url: str) -> None:
        self._set_cordon(url, False)

    def joined(self, worker: Worker) -> None:
        self._departed.pop(worker.url, None)

    def left(self, worker: Worker) -> None:
        pass

    def gone(self, worker: Worker) -> None:
        """It is gone here at once, since no request is this process's."""
        worker.guard = Guard(worker.url)  # what was held against it says nothing any more
        self._departed[worker.url] = worker

    def _set_cordon(self, url: str, cordoned: bool) -> None:
        url = check_url(url)
        departed = self._departed.get(url)
        if departed is not None:
            departed.cordoned = cordoned  # it gets no new requests anyway
            return
        worker = self._workers.at(url)
        if worker is None:
            raise NotFound(f"no worker has the URL {url}")
        (self._workers.cordon if cordoned else self._workers.uncordon)(url)
        self._changed(worker)
