"""What all replicas of the router say, together: sums of what adds up, and what is not known kept apart from 0.

No I/O: whoever asks the routers (``routers``) tells what came (``told``, ``holds``), and what did not (``silent``). A
replica that is expected and was not heard for ``stale_s`` is unknown: the sums are without it and ``partial``; with no
replica at all there are no sums. What a router says of itself as incomplete counts, and makes them partial as well.

Counts that only grow are followed by replica and epoch, and added up here, so that what came and went between two looks
is not missed. An epoch that is new may hold requests that were counted before: of these only that there was one since
the look before is taken (``idle_s``), as one.

A model has a name, and its requests may ask for ``name@revision``: these are the name's as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from helios.demand import Answers, Demand, Line, Model, Reading, Role, Waiting
from orchestrator.signals.window import Outcomes, Window, between

MOST_AWAY: Final = 1000
"""Replicas that are gone of which is known when they were heard last."""
MOST_MODELS: Final = 20_000
"""Models whose counts are kept, at the most: those asked for last."""


@dataclass(slots=True)
class _Replica:
    """What is known of one."""

    demand: Demand | None = None
    at: float = 0.0
    line: Line | None = None
    line_at: float = 0.0

    def models(self) -> Iterator[Model]:
        return iter(()) if self.demand is None else iter(self.demand.models)

    def waiting(self, names: Collection[str]) -> Iterator[Waiting]:
        """What waits of these models: as the stream says, while there is one and it is the newer one."""
        if self.line is not None and self.line_at >= self.at:
            yield from (one.waiting for one in self.line.held if name_of(one.model) in names)
        else:
            yield from (one.waiting for one in self.models() if one.waiting and name_of(one.model) in names)


class Load(NamedTuple):
    """The load of some models, of one role and revision of their workers if these were given.

    ``held``, ``held_tokens``: at routers, whatever the role and revision; ``oldest_s``: how long the first has waited;
    ``ready``: workers that get requests; ``readings``: one of each worker that could be asked, the freshest."""

    held: int
    held_tokens: int
    oldest_s: float
    asleep: bool
    """Some of what is held waits because no worker is up."""
    in_flight: int
    tokens: int
    ready: int
    readings: tuple[Reading, ...]
    age_s: float
    """Of the oldest of what was summed, in seconds."""
    partial: bool

    @property
    def read(self) -> bool:
        """Whether every ready worker could be asked."""
        return len(self.readings) >= self.ready


class Collector:
    """Used on one event loop. ``clock`` gives seconds; ``window_s``: how long outcomes are remembered."""

    def __init__(self, clock: Callable[[], float], *, stale_s: float, window_s: float) -> None:
        self._clock, self._stale_s, self._window_s = clock, stale_s, window_s
        self._replicas: dict[str, _Replica] = {}
        self._expected: frozenset[str] = frozenset()
        self._totals: dict[tuple[str, str], int] = {}
        """Requests of a replica's model, as it said last in its epoch..."""
        self._answers: dict[tuple[str, str, str], Answers] = {}
        """...and what became of them, by revision."""
        self._requests: Counter[str] = Counter()
        self._last: dict[str, float] = {}
        """When a request of a model came last, as far as that was heard."""
        self._windows: dict[tuple[str, str], Window] = {}
        self._looked_at = clock()
        self._away: dict[str, float] = {}
        """When replicas that are not expected any more were heard last: one may come again."""
        self.noted: Callable[[], None] = lambda: None
        """Called when what is known may be another thing."""

    # --- what comes ---

    def expect(self, replicas: Collection[str]) -> None:
        """These replicas there are, and no others: of one that is gone nothing counts any more."""
        self._expected = frozenset(replicas)
        for replica in self._replicas.keys() - self._expected:
            if (gone := self._replicas.pop(replica)).demand is not None:
                self._away.pop(replica, None)
                self._away[replica] = gone.at
        while len(self._away) > MOST_AWAY:
            del self._away[next(iter(self._away))]
        self._totals = {key: one for key, one in self._totals.items() if key[0] in self._expected}
        self._answers = {key: one for key, one in self._answers.items() if key[0] in self._expected}
        self.noted()

    def told(self, replica: str, demand: Demand) -> None:
        """A replica's whole document."""
        if replica not in self._expected:
            return
        now, one = self._clock(), self._replicas.setdefault(replica, _Replica())
        before = one.at if one.demand is not None else self._away.pop(replica, self._looked_at)
        anew = one.demand is None or one.demand.epoch != demand.epoch
        if anew:
            self._totals = {key: known for key, known in self._totals.items() if key[0] != replica}
            self._answers = {key: known for key, known in self._answers.items() if key[0] != replica}
        for model in demand.models:
            self._count(replica, model, now, before, anew=anew)
        one.demand, one.at = demand, now
        if one.line is not None and one.line.epoch != demand.epoch:
            one.line = None
        self.noted()

    def holds(self, replica: str, line: Line) -> bool:
        """Who waits at a replica now. Whether that is another thing than before: then its document is old."""
        if replica not in self._expected:
            return False
        one = self._replicas.setdefault(replica, _Replica())
        before = one.line
        one.line, one.line_at = line, self._clock()
        same = before is not None and _who(before) == _who(line) and before.epoch == line.epoch
        if not same:
            for held in line.held:
                self._last[name_of(held.model)] = one.line_at
            self.noted()
        return not same

    def silent(self, replica: str) -> None:
        """A replica's stream has ended: what it said is in its next document."""
        if (one := self._replicas.get(replica)) is not None:
            one.line = None

    def _count(self, replica: str, model: Model, now: float, before: float, *, anew: bool) -> None:
        """``anew``: counts have begun in another epoch than the last ones, which were made ``before``."""
        name, key = name_of(model.model), (replica, model.model)
        if anew:
            came = int(model.idle_s is not None and now - model.idle_s > before)
        else:
            came = max(0, model.requests_total - self._totals.get(key, 0))
        self._totals[key] = model.requests_total
        self._requests[name] += came
        if model.idle_s is not None:
            self._last[name] = max(self._last.get(name, 0.0), now - model.idle_s)
        for answers in model.answers:
            its = replica, model.model, answers.revision
            old = self._answers.get(its) or _nothing(answers)
            self._answers[its] = answers
            if not anew:
                window = self._windows.setdefault((name, answers.revision), Window(self._window_s))
                window.add(now, between(old, answers))
        if len(self._requests) > MOST_MODELS:
            self._forget()

    def _forget(self) -> None:
        name = min(self._requests, key=lambda one: self._last.get(one, 0.0))
        del self._requests[name]
        self._last.pop(name, None)
        for key in [key for key in self._windows if key[0] == name]:
            del self._windows[key]

    # --- what is known ---

    @property
    def models(self) -> set[str]:
        """Names that routers have said anything of."""
        found = {name_of(model.model) for one in self._replicas.values() for model in one.models()}
        return found | {name_of(held.model) for one in self._replicas.values() if one.line for held in one.line.held}

    @property
    def unheard(self) -> list[str]:
        """Replicas of which nothing is known now, sorted."""
        return sorted(self._expected - {replica for replica, _ in self._fresh()})

    def load(self, names: Collection[str], role: str = "", revision: str = "") -> Load | None:
        """Now; None: nothing is known. ``role``, ``revision``: of these workers; "": of all."""
        now, fresh = self._clock(), list(self._fresh())
        if not fresh:
            return None
        held = tokens = flying = flying_tokens = ready = 0
        oldest_s, asleep = 0.0, False
        readings: dict[str, Reading] = {}
        for _, one in fresh:
            for waiting in one.waiting(names):
                held, tokens = held + waiting.requests, tokens + waiting.tokens
                oldest_s, asleep = max(oldest_s, waiting.oldest_s), asleep or waiting.what == "worker"
            here = 0
            for part in _roles(one, names, role, revision):
                flying, flying_tokens = flying + part.in_flight, flying_tokens + part.tokens
                here += part.ready
                for reading in part.readings:
                    if reading.url not in readings or reading.age_s < readings[reading.url].age_s:
                        readings[reading.url] = reading
            ready = max(ready, here)
        partial = len(fresh) < len(self._expected) or not all(one.demand and one.demand.complete for _, one in fresh)
        age_s = now - min(one.at for _, one in fresh)
        found = tuple(readings[url] for url in sorted(readings))
        return Load(held, tokens, oldest_s, asleep, flying, flying_tokens, ready, found, age_s, partial)

    def requests(self, names: Collection[str]) -> int:
        """Requests that have come, those included that are gone again. It only grows."""
        return sum(self._requests[name] for name in names)

    def idle_s(self, names: Collection[str]) -> float | None:
        """Since the last request came, in seconds; None: none has, as far as is known."""
        found = [self._last[name] for name in names if name in self._last]
        return max(0.0, self._clock() - max(found)) if found else None

    def outcomes(self, names: Collection[str], revision: str = "", length_s: float | None = None) -> Outcomes:
        """What became of the requests of the last ``length_s`` seconds (None: of the whole window); ``revision``: of
        those that it had, "": of all."""
        now, found = self._clock(), Outcomes()
        for (name, commit), window in self._windows.items():
            if name in names and revision in ("", commit):
                found.add(window.since(now, length_s))
        return found

    def _fresh(self) -> Iterator[tuple[str, _Replica]]:
        now = self._clock()
        for replica, one in self._replicas.items():
            if one.demand is not None and now - one.at <= self._stale_s:
                yield replica, one


def name_of(model: str) -> str:
    """A model's name, without the revision that was asked for."""
    return model.partition("@")[0]


def _roles(one: _Replica, names: Collection[str], role: str, revision: str) -> Iterator[Role]:
    for model in one.models():
        if name_of(model.model) in names:
            for part in model.roles:
                if role in ("", part.role) and revision in ("", part.revision):
                    yield part


def _who(line: Line) -> tuple[object, ...]:
    return line.complete, *((one.model, one.waiting.requests, one.waiting.what) for one in line.held)


def _nothing(answers: Answers) -> Answers:
    times = answers.first_token
    empty = type(times)(times.bounds, (0,) * len(times.counts), 0.0)
    return Answers(answers.revision, 0, 0, 0, 0, empty)
