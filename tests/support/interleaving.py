"""Several processes that share memory, one access at a time, in an order that is chosen; any may die between two.

A process is a thread that stops before each access of the memory until it is told to go on. So only one runs at a
time, and the order is the test's.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any


class Killed(BaseException):
    """The process ends here."""


class Stage:
    """Runs processes; ``deaths``: how likely one dies at an access."""

    def __init__(self, seed: int, deaths: float = 0.0) -> None:
        self._random, self._deaths = random.Random(seed), deaths
        self._turn = threading.Semaphore(0)
        self._local = threading.local()
        self.dead: list[int] = []
        """Those that were killed, by number, in order."""

    def step(self) -> None:
        """Called before each access; outside of ``run`` it does nothing."""
        actor: _Actor | None = getattr(self._local, "actor", None)
        if actor is None:
            return
        self._turn.release()
        actor.go.acquire()
        if actor.killed:
            raise Killed

    def run(self, *processes: Callable[[], None]) -> None:
        """Until all have ended or died. What one raises is raised here."""
        actors = [_Actor(number, process) for number, process in enumerate(processes)]
        for actor in actors:
            actor.thread = threading.Thread(target=self._play, args=(actor,), daemon=True)
            actor.thread.start()
            self._turn.acquire()
        while alive := [actor for actor in actors if not actor.over]:
            actor = self._random.choice(alive)
            actor.killed = self._random.random() < self._deaths
            actor.go.release()
            self._turn.acquire()
        for actor in actors:
            assert actor.thread is not None
            actor.thread.join()
            if actor.killed:
                self.dead.append(actor.number)
            if actor.error is not None:
                raise actor.error

    def _play(self, actor: _Actor) -> None:
        self._local.actor = actor
        try:
            self.step()
            actor.process()
            actor.killed = False
        except Killed:
            pass
        except BaseException as error:
            actor.killed, actor.error = False, error
        actor.over = True
        self._turn.release()


class _Actor:
    """One process."""

    def __init__(self, number: int, process: Callable[[], None]) -> None:
        self.number, self.process = number, process
        self.go = threading.Semaphore(0)
        self.thread: threading.Thread | None = None
        self.over = self.killed = False
        self.error: BaseException | None = None


class Watched:
    """A sequence of words each access of which is a step."""

    def __init__(self, stage: Stage, words: Any) -> None:
        self._stage, self._words = stage, words

    def __len__(self) -> int:
        return len(self._words)

    def __getitem__(self, number: int) -> Any:
        self._stage.step()
        return self._words[number]

    def __setitem__(self, number: int, value: Any) -> None:
        self._stage.step()
        self._words[number] = value

    def __iter__(self) -> Iterator[Any]:
        for number in range(len(self._words)):
            self._stage.step()
            yield self._words[number]


class WatchedCells:
    """A ``router.resilience.cells.Cells`` of which each access is a step."""

    def __init__(self, stage: Stage, cells: Any) -> None:
        self._stage, self._cells = stage, cells
        self.ints, self.floats = Watched(stage, cells.ints), Watched(stage, cells.floats)

    def mine(self, column: int) -> int:
        self._stage.step()
        word: int = self._cells.mine(column)
        return word

    def put(self, column: int, value: int) -> None:
        self._stage.step()
        self._cells.put(column, value)

    def every(self, column: int) -> Iterable[int]:
        return iter(Watched(self._stage, self._cells.every(column)))

    def note(self) -> None:
        self._stage.step()
        self._cells.note()
