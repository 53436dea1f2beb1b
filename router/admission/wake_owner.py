"""Who wakes models for all processes: the control process, once for each model.

It has of each data process the list of models that requests wait for there. A model is woken when it stands in one of
them for the first time, and on, with or without somebody who waits. It is up when a worker takes its requests and no
process waits for one any more: a process may know that a worker hangs which for all others is up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from router.admission.waking import Waking

SILENT_S: Final = 10.0
"""What a process has not said again for so long does not count any more, in seconds."""

Tell = Callable[[str, str, str, float | None], None]
"""Tells all: a model, its progress, why it can't be woken and since when that is so (None: it is not so)."""


class WakeOwner:
    """One router's. ``served``: whether a worker takes requests of a model now; ``clock`` is the machine's."""

    def __init__(self, waking: Waking, served: Callable[[str], bool], tell: Tell, clock: Callable[[], float]) -> None:
        self._waking, self._served, self._tell, self._clock = waking, served, tell, clock
        self._wanted: dict[int, tuple[frozenset[str], float]] = {}
        """By process, and when it said so."""
        waking.changed = self._changed

    def wanted(self, member: int, models: Sequence[str]) -> None:
        """A process says which models its requests wait for: these, and no others."""
        self._wanted[member] = frozenset(models), self._clock()
        for model in models:
            if self._waking.want(model) is not None:
                self._changed(model)  # whoever asks now has not heard of it

    def gone(self, member: int) -> None:
        """A process has ended."""
        self._wanted.pop(member, None)

    def tick(self) -> None:
        """Some time has passed."""
        since = self._clock() - SILENT_S
        for member in [member for member, (_, at) in self._wanted.items() if at < since]:
            del self._wanted[member]
        self._waking.tick(lambda model: self._served(model) and not self._wants(model))

    def deposed(self) -> None:
        """Another control process does it from now on."""
        self._wanted.clear()
        self._waking.stop()

    def _wants(self, model: str) -> bool:
        return any(model in models for models, _ in self._wanted.values())

    def _changed(self, model: str) -> None:
        waking = self._waking
        self._tell(model, waking.progress(model), waking.reason(model), waking.failed_at(model))
