"""One model of a machine that clients decide about: what state it is in, and which memory it holds. No I/O.

    new -> sizing -> asked -> starting -> up
    up -> lulling -> asleep -> waking -> up
    up, lulling, asleep, waking -> stopping -> gone, or asked again
    sizing, starting, up -> failed

Memory counts as held from the decision that takes it to the report that it is free again. Who falls asleep or wakes
holds what it needs in both states at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Final

from helios.launch.needs import Need
from helios.launch.pools import MAIN, NOTHING, Pools, larger, minus

if TYPE_CHECKING:
    from orchestrator.scaling.state import State as Remembered


class State(Enum):
    NEW = "new"
    SIZING = "sizing"
    ASKED = "asked"
    STARTING = "starting"
    UP = "up"
    LULLING = "lulling"
    ASLEEP = "asleep"
    WAKING = "waking"
    STOPPING = "stopping"
    FAILED = "failed"


class Act(Enum):
    """What somebody has to do for a model, and report."""

    SIZE = "size"
    START = "start"
    WAKE = "wake"
    LULL = "lull"
    STOP = "stop"


BEGUN: Final = {
    Act.SIZE: State.SIZING, Act.START: State.STARTING, Act.WAKE: State.WAKING, Act.LULL: State.LULLING,
    Act.STOP: State.STOPPING,
}  # fmt: skip


@dataclass(eq=False, slots=True)
class Model:
    """A model at a commit. ``names``: those by which clients have asked for it. All times in seconds."""

    name: str
    commit: str
    names: set[str] = field(default_factory=set)
    state: State = State.NEW
    needs: tuple[Need, ...] = ()
    """The places where it may be..."""
    need: Need | None = None
    """...and the one where it is."""
    level: int = 0
    """Of its sleep, or of that which it begins."""
    holds: Pools = field(default_factory=dict)
    kept: Pools = field(default_factory=dict)
    """What its process gives back only when it ends."""
    asked_at: float = 0.0
    wanted_since: float | None = None
    """When somebody asked who has not got it; None: nobody waits."""
    up_since: float = 0.0
    used_at: float = 0.0
    looked_at: float = 0.0
    """When its worker was last asked whether it is in use..."""
    running: int | None = None
    """...how many requests it had then; None: it did not say..."""
    arrivals: int | None = None
    """...and how many more came since the policy was last asked; None: not known."""
    scaling: Remembered | None = None
    """What the scaling policy remembers of it."""
    wanted: bool = False
    """Whether it is to be up, as the policy says..."""
    why: str = ""
    """...and why; of one that goes why it does."""
    failed_at: float = 0.0
    progress: str = ""
    """What it is doing, or why it failed, in words."""

    @property
    def pinned(self) -> str:
        return f"{self.name}@{self.commit}"

    @property
    def waits(self) -> bool:
        """Whether it has to get memory: it is to be up, and is not there."""
        return self.wanted and self.state in (State.ASKED, State.ASLEEP)

    @property
    def places(self) -> tuple[Need, ...]:
        """Where it may be started or woken: a process stays where it is."""
        return self.needs if self.need is None else (self.need,)

    def more(self, place: Need) -> Pools:
        """What it has to get to be up at a place."""
        return minus(larger(place.awake, self.holds), self.holds)

    def frees(self, act: Act, level: int = 0) -> Pools:
        """What it will hold no more after it was stopped or put to sleep; negative: what it holds in addition."""
        return minus(self.holds, self._asleep(level) if act is Act.LULL else NOTHING)

    def takes(self, level: int) -> Pools:
        """What it has to get to fall asleep."""
        return minus(larger(self.holds, self._asleep(level)), self.holds)

    def begin(self, act: Act, place: Need | None = None, level: int = 0) -> None:
        """Somebody does that from now on."""
        if place is not None:
            self.need, self.holds = place, larger(place.awake, self.holds)
        if act is Act.LULL:
            self.level, self.holds = level, larger(self.holds, self._asleep(level))
        self.state = BEGUN[act]

    def up(self, now: float) -> None:
        """It serves; nobody waits for it."""
        assert self.need is not None
        self.holds = larger(self.need.awake, self.kept)
        self.state, self.progress, self.wanted_since = State.UP, "", None
        self.used_at = self.up_since = self.looked_at = now
        self.running = self.arrivals = None

    def slept(self) -> None:
        self.holds = self._asleep(self.level)
        self.kept = {MAIN: self.holds.get(MAIN, 0)}
        self.state, self.progress = State.ASLEEP, ""

    def ended(self) -> None:
        """Its process is gone."""
        self.need, self.level, self.holds, self.kept = None, 0, {}, {}

    def _asleep(self, level: int) -> Pools:
        assert self.need is not None
        return larger(self.need.asleep[level - 1], self.kept)
