"""Token buckets (J. Turner, IEEE Communications Magazine 10/1986; ITU-T I.371): how much may be used, of requests and
of tokens, for each key, tenant and model.

A bucket holds at most what a minute brings (``limit``), and ``limit`` / 60 flows in each second. A request takes from
all buckets that concern it or from none. Its tokens are known at its end only, so an estimate is taken first and the
difference settled then: what was not used comes back, what was used beyond is owed, and paid before others pass. So
over any window of T seconds no more is taken than ``limit`` * (1 + T / 60), whatever the order of things; an answer
beyond its estimate is the one way past that, by what the next ones wait for.

Several processes share their buckets without a lock. Let T be what was ever taken, R the rate, and X = T - R * now: it
falls while nothing is taken, and is least when the bucket is full. So with M, the least X there ever was, the level is
``limit`` - (X - M). T is the sum of a number for each process, which only that one writes; M the least of such. So no
step is lost, and a process that dies leaves nothing half done. Two that decide within the same microsecond don't see
each other's taking, but do with the next: together they let through at most what the bucket allows and one request more
for each further process, however long it goes on. What one had estimated for answers under way when it died stays
taken.

Where the shared memory has no room for one more bucket each process keeps one with its part of the limit. A request
that costs more than such a part takes a full bucket, and what is owed then is paid before others pass.

Everything is synchronous: in a process a check and the taking are one step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final, Literal, Protocol

from router import errors
from router.admission.sums import Sums, alone
from router.errors import ApiError

MINUTE_S: Final = 60.0
MAX_BUCKETS: Final = 20_000
"""Above so many, buckets that are full again are dropped: a new one starts full, too."""
ROUNDING_S: Final = 1e-8
"""Who would have to wait for less does not: so exact are the numbers when the machine has run for years."""

Unit = Literal["requests", "tokens"]


class Charge:
    """What a request takes of one bucket. ``name`` is whose it is ("tenant acme"), ``limit`` for each minute."""

    __slots__ = ("amount", "limit", "name", "unit")

    def __init__(self, name: str, unit: Unit, limit: float, amount: float) -> None:
        self.name, self.unit, self.limit, self.amount = name, unit, limit, amount


class Refusal:
    """Why nothing was taken: the charge that has to wait longest, and how long that is, in seconds."""

    __slots__ = ("charge", "wait_s")

    def __init__(self, charge: Charge, wait_s: float) -> None:
        self.charge, self.wait_s = charge, wait_s


class Keeper(Protocol):
    """Where something was taken, and is settled."""

    def settle(self, charges: Sequence[Charge]) -> None:
        """Correct what was taken: amounts may be below 0, which gives back."""
        ...


Done = Callable[[ApiError | None, Keeper], None]
"""Told once: None when all was taken, else why nothing was; and by whom."""


class Limits(Keeper, Protocol):
    """Keeps buckets."""

    def take(self, charges: Sequence[Charge], done: Done) -> None:
        """Take all or nothing. ``done`` is called at once, or later where somebody else has to be asked."""
        ...


def refusal_error(refusal: Refusal) -> ApiError:
    charge = refusal.charge
    return errors.limit_reached(charge.name, charge.unit, charge.limit, max(1, math.ceil(refusal.wait_s)))


class Bucket:
    """One bucket. ``now`` is in seconds, 0 or more, on a clock that all who share the ``sums`` go by."""

    __slots__ = ("_low", "_rate", "_slot", "_slots", "_taken", "limit")

    def __init__(self, limit: float, sums: Sums) -> None:
        self.limit, self._rate = limit, limit / MINUTE_S
        self._taken, self._low, self._slot, self._slots = sums.taken, sums.low, sums.slot, len(sums.taken)

    def level(self, now: float) -> float:
        """What may be taken; below 0 while something is owed. It is noted when that is all that the bucket holds."""
        # First all that was taken, then the least, which only falls: read late it lets through less, never more.
        # In loops, since sum() and min() over a view of memory take three times as long.
        taken, lows, others = self._taken, self._low, range(1, self._slots)
        total = taken[0]
        for slot in others:
            total += taken[slot]
        above, low = total - self._rate * now, lows[0]
        for slot in others:
            low = min(low, lows[slot])
        if above < low:
            low = lows[self._slot] = above
        return self.limit - (above - low)

    def take(self, amount: float) -> None:
        """Whether it is there or not; below 0: give back."""
        self._taken[self._slot] += amount

    def settle(self, amount: float, now: float) -> None:
        """Take or give back, whatever the level is: it was last looked at a while ago, and is where it is lowest."""
        if amount > 0:
            self.level(now)  # what flowed in until now counts
            self.take(amount)
        else:
            self.take(amount)
            self.level(now)  # it does not get more than full

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until so much may be taken, by what is known now; 0 or less: at once."""
        return (amount - self.level(now)) / self._rate


class LocalLimits:
    """The buckets of the processes of one router. ``clock`` gives seconds, the same to all of them.

    ``sums``: where a bucket is kept, by its name; None where there is no room, so each of ``processes`` has a part.
    """

    def __init__(
        self, clock: Callable[[], float], processes: int = 1, sums: Callable[[str], Sums | None] | None = None
    ) -> None:
        self._clock, self._processes, self._sums = clock, processes, sums or (lambda name: alone())
        self._buckets: dict[tuple[str, Unit, float], Bucket] = {}
        self._look_at = MAX_BUCKETS

    def take(self, charges: Sequence[Charge], done: Done) -> None:
        refusal = self.try_take(charges)
        done(None if refusal is None else refusal_error(refusal), self)

    def try_take(self, charges: Sequence[Charge]) -> Refusal | None:
        """Take all, or nothing and say why."""
        now = self._clock()
        self._make_room(now)
        refusal: Refusal | None = None
        buckets: list[Bucket] = []
        for charge in charges:
            bucket, amount = self._bucket(charge), charge.amount
            buckets.append(bucket)
            wait_s = bucket.wait_s(amount if amount < bucket.limit else bucket.limit, now)
            if wait_s > ROUNDING_S and (refusal is None or wait_s > refusal.wait_s):
                refusal = Refusal(charge, wait_s)
        if refusal is None:
            for number, bucket in enumerate(buckets):
                bucket.take(charges[number].amount)
        return refusal

    def settle(self, charges: Sequence[Charge]) -> None:
        now = self._clock()
        for charge in charges:
            self._bucket(charge).settle(charge.amount, now)

    def _bucket(self, charge: Charge) -> Bucket:
        key = charge.name, charge.unit, charge.limit
        bucket = self._buckets.get(key)
        if bucket is None:
            sums = self._sums(f"{charge.unit} {charge.limit!r} {charge.name}")
            part = charge.limit / self._processes
            bucket = Bucket(part, alone()) if sums is None else Bucket(charge.limit, sums)
            self._buckets[key] = bucket
        return bucket

    def _make_room(self, now: float) -> None:
        if len(self._buckets) >= self._look_at:
            # A full one is as good as new, and one that is shared is found again.
            self._buckets = {key: one for key, one in self._buckets.items() if one.level(now) < one.limit}
            self._look_at = max(MAX_BUCKETS, 2 * len(self._buckets))
