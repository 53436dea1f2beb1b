"""Where requests wait for a worker, as one process that relays sees it.

There are two: ``Here``, the queues of a process that is the only one to relay; and ``There`` (``line_there``), where
the control process has the queue of all processes together and says who is next.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

from router.admission.queue import Claim, FairQueue, Room, Ticket, Waiting
from router.worker import Worker


class Line(Protocol):
    """The queues of all models. ``room`` has what waits in this process."""

    room: Room

    def waits(self, model: str) -> bool:
        """Whether somebody waits for a worker of the model, in whatever process: nobody overtakes him."""
        ...

    def passed(self, model: str, claim: Claim) -> None:
        """Somebody did not have to wait."""
        ...

    def push(self, model: str, owner: Waiting, claim: Claim) -> Ticket:
        """Stand in the queue; ``owner`` is told what comes of it. Raises Full, or has him ``refused`` later."""
        ...

    def leave(self, model: str, ticket: Ticket) -> None:
        """Somebody of this process does not wait any more; nothing for one that has gone."""
        ...

    def ahead(self, model: str, ticket: Ticket) -> int:
        """How many are before him."""
        ...

    def waiting(self, model: str) -> int:
        """How many wait."""
        ...

    def retry_after_s(self, model: str, ahead: int) -> int:
        """When somebody with so many before him may expect a place, in whole seconds."""
        ...

    def freed(self, worker: Worker) -> None:
        """A worker has a request less."""
        ...

    def tick(self) -> None:
        """Some time has passed."""
        ...

    def models(self) -> list[str]:
        """Those for which somebody of this process waits."""
        ...

    def tickets(self, model: str) -> list[Ticket]:
        """All of this process who wait for the model."""
        ...


class Here:
    """A ``Line``: this process decides. ``free``: whether a worker of a model may get another request now; ``most``:
    how many of a model may wait; ``noted``: hears of each new queue; ``clock`` gives seconds."""

    def __init__(
        self, room: Room, free: Callable[[str], bool], most: Callable[[str], float],
        noted: Callable[[str, FairQueue], None], clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self.room, self._free, self._most, self._noted, self._clock = room, free, most, noted, clock
        self._queues: dict[str, FairQueue] = {}
        self._serving = False

    def queue(self, model: str) -> FairQueue:
        queue = self._queues.get(model)
        if queue is None:
            queue = self._queues[model] = FairQueue(self.room, self._clock, partial(self._most, model))
            self._noted(model, queue)
        return queue

    def waits(self, model: str) -> bool:
        queue = self._queues.get(model)
        return queue is not None and len(queue) > 0

    def passed(self, model: str, claim: Claim) -> None:
        self.queue(model).passed(claim)

    def push(self, model: str, owner: Waiting, claim: Claim) -> Ticket:
        return self.queue(model).push(owner, claim)

    def leave(self, model: str, ticket: Ticket) -> None:
        self.queue(model).leave(ticket)

    def ahead(self, model: str, ticket: Ticket) -> int:
        return self.queue(model).ahead(ticket)

    def waiting(self, model: str) -> int:
        return len(self.queue(model))

    def retry_after_s(self, model: str, ahead: int) -> int:
        return self.queue(model).retry_after_s(ahead)

    def freed(self, worker: Worker) -> None:
        if self.room.requests:
            for model in worker.names | worker.pinned:
                self._serve(model)

    def tick(self) -> None:
        for model in self.models():
            self._serve(model)

    def models(self) -> list[str]:
        if not self.room.requests:
            return []
        return [model for model, queue in self._queues.items() if len(queue)]

    def tickets(self, model: str) -> list[Ticket]:
        queue = self._queues.get(model)
        return [] if queue is None else queue.tickets()

    def _serve(self, model: str) -> None:
        """Call those who wait, while there is room."""
        queue = self._queues.get(model)
        if queue is None or self._serving:  # who is called may give its worker back at once
            return
        self._serving = True
        try:
            while len(queue) and self._free(model):
                ticket = queue.pop()
                assert ticket is not None
                ticket.owner.called()
        finally:
            self._serving = False
