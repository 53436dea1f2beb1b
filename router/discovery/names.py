"""What models' names stand for, as a process keeps it that relays: hot, so that a request needs one look.

The control process asks the registry (``models``); a process that relays asks that one, with a message, at most once in
``AGAIN_S`` for each name that is in use, and goes by what it was told last. So a name that moves is followed within
``AGAIN_S`` of the control process' knowing it, nobody waits for that, and while the registry or the control process is
away the last answer counts. Only who asks for a name of which nothing is known yet has something to wait for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Literal

import msgspec

from helios.errors import HeliosError, NotFound, Retired, Unavailable
from router.discovery.models import Name, Resolution

AGAIN_S: Final = 1.0
"""How often a name is asked about again while clients use it, in seconds."""
KEEP_S: Final = 10.0
"""How long it counts that there is no such name, or no answer, in seconds; a commit counts until there is another."""
MOST: Final = 10_000
"""Names that the registry knows and that a process remembers..."""
MOST_OTHERS: Final = 1_000
"""...and others. They are apart, so that names that clients make up push none out that is in use."""


class Standing(msgspec.Struct, frozen=True):
    """What a name stands for, between processes: a ``Resolution``, or an error with ``message``."""

    commit: str = ""
    warning: str | None = None
    replacement: str | None = None
    error: Literal["", "unknown", "retired", "unavailable"] = ""
    message: str = ""

    def read(self, name: Name) -> Resolution | HeliosError:
        """What it says of the name."""
        if not self.error:
            return Resolution(name, self.commit, self.warning, self.replacement)
        kinds: dict[str, type[HeliosError]] = {"unknown": NotFound, "retired": Retired, "unavailable": Unavailable}
        return kinds[self.error](self.message)


def standing(answer: Resolution | HeliosError) -> Standing:
    """What ``Models`` says, to be sent."""
    if isinstance(answer, Resolution):
        return Standing(answer.commit, answer.warning, answer.replacement)
    kind: Literal["unknown", "retired", "unavailable"] = "unavailable"
    if isinstance(answer, NotFound | Retired):
        kind = "unknown" if isinstance(answer, NotFound) else "retired"
    return Standing(error=kind, message=answer.message)


class _Told:
    __slots__ = ("answer", "asked_at", "heard_at")

    def __init__(self, now: float) -> None:
        self.answer: Resolution | HeliosError | None = None
        self.asked_at, self.heard_at = now - AGAIN_S, now


class Names:
    """The names that one process uses; ``ask`` sends one to the control process, ``clock`` gives seconds."""

    def __init__(self, ask: Callable[[str], None], clock: Callable[[], float]) -> None:
        self._ask, self._clock = ask, clock
        self._known: OrderedDict[str, _Told] = OrderedDict()
        self._others: OrderedDict[str, _Told] = OrderedDict()

    def known(self, name: Name) -> Resolution | HeliosError | None:
        """What was told last; None: nothing yet. Has it asked about again, where that is time. One step."""
        text, now = str(name), self._clock()
        told = self._known.get(text)
        if told is not None:
            self._known.move_to_end(text)
        else:
            told = self._others.get(text)
            if told is None:
                told = self._put(self._others, MOST_OTHERS, text, _Told(now))
            elif now - told.heard_at >= KEEP_S:
                told.answer = None  # it may be another by now
            self._others.move_to_end(text)
        if now - told.asked_at >= AGAIN_S:
            told.asked_at = now
            self._ask(text)
        return told.answer

    def now(self, name: Name) -> Resolution | HeliosError | None:
        """What was told last, without asking."""
        told = self._known.get(str(name)) or self._others.get(str(name))
        return None if told is None else told.answer

    def told(self, text: str, answer: Standing) -> None:
        """The control process says what a name stands for. What nobody asked about here is not kept."""
        known = self._known.get(text)
        told = known or self._others.get(text)
        if told is None or (known is not None and answer.error == "unavailable"):
            return  # what was known counts
        told.answer, told.heard_at = answer.read(Name.parse(text)), self._clock()
        if (known is not None) is not (answer.error == ""):
            (self._others if known is None else self._known).pop(text)
            if answer.error:
                self._put(self._others, MOST_OTHERS, text, told)
            else:
                self._put(self._known, MOST, text, told)

    def _put(self, table: OrderedDict[str, _Told], most: int, text: str, told: _Told) -> _Told:
        table[text] = told
        if len(table) > most:
            table.popitem(last=False)
        return told
