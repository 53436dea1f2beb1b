"""Models that are not up, in a process that relays: the control process wakes them, once for all such processes.

What goes to it is the list of models that requests wait for here, all of it, whenever it changes and again every
``AGAIN_S``: so one that takes over hears soon what is wanted, and one that was told nothing any more knows that nobody
waits. What comes back of a model is its progress, or why it can't be woken, which counts for ``RETRY_S`` in all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from router.admission.waking import RETRY_S

AGAIN_S: Final = 1.0
"""How often it is said again what is wanted, in seconds."""
FORGOTTEN_S: Final = 1.0
"""A model that nobody wanted for so long is wanted no more, in seconds: somebody who waits wants it each tick."""


class _Told:
    __slots__ = ("failed_at", "progress", "reason")

    def __init__(self, progress: str, reason: str, failed_at: float | None) -> None:
        self.progress, self.reason, self.failed_at = progress, reason, failed_at


class WakingElsewhere:
    """A ``Wakes``. ``say`` sends the list of models that are wanted; ``clock`` gives seconds, the machine's."""

    def __init__(self, say: Callable[[list[str]], None], clock: Callable[[], float]) -> None:
        self._say, self._clock = say, clock
        self._wanted: dict[str, float] = {}
        """When each was wanted last."""
        self._told: dict[str, _Told] = {}
        self._said_at = clock()
        self._changed = False

    def want(self, model: str) -> str | None:
        now, told = self._clock(), self._told.get(model)
        if told is not None and told.failed_at is not None:
            if now - told.failed_at < RETRY_S:
                return told.reason
            del self._told[model]
        new = model not in self._wanted
        self._wanted[model] = now
        if new:
            self.say_again()
        return None

    def progress(self, model: str) -> str:
        told = self._told.get(model)
        return "" if told is None else told.progress

    def reason(self, model: str) -> str:
        told = self._told.get(model)
        return "" if told is None else told.reason

    def tick(self, served: Callable[[str], bool]) -> None:
        now = self._clock()
        for model, at in list(self._wanted.items()):
            if now - at >= FORGOTTEN_S or served(model):
                del self._wanted[model]
                self._changed = True
        for model in [model for model in self._told if served(model)]:
            del self._told[model]
        if self._changed or (self._wanted and now - self._said_at >= AGAIN_S):
            self.say_again()

    def say_again(self) -> None:
        """Say what is wanted: to whoever it is that wakes models now."""
        self._said_at, self._changed = self._clock(), False
        self._say(list(self._wanted))

    def told(self, model: str, progress: str, reason: str, failed_at: float | None) -> None:
        """The control process says how far a model is; ``failed_at``: when it could not be woken, if that is so."""
        self._told[model] = _Told(progress, reason, failed_at)
        if failed_at is not None and self._wanted.pop(model, None) is not None:
            self._changed = True
