"""Models that are not up: one call to wake each, however many wait for it, and what is heard of its progress.

    asleep -> waking -> up
                 \\-> failed (for RETRY_S) -> asleep

Who wakes is a ``Waker``: the operator's hook (``wake_hook``), or whatever starts a worker. A call goes on until the
model is up or the longest wait is over, with or without somebody who waits: a model that is half loaded is loaded.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final, Protocol

log = logging.getLogger("helios.router")

RETRY_S: Final = 10.0
"""After a failure a model is not woken again for so long, in seconds."""

Report = Callable[[str], None]


class WakeFailed(Exception):
    """The model can't be brought up; the text says why."""


class Waker(Protocol):
    """Brings models up."""

    async def wake(self, model: str, report: Report) -> None:
        """Have the model started; ``report`` takes what is known of its progress, in words.

        May return when that was asked for, or go on until it is cancelled, which happens when a worker is up.
        Raises WakeFailed."""
        ...


class Wakes(Protocol):
    """Has models woken for whoever waits for them: ``Waking``, or a process that asks the one that does it."""

    def want(self, model: str) -> str | None:
        """Somebody needs the model: it is being woken from now on. Why not, where that failed a moment ago."""
        ...

    def progress(self, model: str) -> str:
        """What was heard last; "" for nothing."""
        ...

    def reason(self, model: str) -> str:
        """Why it could not be woken a moment ago; "" where that is not so."""
        ...

    def tick(self, served: Callable[[str], bool]) -> None:
        """Some time has passed; ``served``: whether a worker takes requests of a model now."""
        ...


class _Wake:
    __slots__ = ("began", "failed_at", "progress", "reason", "task")

    def __init__(self, now: float) -> None:
        self.began = now
        self.progress = self.reason = ""
        self.failed_at: float | None = None
        self.task: asyncio.Task[None] | None = None


class Waking:
    """The models being woken. ``spawn`` starts a task of the router's; ``clock`` gives seconds."""

    def __init__(
        self, waker: Waker, spawn: Callable[[str], asyncio.Task[None]], clock: Callable[[], float], longest_s: float
    ) -> None:
        self._waker, self._spawn, self._clock, self._longest_s = waker, spawn, clock, longest_s
        self._wakes: dict[str, _Wake] = {}
        self.ended: Callable[[str, str], None] = lambda model, result: None
        """Told of each end: up, failed."""
        self.changed: Callable[[str], None] = lambda model: None
        """Hears of a model's progress, and of its failure."""

    def want(self, model: str) -> str | None:
        """Somebody needs the model: it is being woken from now on. Why not, where that failed a moment ago."""
        wake = self._wakes.get(model)
        if wake is not None and wake.failed_at is not None:
            if self._clock() - wake.failed_at < RETRY_S:
                return wake.reason
            wake = None
        if wake is None:
            wake = self._wakes[model] = _Wake(self._clock())
            wake.task = self._spawn(model)
        return None

    def up(self, model: str) -> None:
        """A worker of the model is up."""
        wake = self._wakes.pop(model, None)
        if wake is not None and wake.failed_at is None:
            if wake.task is not None:
                wake.task.cancel()
            self.ended(model, "up")
            log.info("a model is up", extra={"model": model, "seconds": round(self._clock() - wake.began, 1)})

    def progress(self, model: str) -> str:
        """What was heard last; "" for nothing."""
        wake = self._wakes.get(model)
        return "" if wake is None else wake.progress

    def reason(self, model: str) -> str:
        """Why it could not be woken a moment ago; "" where that is not so."""
        wake = self._wakes.get(model)
        return wake.reason if wake is not None and wake.failed_at is not None else ""

    def failed_at(self, model: str) -> float | None:
        """When it could not be woken, in the clock's seconds; None where that is not so."""
        wake = self._wakes.get(model)
        return None if wake is None else wake.failed_at

    def models(self) -> list[str]:
        """Those that were asked for and are not up yet."""
        return list(self._wakes)

    def tick(self, served: Callable[[str], bool]) -> None:
        """Some time has passed; ``served``: whether a worker takes requests of a model now."""
        for model in self.models():
            if served(model):
                self.up(model)

    def stop(self) -> None:
        """Give all calls up."""
        for wake in self._wakes.values():
            if wake.task is not None:
                wake.task.cancel()
        self._wakes.clear()

    async def call(self, model: str) -> None:
        """One call: what ``spawn`` runs."""
        wake = self._wakes[model]
        log.info("a model is woken", extra={"model": model})

        def report(text: str) -> None:
            if wake.progress != text:
                wake.progress = text
                self.changed(model)

        try:
            async with asyncio.timeout(self._longest_s):
                await self._waker.wake(model, report)
                await asyncio.Event().wait()  # until it is up
        except TimeoutError:
            self._failed(model, wake, f"it was not up after {self._longest_s:g} s")
        except WakeFailed as error:
            self._failed(model, wake, str(error))
        except Exception:  # a defect of the waker's must not end the router
            log.exception("waking a model failed", extra={"model": model})
            self._failed(model, wake, "the router could not ask for it; its log says why")

    def _failed(self, model: str, wake: _Wake, reason: str) -> None:
        wake.failed_at, wake.reason = self._clock(), reason
        self.ended(model, "failed")
        self.changed(model)
        log.warning("a model can't be woken", extra={"model": model, "reason": reason})
