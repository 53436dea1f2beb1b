"""Which failures had to be, and which requests were lost.

By docs/router.md ("Retries", "When an answer breaks off") a request may fail for its client only where

- a worker broke off inside the answer, after its first byte: the stream is cut, and the client notices;
- a worker broke off, or sent no HTTP, after it had the request and before the first byte, and the request is a
  generation, which is not done twice;
- a worker stopped to listen while the connection was still in its queue (``UNREAD``, rare), which looks like one that
  has begun, to whoever has sent a generation;
- the process of the router that had it was killed.

Everything else is lost: there is always a worker that serves. The journal of the workers says who had a request and
whose answer was spoiled, the timeline who was killed. Two workers that have had one generation are a fault as well,
unless the first said that it did not take it (503), or died, or closed a kept connection within a second ("stale").
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.support.chaos.fleet import Timeline
from tests.support.chaos.load import Asked, End

BEFORE_S: Final = 0.5
"""That a process was killed may come through so long afterwards, to requests that began meanwhile."""
UNREAD: Final = "a generation was in the queue of a worker that stopped to listen"


@dataclass
class Journal:
    """What the workers wrote: ``SLOT.LIFE`` of each that had a request, and of each that spoiled its answer."""

    takers: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    spoilers: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    @classmethod
    def read(cls, path: Path) -> Journal:
        journal = cls()
        with path.open() as lines:
            for line in lines:
                what, identity, slot, life = line.split()
                if what == "t":
                    journal.takers[identity].append(f"{slot}.{life}")
                else:
                    journal.spoilers[identity].add(f"{slot}.{life}")
        return journal


@dataclass
class Verdict:
    """``allowed``: failures by their reason. ``lost``: those without one, in words."""

    right: Counter[str] = field(default_factory=Counter)
    """By kind."""
    allowed: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    """Generations that two workers had without need."""


def judge(
    asked: Iterable[Asked], journal: Journal, timeline: Timeline, not_taken: Iterable[str], verdict: Verdict
) -> None:
    """Add these requests to the verdict. ``not_taken``: workers (``SLOT.LIFE``) that have answered 503 at some time."""
    excused = set(not_taken) | set(timeline.workers)
    for one in asked:
        takers, spoilers = journal.takers.get(one.identity, []), journal.spoilers.get(one.identity, set())
        if one.end in (End.RIGHT, End.LEFT):
            verdict.right[one.kind] += 1
        elif reason := why(one, takers, spoilers, timeline):
            verdict.allowed[reason] += 1
        else:
            verdict.lost.append(f"{one}, at {takers or 'no worker'}")
        extra = [taker for taker in takers[:-1] if taker not in excused]
        if not one.repeatable and (len(extra) > 1 or not spoilers.issuperset(extra)):
            verdict.twice.append(f"{one}, at {takers}")


def why(one: Asked, takers: list[str], spoilers: set[str], timeline: Timeline) -> str:
    """Why the failure is allowed; empty: it is not."""
    router_died = any(_within(one, when) for when in timeline.routers)
    if one.end is End.BROKEN:
        return "the router's process was killed" if router_died else ""
    if one.end is End.CUT:
        if one.worker in spoilers:
            return "cut after the first byte: the worker broke off"
        if one.worker in timeline.workers and _within(one, timeline.workers[one.worker]):
            return "cut after the first byte: the worker was killed"
        return "cut: the router's process was killed" if router_died else ""
    if one.end is End.ERROR and one.status == 502 and not one.repeatable:
        if takers and takers[-1] in spoilers:
            return "a generation was at a worker that broke off"
        # Whoever is killed may have had it unread.
        last = {takers[-1]} if takers else timeline.workers.keys()
        if any(_within(one, timeline.workers[worker]) for worker in last if worker in timeline.workers):
            return "a generation was at a worker that was killed"
        if takers and any(_within(one, when) for when in timeline.workers.values()):
            return "a generation went on to a worker that was killed before it read it"
        if not takers and any(_within(one, when) for when in timeline.refusals):
            return UNREAD
    return ""


def _within(one: Asked, when: float) -> bool:
    return one.began - BEFORE_S <= when <= one.ended
