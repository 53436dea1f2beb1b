"""What the policy remembers of one model and role between two looks: small, immutable, and JSON.

Whoever scales keeps it where the next one finds it (a status, a ConfigMap), so that a restart takes nothing down. What
can't be read is as good as none: then what is there stays until the windows have filled. Times are Unix seconds.
"""

from __future__ import annotations

from typing import Final

import msgspec

from helios.decoding import from_json

VERSION: Final = 1
MOST: Final = 128
"""Entries that a window has at most."""

Step = tuple[float, int]
"""When, and how many replicas."""


class State(msgspec.Struct, frozen=True, kw_only=True):
    """See above; ``State.fresh`` is where it begins."""

    at: float
    """The last look."""
    replicas: int
    ready: int
    """What there was then."""
    demand_at: float
    """When there was last a request, or no telling whether there was one."""
    downs: tuple[Step, ...] = ()
    """What it may go down to: the most that was asked for from each time on; numbers fall."""
    ups: tuple[Step, ...] = ()
    """What it may go up to: the least that was asked for from each time on; numbers rise."""
    changes: tuple[Step, ...] = ()
    """Since when there have been how many, as long as the limits of speed go back."""
    woken_at: float | None = None
    """When the first replica was asked for, while there are any..."""
    ready_at: float | None = None
    """...and when one was ready."""
    strain: float = 1.0
    """Part of the load aimed at with which objectives of latency are kept, as far as was seen; 0 to 1."""
    moved_at: float
    """When the number of replicas, or of ready ones, was last seen to change."""
    begun: tuple[float, ...] = ()
    """When those that are starting were asked for."""
    startups: tuple[float, ...] = ()
    """How long the last starts took, in seconds."""

    @classmethod
    def fresh(cls, now: float, replicas: int, ready: int) -> State:
        """Nothing is known but what is there, so that stays until the windows have filled."""
        here: tuple[Step, ...] = ((now, replicas),)
        since = now if replicas else None
        return cls(
            at=now, replicas=replicas, ready=ready, demand_at=now, moved_at=now, downs=here, ups=here,
            changes=here, woken_at=since, ready_at=since if ready else None,
        )  # fmt: skip


class _Record(msgspec.Struct, frozen=True):
    version: int
    state: State


def encode(state: State) -> bytes:
    """As JSON, a few hundred bytes."""
    return msgspec.json.encode(_Record(VERSION, state))


def decode(data: bytes | str) -> State | None:
    """What ``encode`` made; None where it is of another version, or damaged."""
    try:
        record = from_json(data, _Record)
    except msgspec.DecodeError:
        return None
    return record.state if record.version == VERSION else None


def falling(steps: tuple[Step, ...], now: float, value: int, since: float) -> tuple[Step, ...]:
    """A window whose first entry is the most of all that was put in since ``since``."""
    kept = [step for step in steps if step[0] >= since and step[1] > value]
    if len(kept) >= MOST:  # two become one that lasts as long as the later: longer rather than shorter
        kept[-2:] = [(kept[-1][0], kept[-2][1])]
    return (*kept, (now, value))


def rising(steps: tuple[Step, ...], now: float, value: int, since: float) -> tuple[Step, ...]:
    """A window whose first entry is the least of all that was put in since ``since``."""
    kept = [step for step in steps if step[0] >= since and step[1] < value]
    if len(kept) >= MOST:
        kept[-2:] = [(kept[-1][0], kept[-2][1])]
    return (*kept, (now, value))
