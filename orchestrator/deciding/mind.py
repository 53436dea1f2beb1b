"""One service's decisions: samples and the time go in, wanted workers and what is to be remembered come out. No I/O.

What is shown and remembered is made anew when another number of workers is wanted, and else seldom: every look is a
decision, and a write for each would be one every few seconds for each service. A successor that finds an older state
takes nothing down for a while (``orchestrator.scaling.policy``), which is all that it costs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import msgspec

from orchestrator.deciding.memory import Memory, decode, encode
from orchestrator.deciding.plan import Plan, RolePlan
from orchestrator.reconcile.observed import Wanted
from orchestrator.scaling import state as states
from orchestrator.scaling.forecast import SPREAD_S, Forecast
from orchestrator.scaling.outlook import Expected, Outlook
from orchestrator.scaling.policy import Decision, Policy
from orchestrator.scaling.share import Want, share
from orchestrator.scaling.signals import Signals

REFRESH_S: Final = 300.0
"""How often what is shown and remembered is made anew while there are requests or something else is expected, in
seconds..."""
QUIET_S: Final = 3600.0
"""...and while there are none."""
HELD_S: Final = 900.0
"""Nodes that were to have the model keep it for so long after nothing asks for that any more, in seconds."""


class Mind:
    """Of one service. Times are Unix seconds."""

    def __init__(self, text: str, last: Mapping[str, int], now: float) -> None:
        """``text``: what was remembered; ``last``: workers that were wanted last, by role."""
        memory = decode(text)
        self._states = {role: states.decode(one) for role, one in memory.states.items()}
        self._busy_s = dict(memory.busy_s)
        self._remembered = memory.forecast
        self._forecast: Forecast | None = None
        self.granted = dict(last)
        """Workers that are wanted of each role, once ceilings have been seen to."""
        self._decisions: dict[str, Decision] = {}
        self._known: dict[str, bool] = {}
        self._looked_at = now
        self._asked = False
        """There were requests since what is remembered was made anew."""
        self._prefetch, self._prefetch_at = 0, -math.inf
        self.others = 0
        """Services that answer for the same name."""
        self.shown: dict[str, Wanted] = {}
        self.text = text
        self._text_at = now

    @property
    def decided(self) -> bool:
        return bool(self._decisions)

    def look(self, now: float, plan: Plan, seen: Mapping[str, Signals]) -> None:
        """Decide. ``seen``: a sample of each role."""
        main = plan.roles[plan.main].settings
        if self._forecast is None:
            self._forecast = Forecast.decode(self._remembered, main.forecast)
        self._learn(now, plan, seen, self._forecast)
        found = {}
        for role, its in plan.roles.items():
            policy, before = Policy(its.settings), self._states.get(role)
            outlook = None
            if its.settings.forecast.mode != "off":
                outlook = self._outlook(self._forecast.outlook(now, policy.lead_s(before)), plan, role)
            found[role] = policy.decide(now, seen[role], before, outlook)
        self._states = {role: one.state for role, one in found.items()}
        self._known = {role: _known(seen[role], its) for role, its in plan.roles.items()}
        self._decisions = found
        nodes = max(one.prefetch for one in found.values())
        if nodes >= self._prefetch or now - self._prefetch_at >= HELD_S:
            self._prefetch, self._prefetch_at = nodes, now
        elif nodes:
            self._prefetch_at = now

    def _learn(self, now: float, plan: Plan, seen: Mapping[str, Signals], forecast: Forecast) -> None:
        main = seen[plan.main]
        whole = not main.partial and main.router_age_s <= plan.roles[plan.main].settings.stale_s
        forecast.observe(now, main.arrivals if whole else None, main.in_flight if whole else None)
        elapsed, self._looked_at = max(0.0, now - self._looked_at), max(now, self._looked_at)
        kept = math.exp(-elapsed / SPREAD_S)
        for role, one in seen.items():
            self._busy_s[role] = self._busy_s.get(role, 0.0) * kept + (one.in_flight or 0) * elapsed
            self._asked = self._asked or bool(one.held or one.in_flight or one.arrivals)

    def _outlook(self, outlook: Outlook, plan: Plan, role: str) -> Outlook:
        """The forecast is of the role that answers; another one has its part of the time that requests take."""
        main = self._busy_s.get(plan.main, 0.0)
        part = self._busy_s.get(role, 0.0) / main if main > 0 else 1.0
        factor = plan.roles[role].margin * min(part, 10.0)

        def scaled(one: Expected) -> Expected:
            return msgspec.structs.replace(one, work=one.work * factor)

        return msgspec.structs.replace(outlook, soon=scaled(outlook.soon), later=scaled(outlook.later))

    # --- ceilings ---

    def wants(self, name: str, plan: Plan) -> list[Want]:
        """What it wants, within ceilings of its own; ``name/role`` for each role. Roles sleep and wake together."""
        awake = any(one.replicas for one in self._decisions.values())
        found = []
        for role, one in self._decisions.items():
            its = plan.roles[role]
            least = 1 if awake else 0
            found.append(
                Want(
                    name=f"{name}/{role}", replicas=max(least, one.replicas), needed=max(least, one.needed),
                    min_replicas=max(least, its.settings.min_replicas), priority=plan.priority, pool=its.pool,
                    units=its.units,
                )
            )  # fmt: skip
        granted = share(found, plan.ceilings)
        return [msgspec.structs.replace(one, replicas=granted[one.name]) for one in found]

    def grant(self, now: float, plan: Plan, granted: Mapping[str, int]) -> bool:
        """Take on what was granted of what was wanted, by role. Whether anything is to be shown that wasn't."""
        self.granted = dict(granted)
        fresh = {}
        for role, one in self._decisions.items():
            its, count = plan.roles[role].settings, granted[role]
            why = "; ".join(one.why)
            if count < one.replicas:
                why += f"; {one.replicas} wanted: the ceiling for accelerators"
            expected = None if its.forecast.mode == "off" else one.expected
            fresh[role] = Wanted(count, min(one.floor, count), why, expected, self._known[role], self.others)
        age_s = now - self._text_at
        same = {role: _decisive(one) for role, one in fresh.items()} == {
            role: _decisive(one) for role, one in self.shown.items()
        }
        forecasts = {role: one.forecast for role, one in fresh.items()}
        told = forecasts == {role: one.forecast for role, one in self.shown.items()}
        if same and age_s < (QUIET_S if told and not self._asked else REFRESH_S):
            return False
        self.shown, self.text = fresh, self._encoded()
        self._text_at, self._asked = now, False
        return True

    def _encoded(self) -> str:
        kept = {role: states.encode(one).decode() for role, one in self._states.items() if one is not None}
        forecast = self._forecast.encode().decode() if self._forecast is not None else self._remembered
        return encode(Memory(kept, forecast, self._busy_s))

    @property
    def prefetch(self) -> int:
        """Nodes that should have the model, for workers that are expected."""
        return self._prefetch


def _decisive(one: Wanted) -> tuple[int, int, bool, int]:
    return one.replicas, one.floor, one.signals, one.others


def _known(seen: Signals, its: RolePlan) -> bool:
    return seen.held is not None and not seen.partial and seen.router_age_s <= its.settings.stale_s
