"""How many replicas a model, or one role of it, should have: the one policy of the operator, of ``helios serve`` and of
the simulator. Pure: a sample, the time and what was remembered go in, a decision and what to remember come out.

Load asks for a number of replicas, as a fraction (``load``). Within the tolerance that is a range, and replicas stay as
they are while they lie in it: below they go up to its lower end, above they go down to its upper end. Ends are taken
over windows: down to the most within ``down_window_s`` (the Horizontal Pod Autoscaler's stabilisation), up to the
least within ``up_window_s``. A range does not depend on how many there are, so for a load that stays the same replicas
arrive and never move again, and who has more is never told to have less than who had fewer.

Around that:

- what is not known takes nothing away, and starts idle times anew; so do a first look and one after a long silence;
- 0 to 1 at once when there is, or since the last look was, a request, and at once as far as what is held asks for;
- 1 to 0 after ``idle_s`` without a request, and ``warm_s`` after it woke;
- a forecast raises, and takes nothing away: from it comes a floor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import msgspec

from orchestrator.scaling.load import Load, measured, relaxed
from orchestrator.scaling.outlook import Outlook, replicas_for
from orchestrator.scaling.settings import ScalingSettings
from orchestrator.scaling.signals import Signals
from orchestrator.scaling.state import MOST, State, Step, falling, rising

WAKES_S: Final = 2.0
"""A model that was woken is kept for its first replica for so many usual starts, then as if that had come."""
STARTUPS: Final = 12
"""Starts that are remembered."""
STARTUP_MOST_S: Final = 3600.0
"""What took longer was no usual start."""
HAIR: Final = 1e-9


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What to do, and why."""

    replicas: int
    """What there should be now, where nobody else scales between ``floor`` and the most."""
    floor: int
    """What a Horizontal Pod Autoscaler may not go below now (its ``minReplicas``). 0: nothing is to be kept, and who
    obeys sets 0 itself, because an autoscaler may not."""
    needed: int
    """Of ``replicas`` those that requests need now. The others wait for a window to end, or are there for what is
    expected: the first to go without (``share``)."""
    wake: bool
    """There is none, and there should be."""
    expected: int
    """What the forecast asks for, whether or not anything follows from it."""
    prefetch: int
    """Nodes that should have the model, for replicas that are expected."""
    why: tuple[str, ...]
    """What decided, in words."""
    next_look_s: float
    """Look again after so long, at the latest, in seconds, and whenever a router holds a request while there is none.
    """
    state: State
    """To be handed in at the next look."""


class Policy:
    """Decides by one model's settings; holds nothing else."""

    def __init__(self, settings: ScalingSettings) -> None:
        self.settings = settings

    def startup_s(self, state: State | None) -> float:
        """How long a replica takes until it is ready: four of five of the last starts took no longer."""
        if state is None or not state.startups:
            return self.settings.startup_s
        return min(STARTUP_MOST_S, sorted(state.startups)[math.ceil(0.8 * len(state.startups)) - 1])

    def lead_s(self, state: State | None) -> float:
        """How far ahead a forecast has to look: until somebody looks here again, and a start."""
        return self.startup_s(state) + self.settings.stale_s

    def decide(self, now: float, seen: Signals, state: State | None, outlook: Outlook | None = None) -> Decision:
        """``now``: Unix seconds; ``state``: the last decision's, None at a first look."""
        s = self.settings
        if state is None or state.at > now + s.stale_s:  # the second: somebody's clock was wrong
            state = State.fresh(now, seen.replicas, seen.ready)
        now = max(now, state.at)
        elapsed_s = now - state.at
        silent = elapsed_s > s.stale_s and seen.replicas > 0
        state = self._observed(now, seen, state)
        settled = seen.starting == 0 and now - state.moved_at >= s.stale_s
        load = measured(seen, s, relaxed(seen, s, state.strain, elapsed_s), settled)
        low = min(s.max_replicas, _up(load.replicas * (1 - s.tolerance)))
        high = min(s.max_replicas, max(low, _up(load.replicas * (1 + s.tolerance))))
        blind = silent or bool(load.unknown)
        if blind:
            high = max(high, seen.replicas)

        expected, ahead, nodes = self._forecast(outlook, seen.replicas, self.startup_s(state))
        demand_at = now if load.busy or blind else state.demand_at
        downs = falling(state.downs, now, max(high, ahead), now - s.down_window_s)
        ups = rising(state.ups, now, low, now - s.up_window_s)

        used = load.busy or now - demand_at < s.idle_s
        down_to = downs[0][1]
        if down_to <= 1 and not used and not ahead:
            down_to = 0
        needed = max(ups[0][1] if seen.replicas else low, s.min_replicas, 1 if load.busy else 0)
        kept = self._warm(now, state)
        if used and seen.replicas:
            kept = max(kept, 1)
        elif not seen.replicas and (load.busy or ahead):  # it wakes
            kept = s.warm_replicas
        least = max(s.min_replicas, kept, 1 if load.busy else 0, ahead)
        wanted = self._clamped(seen.replicas, max(needed, least), down_to)
        replicas = self._slowed(now, seen.replicas, wanted, state)
        return Decision(
            replicas=replicas,
            floor=min(s.max_replicas, least),
            needed=min(needed, replicas),
            wake=replicas > 0 and not seen.replicas,
            expected=expected,
            prefetch=nodes,
            why=tuple(self._why(seen, load, silent, expected, ahead, down_to, wanted, replicas, now - demand_at)),
            next_look_s=s.interval_s if replicas or seen.replicas else s.stale_s,
            state=msgspec.structs.replace(state, demand_at=demand_at, downs=downs, ups=ups, strain=load.strain),
        )

    def _forecast(self, outlook: Outlook | None, replicas: int, startup_s: float) -> tuple[int, int, int]:
        """What is expected, what of it is acted on, nodes that should have the model."""
        s = self.settings
        if outlook is None or s.forecast.mode == "off":
            return 0, 0, 0
        expected = replicas_for(outlook.soon, s, startup_s, replicas)
        if not outlook.trusted or s.forecast.mode != "act":
            return expected, 0, 0
        later = replicas_for(outlook.later, s, startup_s, replicas) if s.forecast.prefetch_s else 0
        return expected, expected, max(expected, later)

    def _clamped(self, there: int, up_to: int, down_to: int) -> int:
        """What there is, unless that is less than the one or more than both."""
        s = self.settings
        return max(s.min_replicas, min(s.max_replicas, max(up_to, min(there, max(up_to, down_to)))))

    def _slowed(self, now: float, there: int, wanted: int, state: State) -> int:
        """As far as the limits of speed allow; none from 0, nor towards what must or may be there at all."""
        s = self.settings
        limit, way = (s.up, wanted - there) if wanted > there else (s.down, there - wanted)
        if not way or not there or not (limit.replicas or limit.percent) or there > s.max_replicas:
            return wanted
        before = _at(state.changes, now - limit.period_s)
        if wanted > there:
            most = max(before + limit.replicas, _up(before * (1 + limit.percent / 100)))
            return max(s.min_replicas, min(wanted, max(there, most)))
        fewest = min(before - limit.replicas, math.floor(before * (1 - limit.percent / 100) + HAIR))
        return max(wanted, min(there, fewest))

    def _warm(self, now: float, state: State) -> int:
        """What stays because the model has just woken."""
        s = self.settings
        if state.woken_at is None:
            return 0
        ready_at = state.ready_at
        if ready_at is None:
            ready_at = state.woken_at + WAKES_S * self.startup_s(state)
        return s.warm_replicas if now < ready_at + s.warm_s else 0

    def _observed(self, now: float, seen: Signals, state: State) -> State:
        """What has happened since the last look."""
        s = self.settings
        woken_at, ready_at = state.woken_at, state.ready_at
        if not seen.replicas:
            woken_at = ready_at = None
        elif not state.replicas:
            woken_at, ready_at = state.at, None
        if woken_at is not None and ready_at is None and seen.ready:
            ready_at = now
        begun, startups = state.begun, state.startups
        if (more := seen.replicas - state.replicas) > 0:
            begun = (*begun, *[state.at] * more)[:MOST]
        if (came := seen.ready - state.ready) > 0 and begun:
            startups = (*startups, *(now - at for at in begun[:came]))[-STARTUPS:]
            begun = begun[came:]
        begun = begun[: seen.starting]
        moved = (seen.replicas, seen.ready) != (state.replicas, state.ready)
        changes = state.changes
        if seen.replicas != state.replicas:
            since = _since(changes, now - max(s.up.period_s, s.down.period_s))
            changes = (*changes[since:], (now, seen.replicas))[-MOST:]
        return State(
            at=now, replicas=seen.replicas, ready=seen.ready, demand_at=state.demand_at,
            moved_at=now if moved else state.moved_at, downs=state.downs, ups=state.ups, changes=changes,
            woken_at=woken_at, ready_at=ready_at, strain=state.strain, begun=begun, startups=startups,
        )  # fmt: skip

    def _why(
        self, seen: Signals, load: Load, silent: bool, expected: int, ahead: int, down_to: int, wanted: int,
        replicas: int, unused_s: float,
    ) -> Iterator[str]:  # fmt: skip
        s = self.settings
        yield f"{load.measure}: {load.replicas:.2f} replicas"
        if load.unknown and seen.replicas:
            yield f"nothing is taken away, because {load.unknown} is not known"
        elif silent:
            yield "nothing is taken away, because nobody has looked for long"
        if ahead and ahead >= wanted > load.replicas:
            yield f"forecast: {ahead} replicas"
        elif expected and not ahead:
            yield f"forecast, not acted on: {expected} replicas"
        if wanted > load.replicas and wanted == down_to == seen.replicas and not ahead:
            yield f"so many were asked for within {s.down_window_s:g} s"
        if not load.busy and wanted == 1 == seen.replicas and s.min_replicas == 0 and not ahead:
            yield f"the last one stays for {s.idle_s:g} s without a request, {s.warm_s:g} s after it woke"
        if not replicas and seen.replicas:
            yield f"no request for {unused_s:.0f} s"
        if wanted == s.max_replicas < load.replicas:
            yield f"no more than max_replicas {s.max_replicas}"
        if replicas != wanted:
            yield f"{wanted} wanted: the limit of speed"


def _up(replicas: float) -> int:
    """Whole replicas for a fraction; rounding errors add none."""
    return math.ceil(replicas - HAIR) if replicas > HAIR else 0


def _since(changes: tuple[Step, ...], at: float) -> int:
    """Index of the entry that holds at a time: the last that is not later, else the first."""
    index = 0
    for number, (when, _) in enumerate(changes):
        if when <= at:
            index = number
    return index


def _at(changes: tuple[Step, ...], at: float) -> int:
    return changes[_since(changes, at)][1]
