"""Requests that a model will get, from what the same time of the week has brought. Online, a few kilobytes a model.

A seasonal-naive forecast with levels in the manner of Holt and Winters (Hyndman and Athanasopoulos, Forecasting:
Principles and Practice, 3rd edition, 5.2 and 8.3), on counts of requests in bins of a quarter of an hour:

- **season** (``season``): the rate of each of the 672 bins of a week, recent weeks first, and, where few requests make
  that uncertain, of each bin of a day and each day of a week;
- **level**: requests that came beside those that the season expected, of the last days and of the last hour. Counts are
  added up with some of the expected ones on either side (Gamma and Poisson are conjugate), so that a few requests more
  or less of a model that gets few mean little;
- **company** (``company``): whether requests come in sessions. What wakes a model is a request out of silence;
- **spread**: how far bins were from what was forecast for them, beyond the chance that is in any count.

Requests in flight are requests a second by the time each takes (Little). What was missed, because nobody looked, is
left out and stands for nothing. It judges itself: it is trusted when it has seen enough, and its forecasts were not
worse than to expect of each bin what the bin before has brought.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

import msgspec

from helios.decoding import from_json
from orchestrator.scaling.company import Habits
from orchestrator.scaling.outlook import Expected, Outlook
from orchestrator.scaling.season import BIN_S, Season
from orchestrator.scaling.settings import ForecastSettings

VERSION: Final = 1
GAP_S: Final = 300.0
"""After so long without a look nothing is said about what was between, in seconds."""
COVERED: Final = 0.5
"""Part of a bin that must have been seen for it to count."""
SHORT_S, LONG_S, SPREAD_S = 1800.0, 2 * 86_400.0, 14 * 86_400.0
"""How long the short level, the long one with the judgement, and the spread and the time of a request go back."""
FADES_S: Final = 3600.0
"""How long the short level is expected to last."""
FIRST_S: Final = 86_400.0
"""It is judged from the second day on."""
PRIOR: Final = 5.0
"""Expected requests on either side of a level."""
LEVELS: Final = (0.2, 5.0)
"""What a level can be."""
SPREAD, SPREADS = 0.3, (0.1, 1.0)
"""The spread to begin with, and what it can be, as a part of what is expected."""
WORSE: Final = 1.5
"""It may be so much worse than the last bin: that one is hard to beat for what changes slowly, and late when it counts.
"""


class _Sums(msgspec.Struct):
    """What is remembered of the past, older things less."""

    short_came: float = 0.0
    short_due: float = 0.0
    long_came: float = 0.0
    long_due: float = 0.0
    spread: float = 0.0
    weight: float = 0.0
    off: float = 0.0
    """How far forecasts were from what came..."""
    naive_off: float = 0.0
    """...and how far the bin before was."""
    busy_s: float = 0.0
    """Seconds that requests took, and how many there were."""
    busy: float = 0.0
    seen_s: float = 0.0
    """How long was looked altogether, in seconds."""


class _Record(msgspec.Struct):
    version: int
    season: bytes
    sums: _Sums
    looked_at: float
    number: int
    came: float
    covered_s: float
    due: float
    last: float
    habits: Habits = msgspec.field(default_factory=Habits)


class Forecast:
    """One model's. ``observe`` at each look, in order; ``outlook`` when it is asked."""

    def __init__(self, settings: ForecastSettings) -> None:
        self._settings = settings
        self._season = Season(settings.timezone)
        self._sums, self._habits = _Sums(), Habits()
        self._looked_at = -math.inf
        self._number = -1
        """The bin now, counted from 1970 on."""
        self._came = self._covered_s = 0.0
        self._due = -1.0
        """What was forecast for this bin when it began; -1: nothing."""
        self._last = -1.0
        """What came in the bin before; -1: not known."""
        self._ahead: dict[int, float] = {}
        self._spread, self._doubt = SPREAD, ""
        self._judged()

    def observe(self, now: float, arrivals: int | None, in_flight: int | None) -> None:
        """``arrivals``: since the look before; ``in_flight``: at workers, now. ``now``: Unix seconds; a look that is
        older than the last one is left out."""
        elapsed, self._looked_at = now - self._looked_at, max(now, self._looked_at)
        number = int(now // BIN_S)
        if elapsed <= 0:
            return
        if elapsed <= GAP_S and arrivals is not None:
            self._habits.observe(elapsed, arrivals, lambda: self.rate(now, now))
            before = min(elapsed, max(0.0, number * BIN_S - (now - elapsed)))  # of the time looked at, in an older bin
            if number != self._number:
                self._came += arrivals * before / elapsed
                self._covered_s += before
                self._end(number)
                arrivals_here, here = arrivals * (1 - before / elapsed), elapsed - before
            else:
                arrivals_here, here = float(arrivals), elapsed
            self._came += arrivals_here
            self._covered_s += here
            self._sums.seen_s += elapsed
            if in_flight is not None:
                kept = math.exp(-elapsed / SPREAD_S)
                self._sums.busy_s = self._sums.busy_s * kept + in_flight * elapsed
                self._sums.busy = self._sums.busy * kept + arrivals
        else:
            self._habits.missed()
            if number != self._number:
                self._end(number)

    def outlook(self, now: float, lead_s: float) -> Outlook:
        """What is expected until ``lead_s`` from now, and until nodes that are told now have the model and ``lead_s``
        has passed."""
        soon_at = now + lead_s
        later_at = soon_at + self._settings.prefetch_s
        first, last = math.ceil(now / BIN_S - 0.5), math.floor(later_at / BIN_S - 0.5)
        middles = [(number + 0.5) * BIN_S for number in range(first, last + 1)]
        soon = self._most((now, soon_at, *(at for at in middles if at < soon_at)), now)
        later = self._most((later_at, *(at for at in middles if at >= soon_at)), now)
        return Outlook(
            soon=self._expected(soon), later=self._expected(max(soon, later)),
            trusted=not self._doubt, why=self._doubt,
        )  # fmt: skip

    @property
    def takes_s(self) -> float:
        """How long a request takes, in seconds."""
        return self._sums.busy_s / self._sums.busy if self._sums.busy >= 1 else 0.0

    def rate(self, at: float, now: float) -> float:
        """Requests a second that are expected at a time."""
        return self._most((at,), now)

    def _most(self, times: Iterable[float], now: float) -> float:
        """The most that is expected at these times; between the middles of two bins it goes straight."""
        sums, most = self._sums, 0.0
        short = _level(sums.short_came, sums.short_due) - 1
        for at in times:
            number = math.floor(at / BIN_S - 0.5)
            part = at / BIN_S - 0.5 - number
            base = self._seasonal(number) * (1 - part) + self._seasonal(number + 1) * part
            most = max(most, base * (1 + short * math.exp((now - at) / FADES_S)))
        return most * _level(sums.long_came, sums.long_due)

    def _expected(self, rate: float) -> Expected:
        mean = rate * self.takes_s
        return Expected(
            mean + self._settings.margin * math.sqrt(mean + (self._spread * mean) ** 2), rate, self._habits.company
        )

    def _judged(self) -> None:
        """What follows from the sums for the next bin."""
        sums, needed = self._sums, self._settings.history_s
        self._spread = min(SPREADS[1], max(SPREADS[0], _root((sums.spread + SPREAD**2) / (sums.weight + 1))))
        self._doubt = ""
        if sums.seen_s < needed:
            self._doubt = f"{sums.seen_s / 3600:.0f} of {needed / 3600:.0f} hours seen"
        elif sums.off > WORSE * sums.naive_off:
            self._doubt = "it was lately worse than to expect that all stays as it is"

    def _seasonal(self, number: int) -> float:
        """The season's rate in a bin, kept while that does not change."""
        found = self._ahead.get(number)
        if found is None:
            found = self._ahead[number] = self._season.rate(number)
        return found

    def _end(self, number: int) -> None:
        """The bin now is over: learn from it, and begin another."""
        seen = self._number >= 0 and self._covered_s >= COVERED * BIN_S
        if seen:
            came = self._came * BIN_S / self._covered_s
            if self._due >= 0:
                self._judge(came)
            self._season.learn(self._number, came / BIN_S)
        self._last = self._came * BIN_S / self._covered_s if seen and number == self._number + 1 else -1.0
        self._number, self._came, self._covered_s = number, 0.0, 0.0
        self._ahead.clear()
        self._judged()
        start = number * BIN_S
        self._due = self.rate(start + BIN_S / 2, start) * BIN_S if self._season.days else -1.0

    def _judge(self, came: float) -> None:
        """Levels, spread and the comparison with the bin before, after a bin for which there was a forecast."""
        sums, due = self._sums, self._due
        season = self._seasonal(self._number) * BIN_S
        long = _level(sums.long_came, sums.long_due)
        short_kept, long_kept, kept = (math.exp(-BIN_S / past_s) for past_s in (SHORT_S, LONG_S, SPREAD_S))
        sums.short_came = sums.short_came * short_kept + came
        sums.short_due = sums.short_due * short_kept + season * long
        sums.long_came = sums.long_came * long_kept + came
        sums.long_due = sums.long_due * long_kept + season
        if due > 0:
            sums.spread = sums.spread * kept + min(4.0, ((came - due) ** 2 - due) / due**2) * min(1.0, due / 10)
            sums.weight = sums.weight * kept + min(1.0, due / 10)
        if self._last >= 0 and sums.seen_s >= FIRST_S:
            sums.off = sums.off * long_kept + abs(came - due)
            sums.naive_off = sums.naive_off * long_kept + abs(came - self._last)

    # --- to be kept ---

    def encode(self) -> bytes:
        """As JSON, some 5 kB; settings are not in it."""
        return msgspec.json.encode(
            _Record(
                VERSION, self._season.encode(), self._sums, self._looked_at, self._number, self._came,
                self._covered_s, self._due, self._last, self._habits,
            )
        )  # fmt: skip

    @classmethod
    def decode(cls, data: bytes | str, settings: ForecastSettings) -> Forecast:
        """What ``encode`` made; one that knows nothing where that can't be read, or is of another version."""
        made = cls(settings)
        try:
            record = from_json(data, _Record)
        except msgspec.DecodeError:
            return made
        if record.version == VERSION and made._season.restore(record.season):
            made._sums, made._looked_at, made._number = record.sums, record.looked_at, record.number
            made._habits = record.habits
            made._came, made._covered_s, made._due, made._last = (
                record.came, record.covered_s, record.due, record.last,
            )  # fmt: skip
            made._judged()
        return made


def _root(square: float) -> float:
    return math.sqrt(max(0.0, square))


def _level(came: float, due: float) -> float:
    return min(LEVELS[1], max(LEVELS[0], (came + PRIOR) / (due + PRIOR)))
