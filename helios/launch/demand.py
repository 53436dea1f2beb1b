"""Which models run on this machine when clients decide: started when asked for, taken out when nobody uses them.

Which of them are to be up, the scaling policy of the cluster says (``wanted``): because somebody asks, until nobody
has used them for long enough. Here it is about memory: together they hold no more than the machine's pools have
(``resident`` says who holds what, and when). Who is to be up gets memory in the order of asking: what is free, else
that of the models that have been unused for the longest time, ``LEAST_S`` at least (``room``), whatever the policy
would like. Where that is not enough, it waits. Others may overtake it for ``TURN_S``; then nobody gets the memory that
it lacks, and models that are used without a pause have to give way, too: whoever stops them lets their requests end
first, and they stay if that takes too long. After the patience that somebody has configured those who wait are told
why. No I/O and no clock of its own: ``helios.launch.on_demand`` acts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple, TypeVar

from helios.launch.needs import Need
from helios.launch.pools import Pools, lacks, minus, plus, text
from helios.launch.resident import Act, Model, State
from helios.launch.room import Room, Step, gentle
from helios.launch.wanted import Use, Wanted, looked

FAILED_S: Final = 30.0
"""A model that could not be started is not tried again for so long, in seconds."""
LEAST_S: Final = 10.0
"""So long after its last use a model's memory is not given to others, in seconds."""
TURN_S: Final = 30.0
"""After so long a model that waits is not overtaken, and gets the memory of those that are in use, in seconds."""
REMEMBERED: Final = 1_000
"""Models whose last commit, failure, or trouble with sleeping is remembered."""


@dataclass(frozen=True, slots=True)
class Told:
    """What somebody hears who asked: whether it will come, and how far it is or why not."""

    comes: bool
    text: str


T = TypeVar("T")


class _Taken(NamedTuple):
    """What was done so that a model gets its memory, and what of it is left for others."""

    steps: list[Step]
    free: Pools
    coming: Pools


class Demand:
    """The models of one machine. ``wanted``: which are to be up; ``patience_s``: longest wait for memory, in seconds,
    as all times."""

    def __init__(self, pools: Pools, wanted: Wanted, patience_s: float) -> None:
        self._pools, self._wanted, self._patience_s = pools, wanted, patience_s
        self._models: dict[str, Model] = {}
        self._commits: OrderedDict[str, str] = OrderedDict()
        self._sleepless: OrderedDict[str, None] = OrderedDict()

    @property
    def models(self) -> list[Model]:
        """All that are known, the failed ones included."""
        return list(self._models.values())

    @property
    def held(self) -> Pools:
        """What they hold together."""
        return plus(*(model.holds for model in self._models.values()))

    def ask(self, name: str, commit: str, revision: str, now: float) -> Told:
        """Somebody wants the model. ``commit`` "": the one in its name, or that it had last; ``revision``: what clients
        asked for."""
        if not commit:
            name, _, commit = name.partition("@")
            revision = commit
        commit = commit or self._commits.get(name, "")
        if not commit:
            return Told(False, f"nobody has said which commit of {name} is to be served")
        _remember(self._commits, name, commit)
        pinned = f"{name}@{commit}"
        model = self._models.get(pinned)
        if model is not None and model.state is State.FAILED:
            if now - model.failed_at < FAILED_S:
                return Told(False, model.progress)
            del self._models[pinned]
            model = None
        if model is None:
            self._forget_failed()
            model = self._models[pinned] = Model(name, commit)
        model.names.add(pinned if revision == commit else name)
        if model.waits and model.wanted_since is not None and now - model.wanted_since > self._patience_s:
            self._not_wanted(model)
            return Told(False, f"memory for it was not free within {self._patience_s:g} s: {model.progress}")
        model.asked_at = now
        if model.state is State.UP:  # the router is about to learn of it: somebody's request comes
            model.arrivals = None if model.arrivals is None else model.arrivals + 1
        elif model.wanted_since is None:
            model.wanted_since = now
        return Told(True, model.progress)

    def step(self, now: float) -> list[Step]:
        """What has to be done from now on; what comes of each is reported."""
        for model in self.models:
            if model.state not in (State.LULLING, State.STOPPING, State.FAILED):
                self._wanted.decide(model, now)
            if not model.wanted and model.state in (State.ASKED, State.ASLEEP):
                self._not_wanted(model)
        steps = [Step(model, Act.SIZE) for model in self._models.values() if model.state is State.NEW]
        for step in steps:
            step.model.begin(Act.SIZE)
        free: Pools = minus(self._pools, self.held)
        coming: Pools = self._coming()
        for model in sorted((one for one in self.models if one.waits), key=lambda one: one.wanted_since or 0.0):
            taken = self._taken_for(model, now, free, coming)
            steps += taken.steps
            free, coming = taken.free, taken.coming
        unwanted = [one for one in self.models if one.state is State.UP and not one.wanted]
        for model in sorted(unwanted, key=lambda one: one.used_at):
            step = gentle(model, free=free, there=plus(free, coming))
            free = minus(free, model.takes(step.level)) if step.act is Act.LULL else free
            steps.append(step)
            self._leave(step, model.why)
        return steps

    # --- reports ---

    def sized(self, model: Model, needs: Sequence[Need], now: float) -> None:
        """It is known what it takes. It is refused if it would not fit alone."""
        fit = tuple(need for need in needs if not lacks(need.awake, self._pools))
        if not fit:
            pools = needs[0].awake
            self.failed(model, f"it needs {text(pools)}; models may take {text(self._pools, pools)} together", now)
            return
        model.needs = _sleepless(fit) if model.pinned in self._sleepless else fit
        model.state = State.ASKED

    def up(self, model: Model, now: float) -> None:
        """It serves."""
        model.up(now)
        self._wanted.decide(model, now)

    def looked(self, model: Model, use: Use, now: float) -> None:
        """One that is up was asked whether it is in use."""
        looked(model, use, now)

    def keeps(self, model: Model, now: float) -> None:
        """It was to be taken out, and is in use all the same."""
        self.up(model, now)

    def slept(self, model: Model) -> None:
        """It sleeps. Who has asked for it meanwhile has it woken."""
        model.slept()

    def broke(self, model: Model, now: float) -> None:
        """It could not be put to sleep or woken, and is being stopped; from now on it is not put to sleep."""
        _remember(self._sleepless, model.pinned, None)
        model.needs = _sleepless(model.needs)
        model.state = State.STOPPING
        model.wanted_since = None if model.wanted_since is None else now

    def failed(self, model: Model, reason: str, now: float) -> None:
        """It could not be started, or ended by itself."""
        model.ended()
        model.state, model.failed_at, model.progress, model.wanted_since = State.FAILED, now, reason, None

    def stopped(self, model: Model, now: float) -> None:
        """Its memory is free. Who has asked for it meanwhile gets it again."""
        model.ended()
        model.state, model.progress = State.ASKED, ""
        self._wanted.decide(model, now)
        if not model.wanted:
            del self._models[model.pinned]

    # --- who gets what ---

    def _taken_for(self, model: Model, now: float, free: Pools, coming: Pools) -> _Taken:
        """Memory for one that waits, where it can be had."""
        for place in model.places:
            more = model.more(place)
            if not lacks(more, free):
                act = Act.START if model.state is State.ASKED else Act.WAKE
                model.begin(act, place)
                model.progress = "starting" if act is Act.START else "waking"
                return _Taken([Step(model, act)], minus(free, more), coming)
        for place in model.places:
            more = model.more(place)
            if not lacks(more, plus(free, coming)):
                model.progress = "others make room for it"
                return _claimed([], more, free, coming)
        turn = now - (model.wanted_since or now) >= TURN_S
        spare = self._spare(now, turn)
        found: list[tuple[float, Pools, list[Step]]] = []
        for place in model.places:
            more = model.more(place)
            steps = Room(more, free, coming, [one for one in spare if one is not model]).made()
            if steps is not None:
                found.append((max(step.model.used_at for step in steps), more, steps))
        if not found:
            model.progress = self._why(model)
            return _Taken([], self._kept_for(model, free, coming) if turn else free, coming)
        _, more, steps = min(found, key=lambda one: one[0])
        model.progress = "others make room for it"
        for step in steps:
            coming = plus(coming, step.model.frees(step.act, step.level))
            taken = step.model.takes(step.level) if step.act is Act.LULL else {}
            free, coming = minus(free, taken), plus(coming, taken)
            self._leave(step, f"{model.name} needs its memory")
        return _claimed(steps, more, free, coming)

    def _spare(self, now: float, turn: bool) -> list[Model]:
        """Those that have to give way, the least recently used first. ``turn``: those that are in use, too, but for
        those that have just come."""
        found = []
        for model in self._models.values():
            goes = now - model.used_at >= LEAST_S or (turn and now - model.up_since >= TURN_S)
            if (model.state is State.UP and goes) or (model.state is State.ASLEEP and not model.waits):
                found.append(model)
        return sorted(found, key=lambda one: one.used_at)

    def _kept_for(self, model: Model, free: Pools, coming: Pools) -> Pools:
        """What is free for others when one that waits is not overtaken, negative where that is nothing."""
        left = free
        for place in model.places:
            more = model.more(place)
            left = minus(left, {pool: more[pool] for pool in lacks(more, plus(free, coming))})
        return left

    def _leave(self, step: Step, why: str) -> None:
        """A model gives up its place."""
        step.model.begin(step.act, level=step.level)
        step.model.why = why
        step.model.progress = f"{'stopping' if step.act is Act.STOP else 'falling asleep'}: {why}"

    def _coming(self) -> Pools:
        """What will be free when those are gone that go."""
        going = [
            one.frees(Act.LULL if one.state is State.LULLING else Act.STOP, one.level)
            for one in self._models.values()
            if one.state in (State.LULLING, State.STOPPING)
        ]
        return plus(*going)

    def _why(self, model: Model) -> str:
        """Why there is no memory for it."""
        place = model.places[0]
        more = model.more(place)
        holders = sorted(one.name for one in self._models.values() if one is not model and any(one.holds.values()))
        return (
            f"waiting for {text(more)}: of {text(self._pools, more)} {text(minus(self._pools, self.held), more)} "
            f"are free, the rest have {', '.join(holders)}"
        )

    def _not_wanted(self, model: Model) -> None:
        model.wanted_since, model.wanted = None, False
        if model.state is State.ASKED:
            del self._models[model.pinned]

    def _forget_failed(self) -> None:
        failed = [one for one in self._models.values() if one.state is State.FAILED]
        if len(failed) >= REMEMBERED:
            del self._models[min(failed, key=lambda one: one.failed_at).pinned]


def _claimed(steps: list[Step], more: Pools, free: Pools, coming: Pools) -> _Taken:
    """Memory that one waits for is nobody else's: what is free first, the rest of what is coming."""
    now = {pool: min(size, max(0, free.get(pool, 0))) for pool, size in more.items()}
    return _Taken(steps, minus(free, now), minus(coming, minus(more, now)))


def _sleepless(needs: Sequence[Need]) -> tuple[Need, ...]:
    return tuple(replace(need, asleep=()) for need in needs)


def _remember(known: OrderedDict[str, T], key: str, value: T) -> None:
    known[key] = value
    known.move_to_end(key)
    if len(known) > REMEMBERED:
        known.popitem(last=False)
