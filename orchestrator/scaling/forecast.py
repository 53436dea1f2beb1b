"""Requests that a model will get, from what the same time of the week has brought. Online, a few kilobytes a model.

A seasonal-naive forecast with levels in the manner of Holt and Winters (Hyndman and Athanasopoulos, Forecasting:
Principles and Practice, 3rd edition, 5.2 and 8.3), on counts of requests in bins of a quarter of an hour:

- **season** (``season``): the rate of each of the 672 bins of a week, recent weeks first, and, where few requests make
  that uncertain, of each bin of a day and each day of a week;
- **level**: requests that came beside those that the season expected, of the last days and of the last hour. Counts are
  added up with some of the expected ones on either side (Gamma and Poisson are conjugate), so that a few requests more
  or less of a model that gets few mean little;
- **spread**: how far bins were from what was forecast for them, beyond the chance that is in any count.

Requests in flight are requests a second by the time each takes (Little). What was missed, because nobody looked, is
left out and stands for nothing. It judges itself: it is trusted when it has seen enough, and its forecasts were not
worse than to expect of each bin what the bin before has brought.
"""

from __future__ import annotations

import math
from typing import Final

import msgspec

from helios.decoding import from_json
from orchestrator.scaling.outlook import Expected, Outlook
from orchestrator.scaling.season import BIN_S, Season
from orchestrator.scaling.settings import ForecastSettings

VERSION: Final = 1
GAP_S: Final = 300.0
"""After so long without a look nothing is said about what was between, in seconds."""
COVERED: Final = 0.5
"""Part of a bin that must have been seen for it to count."""
HOURS_S, DAYS_S, MONTHS_S = 2700.0, 2 * 86_400.0, 14 * 86_400.0
"""How long the short level, the long one with the judgement, and the spread and the time of a request go back."""
PRIOR: Final = 5.0
"""Expected requests on either side of a level."""
LEVELS: Final = (0.2, 5.0)
"""What a level can be."""
SPREAD, SPREADS = 0.3, (0.1, 1.0)
"""The spread to begin with, and what it can be, as a part of what is expected."""
WORSE: Final = 1.1
"""It may be so much worse than the last bin, which is no reason yet to do without."""


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


class Forecast:
    """One model's. ``observe`` at each look, in order; ``outlook`` when it is asked."""

    def __init__(self, settings: ForecastSettings) -> None:
        self._settings = settings
        self._season = Season(settings.timezone)
        self._sums = _Sums()
        self._looked_at = -math.inf
        self._number = -1
        """The bin now, counted from 1970 on."""
        self._came = self._covered_s = 0.0
        self._due = -1.0
        """What was forecast for this bin when it began; -1: nothing."""
        self._last = -1.0
        """What came in the bin before; -1: not known."""
        self._ahead: dict[int, float] = {}

    def observe(self, now: float, arrivals: int | None, in_flight: int | None) -> None:
        """``arrivals``: since the look before; ``in_flight``: at workers, now. ``now``: Unix seconds; a look that is
        older than the last one is left out."""
        elapsed, self._looked_at = now - self._looked_at, max(now, self._looked_at)
        number = int(now // BIN_S)
        if elapsed <= 0:
            return
        if elapsed <= GAP_S and arrivals is not None:
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
                kept = math.exp(-elapsed / MONTHS_S)
                self._sums.busy_s = self._sums.busy_s * kept + in_flight * elapsed
                self._sums.busy = self._sums.busy * kept + arrivals
        elif number != self._number:
            self._end(number)

    def outlook(self, now: float, lead_s: float) -> Outlook:
        """What is expected until ``lead_s`` from now, and until nodes that are told now have the model and ``lead_s``
        has passed."""
        return Outlook(
            soon=self._most(now, lead_s),
            later=self._most(now, lead_s + self._settings.prefetch_s),
            trusted=not (why := self._doubt()),
            why=why,
        )

    @property
    def takes_s(self) -> float:
        """How long a request takes, in seconds."""
        return self._sums.busy_s / self._sums.busy if self._sums.busy >= 1 else 0.0

    def rate(self, at: float, now: float) -> float:
        """Requests a second that are expected at a time."""
        number, part = divmod(at / BIN_S - 0.5, 1.0)
        base = self._seasonal(int(number)) * (1 - part) + self._seasonal(int(number) + 1) * part
        short = _level(self._sums.short_came, self._sums.short_due)
        return base * self._long() * (1 + (short - 1) * math.exp(-max(0.0, at - now) / HOURS_S))

    def _most(self, now: float, ahead_s: float) -> Expected:
        times = [now, now + ahead_s]
        first = math.ceil(now / BIN_S - 0.5)
        times += [(number + 0.5) * BIN_S for number in range(first, int((now + ahead_s) / BIN_S + 0.5))]
        rate = max(self.rate(at, now) for at in times)
        mean = rate * self.takes_s
        spread = self._spread()
        return Expected(mean + self._settings.margin * math.sqrt(mean + (spread * mean) ** 2), rate)

    def _doubt(self) -> str:
        needed = self._settings.history_s
        if self._sums.seen_s < needed:
            return f"{self._sums.seen_s / 3600:.0f} of {needed / 3600:.0f} hours seen"
        if self._sums.off > WORSE * self._sums.naive_off:
            return "it was lately worse than to expect that all stays as it is"
        return ""

    def _spread(self) -> float:
        measured = (self._sums.spread + SPREAD**2) / (self._sums.weight + 1)
        return min(SPREADS[1], max(SPREADS[0], math.sqrt(max(0.0, measured))))

    def _long(self) -> float:
        return _level(self._sums.long_came, self._sums.long_due)

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
        start = number * BIN_S
        self._due = self.rate(start + BIN_S / 2, start) * BIN_S if self._season.days else -1.0

    def _judge(self, came: float) -> None:
        """Levels, spread and the comparison with the bin before, after a bin for which there was a forecast."""
        sums, due = self._sums, self._due
        season = self._seasonal(self._number) * BIN_S
        long = self._long()
        short_kept, long_kept, kept = (math.exp(-BIN_S / past_s) for past_s in (HOURS_S, DAYS_S, MONTHS_S))
        sums.short_came = sums.short_came * short_kept + came
        sums.short_due = sums.short_due * short_kept + season * long
        sums.long_came = sums.long_came * long_kept + came
        sums.long_due = sums.long_due * long_kept + season
        if due > 0:
            sums.spread = sums.spread * kept + min(4.0, ((came - due) ** 2 - due) / due**2) * min(1.0, due / 10)
            sums.weight = sums.weight * kept + min(1.0, due / 10)
        if self._last >= 0:
            sums.off = sums.off * long_kept + abs(came - due)
            sums.naive_off = sums.naive_off * long_kept + abs(came - self._last)

    # --- to be kept ---

    def encode(self) -> bytes:
        """As JSON, some 5 kB; settings are not in it."""
        return msgspec.json.encode(
            _Record(
                VERSION, self._season.encode(), self._sums, self._looked_at, self._number, self._came,
                self._covered_s, self._due, self._last,
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
            made._came, made._covered_s, made._due, made._last = (
                record.came, record.covered_s, record.due, record.last,
            )  # fmt: skip
        return made


def _level(came: float, due: float) -> float:
    return min(LEVELS[1], max(LEVELS[0], (came + PRIOR) / (due + PRIOR)))
