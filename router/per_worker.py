"""A task for each worker, for as long as it is in the set."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from router.worker import Worker
from router.workers import Workers

Watch = Callable[[Worker], Coroutine[Any, Any, None]]


class _Tasks:
    """A ``Watcher`` that keeps one task a worker. Workers that drain have none: what they say changes nothing."""

    def __init__(self, group: asyncio.TaskGroup, watch: Watch) -> None:
        self._group, self._watch = group, watch
        self._tasks: dict[Worker, asyncio.Task[None]] = {}

    def joined(self, worker: Worker) -> None:
        self._tasks[worker] = self._group.create_task(self._watch(worker))

    def left(self, worker: Worker) -> None:
        self._tasks.pop(worker).cancel()

    def gone(self, worker: Worker) -> None:
        pass

    def end(self) -> None:
        for task in self._tasks.values():
            task.cancel()


@asynccontextmanager
async def watching(workers: Workers, watch: Watch) -> AsyncIterator[None]:
    """Run ``watch`` for every worker there is and for each that joins, while the context lasts."""
    async with asyncio.TaskGroup() as group:
        tasks = _Tasks(group, watch)
        workers.watch(tasks)
        try:
            yield
        finally:
            workers.unwatch(tasks)
            tasks.end()
