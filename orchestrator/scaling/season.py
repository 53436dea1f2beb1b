"""How many requests a second a model gets at each time of a week: by its own bins, and by those of a day.

A bin of the week has been seen once a week, with what chance there is in it; a model that gets five requests in an hour
says little by that. So a bin counts with its neighbours, and beside it the day's: the rate of this bin in all days,
by that of this day of the week in all bins. The more requests were counted, the more the week's own bins weigh.

Time is a zone's: habits follow clocks on walls. When those are set, the bins move along, and the hour that comes twice,
or not at all, is an hour like others.
"""

from __future__ import annotations

from array import array
from datetime import datetime
from typing import Final
from zoneinfo import ZoneInfo

BIN_S: Final = 900.0
DAY: Final = 96
WEEK: Final = 7 * DAY
EPOCH: Final = 3 * DAY
"""1970-01-01 was a Thursday; weeks begin on Monday."""
NEW_WEEK, NEW_DAY = 0.4, 0.25
"""Weight of the last week, and of the last day, beside those before."""
NEAR: Final = (0.15, 0.2, 0.3, 0.2, 0.15)
"""Weights of a bin and its neighbours."""
SURE: Final = 20.0
"""Requests in those bins with which week and day weigh alike."""


class Season:
    """What was learnt, in two arrays. Unseen bins are negative."""

    def __init__(self, timezone: str) -> None:
        self._zone = ZoneInfo(timezone)
        self._week = array("f", [-1.0] * WEEK)
        self._day = array("f", [-1.0] * DAY)
        self._days = array("f", [-1.0] * 7)
        """Mean rate of each day of the week, beside that of all."""
        self._today = array("f", [0.0] * 4)
        """Which day was learnt last, the sum of its rates and of those that the day's bins had, and bins learnt."""
        self._offset: tuple[int, int] = (-1, 0)

    @property
    def days(self) -> bool:
        """Whether there is anything to go by."""
        return self._today[3] > 0

    def learn(self, number: int, rate: float) -> None:
        """The rate in a bin, counted from 1970 on."""
        slot = self._slot(number)
        day, bin_ = divmod(slot, DAY)
        old = self._week[slot]
        self._week[slot] = rate if old < 0 else old + NEW_WEEK * (rate - old)
        if day != int(self._today[0]):
            self._close(int(self._today[0]))
            self._today[0] = day
        usual = self._day[bin_]
        if usual >= 0:
            self._today[1] += rate
            self._today[2] += usual
        # the day's bins are those of an average day: what is usual for this day of the week is taken out
        factor = self._factor(day)
        plain = rate / factor
        self._day[bin_] = plain if usual < 0 else usual + NEW_DAY * min(1.0, factor) * (plain - usual)
        self._today[3] += 1

    def rate(self, number: int) -> float:
        """Requests a second in a bin."""
        slot = self._slot(number)
        day, bin_ = divmod(slot, DAY)
        own, weights, by_day, day_weights = 0.0, 0.0, 0.0, 0.0
        for index, weight in enumerate(NEAR):
            value = self._week[(slot + index - 2) % WEEK]
            if value >= 0:
                own, weights = own + weight * value, weights + weight
            value = self._day[(bin_ + index - 2) % DAY]
            if value >= 0:
                by_day, day_weights = by_day + weight * value, day_weights + weight
        daily = by_day / day_weights * self._factor(day) if day_weights else 0.0
        if not weights:
            return daily
        own /= weights
        counted = max(own, daily) * BIN_S * weights / max(NEAR)
        sure = counted / (counted + SURE) if day_weights else 1.0
        return sure * own + (1 - sure) * daily

    def _factor(self, day: int) -> float:
        value = self._days[day]
        if value < 0:  # a first Saturday: as far as it has come
            today, came, usual, _ = self._today
            value = came / usual if day == int(today) and usual > 0 else 1.0
        return min(5.0, max(0.05, value))

    def _close(self, day: int) -> None:
        """A day is over."""
        came, usual = self._today[1], self._today[2]
        if usual > 0:
            ratio, old = came / usual, self._days[day]
            self._days[day] = ratio if old < 0 else old + NEW_WEEK * (ratio - old)
        self._today[1] = self._today[2] = 0.0

    def _slot(self, number: int) -> int:
        hour = number // 4
        if hour != self._offset[0]:
            offset = datetime.fromtimestamp(hour * 3600.0, self._zone).utcoffset()
            self._offset = (hour, round(offset.total_seconds() / BIN_S) if offset else 0)
        return (number + self._offset[1] + EPOCH) % WEEK

    def encode(self) -> bytes:
        """A bit more than 3 kB."""
        return b"".join(part.tobytes() for part in (self._week, self._day, self._days, self._today))

    def restore(self, data: bytes) -> bool:
        """Take on what ``encode`` made; False where it has another size."""
        parts = (self._week, self._day, self._days, self._today)
        whole = array("f")
        if len(data) != sum(len(part) * part.itemsize for part in parts):
            return False
        whole.frombytes(data)
        if not all(value >= -1.0 and value < 1e9 for value in whole):
            return False
        at = 0
        for part in parts:
            part[:] = whole[at : at + len(part)]
            at += len(part)
        return True
