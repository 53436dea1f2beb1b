"""Which models run on this machine when clients decide: started when asked for, stopped when nobody uses them.

    asked -> starting -> up -> stopping -> gone, or asked again
    starting, up -> failed, for FAILED_S

At most ``most`` have a place at a time. Who is asked for while all are taken gets the place of the one that has been
unused for the longest time, ``LEAST_S`` at least. Who asks says so again every few seconds: a model that nobody has
asked for in ``ASKED_S`` needs no place any more. No I/O and no clock of its own: ``helios.launch.on_demand`` acts.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

FAILED_S: Final = 30.0
"""A model that could not be started is not tried again for so long, in seconds."""
ASKED_S: Final = 10.0
LEAST_S: Final = 10.0
"""How long a model keeps its place at least, from its last use, in seconds."""
REMEMBERED: Final = 1_000
"""Models whose last commit, or failure, is remembered."""


class State(Enum):
    ASKED = "asked"
    STARTING = "starting"
    UP = "up"
    STOPPING = "stopping"
    FAILED = "failed"


@dataclass(eq=False, slots=True)
class Model:
    """A model at a commit. ``names``: those by which clients have asked for it."""

    name: str
    commit: str
    names: set[str] = field(default_factory=set)
    state: State = State.ASKED
    asked_at: float = 0.0
    used_at: float = 0.0
    failed_at: float = 0.0
    progress: str = ""
    """What it is doing, or why it failed, in words."""

    @property
    def pinned(self) -> str:
        return f"{self.name}@{self.commit}"


@dataclass(frozen=True, slots=True)
class Told:
    """What somebody hears who asked: whether it will come, and how far it is or why not."""

    comes: bool
    text: str


class Demand:
    """The models of one machine. ``idle_s``: stopped when unused for so long, 0: never. All times in seconds."""

    def __init__(self, most: int, idle_s: float) -> None:
        self._most, self._idle_s = most, idle_s
        self._models: dict[str, Model] = {}
        self._commits: OrderedDict[str, str] = OrderedDict()

    @property
    def models(self) -> list[Model]:
        """All that are known, the failed ones included."""
        return list(self._models.values())

    def ask(self, name: str, commit: str, revision: str, now: float) -> Told:
        """Somebody wants the model. ``commit`` "": the one in its name, or that it had last; ``revision``: what clients
        asked for."""
        if not commit:
            name, _, commit = name.partition("@")
            revision = commit
        commit = commit or self._commits.get(name, "")
        if not commit:
            return Told(False, f"nobody has said which commit of {name} is to be served")
        self._remember(name, commit)
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
        model.asked_at = now
        model.names.add(pinned if revision == commit else name)
        if model.state is State.ASKED:
            taken = sum(one.state in _TAKES_PLACE for one in self._models.values())
            model.progress = f"waiting for a place: {taken} of {self._most} are taken" if taken >= self._most else ""
        return Told(True, model.progress)

    def to_start(self, now: float) -> list[Model]:
        """Those that have got a place: start them."""
        for model in self.models:
            if model.state is State.ASKED and now - model.asked_at > ASKED_S:
                del self._models[model.pinned]
        free = self._most - sum(one.state in _TAKES_PLACE for one in self._models.values())
        chosen = [one for one in self._models.values() if one.state is State.ASKED][: max(0, free)]
        for model in chosen:
            model.state, model.progress = State.STARTING, "starting"
        return chosen

    def to_stop(self, now: float) -> list[Model]:
        """Those that have to give up their place: stop them."""
        up = sorted((one for one in self._models.values() if one.state is State.UP), key=lambda one: one.used_at)
        chosen = [one for one in up if self._idle_s and now - one.used_at >= self._idle_s]
        stopping = sum(one.state is State.STOPPING for one in self._models.values())
        taken = sum(one.state in _TAKES_PLACE for one in self._models.values())
        wanted = sum(one.state is State.ASKED for one in self._models.values())
        needed = min(wanted, taken + wanted - self._most) - stopping - len(chosen)
        spare = [one for one in up if one not in chosen and now - one.used_at >= LEAST_S]
        chosen += spare[: max(0, needed)]
        for model in chosen:
            model.state, model.progress = State.STOPPING, "stopping, since nobody used it"
        return chosen

    def up(self, model: Model, now: float) -> None:
        """It serves."""
        model.state, model.used_at, model.progress = State.UP, now, ""

    def used(self, model: Model, now: float) -> None:
        """It is being used."""
        model.used_at = now

    def keeps(self, model: Model, now: float) -> None:
        """It was to be stopped, and is in use all the same."""
        self.up(model, now)

    def failed(self, model: Model, reason: str, now: float) -> None:
        """It could not be started, or ended by itself."""
        model.state, model.failed_at, model.progress = State.FAILED, now, reason

    def stopped(self, model: Model, now: float) -> None:
        """Its place is free. Who has asked for it meanwhile gets it again."""
        if now - model.asked_at <= ASKED_S and model.asked_at > model.used_at:
            model.state, model.progress = State.ASKED, ""
        else:
            del self._models[model.pinned]

    def _remember(self, name: str, commit: str) -> None:
        self._commits[name] = commit
        self._commits.move_to_end(name)
        if len(self._commits) > REMEMBERED:
            self._commits.popitem(last=False)

    def _forget_failed(self) -> None:
        failed = [one for one in self._models.values() if one.state is State.FAILED]
        if len(failed) >= REMEMBERED:
            del self._models[min(failed, key=lambda one: one.failed_at).pinned]


_TAKES_PLACE: Final = frozenset({State.STARTING, State.UP, State.STOPPING})
