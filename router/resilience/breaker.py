"""Circuit breaker of one worker, for all processes of a router.

    CLOSED --failures in a row, or their share in a window--> OPEN --its time is over--> HALF_OPEN
    HALF_OPEN --successes in a row--> CLOSED, --one failure--> OPEN, for longer

M. Nygard, Release It!, "Circuit Breaker". The time in OPEN doubles with each opening, up to a most, and gets a random
part on top, so that the routers of a fleet do not all come back to a worker at once. HALF_OPEN lets a few requests
through at a time, all of one process. An opening long after the last one starts again with the shortest time.

What a request reports counts only in the period in which it was sent (a period ends when the breaker opens or closes):
a hundred requests that were under way when a worker failed say once that it failed, not a hundred times. Requests may
be sent while the breaker is open, where there is no better worker; their successes close it as those of probes do.

All of it is in ``Cells``, so each process goes by what any has found. Periods have numbers, even ones while the breaker
is closed; that of the present one is written last, so a process that dies in between has changed nothing yet. HALF_OPEN
is not written at all: it is an open breaker whose time is over. Who probes is a count in the process's own column,
which is cleared when it dies. What two processes do within the same microsecond they may do both: each sends a probe,
each opens it (which is the same as once).
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Final

from helios.config import BreakerSettings
from router.resilience.cells import (
    PHASE,
    PROBING,
    ROW,
    SINCE,
    SLOTS,
    STREAK,
    SUCCESSES,
    UNTIL,
    WINDOW,
    Cells,
    LocalCells,
    add,
    counted,
    total,
)

_OPENINGS: Final = 8
"""Bits of ``PHASE`` below the period: how often it opened without a good time in between."""
_MOST_OPENINGS: Final = 30
_COUNT: Final = 18
"""Bits of a count in a part of the window: the number of the part, requests, failures."""
_MASK: Final = (1 << _COUNT) - 1
_NUMBERS: Final = 1 << (64 - 2 * _COUNT)


class State(Enum):
    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class Window:
    """Requests and failures of the last ``seconds``, to a tenth of that. ``clock`` gives seconds."""

    __slots__ = ("_cells", "_clock", "_width")

    def __init__(self, seconds: float, clock: Callable[[], float], cells: Cells) -> None:
        self._width, self._clock, self._cells = seconds / SLOTS, clock, cells

    def add(self, failed: bool) -> None:
        number = int(self._clock() / self._width)
        column = WINDOW + number % SLOTS
        word = self._cells.mine(column)
        if word >> 2 * _COUNT != number % _NUMBERS:
            word = number % _NUMBERS << 2 * _COUNT
        if word >> _COUNT & _MASK < _MASK:
            self._cells.put(column, word + (1 << _COUNT) + failed)

    def totals(self, since: float) -> tuple[int, int]:
        """Requests, and those of them that failed: of all processes, and of the parts that began after ``since``."""
        now = int(self._clock() / self._width)
        requests = failures = 0
        for number in range(max(now - SLOTS, int(since / self._width)) + 1, now + 1):
            for word in self._cells.every(WINDOW + number % SLOTS):
                if word >> 2 * _COUNT == number % _NUMBERS:
                    requests += word >> _COUNT & _MASK
                    failures += word & _MASK
        return requests, failures


class Breaker:
    """One worker's breaker. ``clock`` gives seconds since the machine began, ``random`` numbers from 0 to 1.

    Processes that share the ``cells`` share the clock.
    """

    __slots__ = ("_cells", "_clock", "_enabled", "_random", "_settings", "_window")

    def __init__(
        self, settings: BreakerSettings, clock: Callable[[], float], random: Callable[[], float],
        cells: Cells | None = None,
    ) -> None:  # fmt: skip
        self._settings, self._clock, self._random, self._enabled = settings, clock, random, settings.enabled
        self._cells = LocalCells() if cells is None else cells
        self._window = Window(settings.window_s, clock, self._cells)

    @property
    def closed(self) -> bool:
        """Whether nothing is held back; always, where the configuration leaves breakers out."""
        return not self._enabled or not self._period & 1

    @property
    def state(self) -> State:
        if self.closed:
            return State.CLOSED
        return State.HALF_OPEN if self._clock() >= self.until else State.OPEN

    @property
    def since(self) -> float:
        """When it opened or closed last; 0 where it never did."""
        return self._cells.floats[SINCE]

    @property
    def until(self) -> float:
        """When an open breaker lets probes through."""
        return self._cells.floats[UNTIL]

    @property
    def _period(self) -> int:
        return self._cells.ints[PHASE] >> _OPENINGS

    def allows(self) -> bool:
        """Whether a request may go now; ``enter`` counts it."""
        if self.closed:
            return True
        if self._clock() < self.until:
            return False
        period = self._period
        mine = counted(self._cells.mine(PROBING), period)
        return mine < self._settings.probes and total(self._cells, PROBING, period) == mine

    def enter(self) -> int:
        """A request goes, whether it was allowed or not; ``leave`` is called once with the number returned."""
        period = self._period
        if self._enabled and period & 1:
            add(self._cells, PROBING, period, 1)
        return period

    def leave(self, period: int, ok: bool | None) -> bool:
        """The request is over: well, badly, or (None) without saying anything. True when the state changed by it."""
        phase = self._cells.ints[PHASE]
        if not self._enabled or period != phase >> _OPENINGS:
            return False
        if not period & 1:
            return ok is not None and self._fails(ok) and self._open(phase)
        add(self._cells, PROBING, period, -1)
        if ok:
            add(self._cells, SUCCESSES, period, 1)
            return total(self._cells, SUCCESSES, period) >= self._settings.successes and self._close(phase)
        return ok is False and self.state is State.HALF_OPEN and self._open(phase)

    def wake(self) -> None:
        """Let probes through now, if it is open."""
        now = self._clock()
        if not self.closed and self.until > now:
            self._cells.floats[UNTIL] = now

    def _fails(self, ok: bool) -> bool:
        """Count a request of a closed breaker; whether there are too many failures."""
        self._window.add(not ok)
        ints = self._cells.ints
        streak = ints[STREAK]  # its lowest bit: whether it has a failure
        if ok:
            if streak & 1:
                ints[STREAK] = streak + 1
            return False
        add(self._cells, ROW, streak >> 1, 1)
        if not streak & 1:
            ints[STREAK] = streak | 1
        if total(self._cells, ROW, streak >> 1) >= self._settings.failures:
            return True
        requests, failed = self._window.totals(self.since)
        return requests >= self._settings.min_requests and failed >= requests * self._settings.failure_ratio

    def _open(self, phase: int) -> bool:
        """From whichever state; of the words the period comes last."""
        settings, now, floats = self._settings, self._clock(), self._cells.floats
        period, openings = phase >> _OPENINGS, phase & ((1 << _OPENINGS) - 1)
        if not period & 1 and now - self.since >= settings.window_s:
            openings = 0
        seconds: float = min(settings.max_open_s, settings.open_s * 2.0**openings)
        seconds *= 1 + settings.jitter * self._random()
        if self._cells.ints[PHASE] != phase:
            return False  # another process has done so
        floats[UNTIL] = now + seconds
        floats[SINCE] = now
        self._begin(period + 1 | 1, min(openings + 1, _MOST_OPENINGS))
        return True

    def _close(self, phase: int) -> bool:
        ints = self._cells.ints
        if ints[PHASE] != phase:
            return False
        ints[STREAK] = (ints[STREAK] | 1) + 1
        self._cells.floats[SINCE] = self._clock()
        self._begin((phase >> _OPENINGS) + 1, phase & ((1 << _OPENINGS) - 1))
        return True

    def _begin(self, period: int, openings: int) -> None:
        """A new period."""
        self._cells.ints[PHASE] = period << _OPENINGS | openings
        self._cells.note()
