"""Models that are waited for, in a router of several processes: one process has the flights, the others are told.

A process that relays answers at once from what it was told last, and asks the one that has the flights at most once in
``AGAIN_S`` for each model, which is also how that one knows that the model is still wanted. What goes between them is a
model's name, which is answered with what ``Availability.want`` returns, and every ``Progress`` that
``Availability.changed`` hears; msgspec writes and reads both.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from router.discovery.models import Name
from router.discovery.progress import Phase, Progress

AGAIN_S: Final = 1.0
"""How often a model is asked for again while clients ask for it, in seconds."""
ENDED_S: Final = 10.0
"""How long what became of a model counts, where nothing was heard of it since, in seconds."""
MOST: Final = 1_000
"""Models that a process remembers."""


@dataclass(slots=True)
class _Told:
    progress: Progress
    asked_at: float
    heard_at: float


class Awaited:
    """In a process that relays: ``ask`` sends a model's name to the process that has the flights."""

    def __init__(self, ask: Callable[[str], None], clock: Callable[[], float]) -> None:
        self._ask, self._clock = ask, clock
        self._known: OrderedDict[str, _Told] = OrderedDict()

    def want(self, model: str) -> Progress:
        """A client asks for a model that no worker serves; see ``Availability.want``. Raises InvalidInput."""
        now, told = self._clock(), self._known.get(model)
        if told is None:
            Name.parse(model)
            told = self._known[model] = _Told(Progress(model), now - AGAIN_S, now)
            if len(self._known) > MOST:
                self._known.popitem(last=False)
        elif told.progress.ended and now - told.heard_at >= ENDED_S:
            told.progress = Progress(model)  # it may be another by now
        self._known.move_to_end(model)
        if now - told.asked_at >= AGAIN_S:
            told.asked_at = now
            self._ask(model)
        return told.progress

    def now(self, model: str) -> Progress | None:
        """What was told last, without asking; None: the model is not awaited here."""
        told = self._known.get(model)
        return None if told is None else told.progress

    def told(self, progress: Progress) -> None:
        """The other process says how far a model is. What nobody asked for here is not kept."""
        told = self._known.get(progress.model)
        if told is None:
            return
        if progress.phase is Phase.SERVED:
            del self._known[progress.model]
        else:
            told.progress, told.heard_at = progress, self._clock()
