"""Whether a model is to be up on this machine: what the cluster's scaling policy (``orchestrator.scaling``) says of it,
where one replica is the most. There is no other rule of when a model goes because nobody uses it, nor of when one
comes; whether there is memory for it is another question (``helios.launch.demand``). No I/O.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from helios.launch.resident import Model, State

if TYPE_CHECKING:
    from orchestrator.scaling.signals import Signals

ASKED_S: Final = 10.0
"""Who asks for a model says so again every few seconds: after so long nobody waits for it any more, in seconds."""
THERE: Final = (State.STARTING, State.WAKING, State.UP)
"""Those that count as a replica; those that fall asleep or end are not looked at until they have."""


@dataclass(frozen=True, slots=True)
class Use:
    """What a worker has said of its requests. ``running``: those it has, begun or not; ``ended``: that have ended since
    it was asked before. None: not known."""

    running: int | None
    ended: int | None

    @property
    def none(self) -> bool:
        """Whether it is known that there were none."""
        return self.running == 0 and self.ended == 0


class Wanted:
    """The policy for the models of one machine. Times in seconds."""

    def __init__(self, idle_s: float, warm_s: float) -> None:
        """``idle_s``: a model goes when nobody has used it for so long, 0: never; ``warm_s``: but stays so long after
        it came, at least."""
        from orchestrator.scaling.policy import Policy
        from orchestrator.scaling.settings import ForecastSettings, ScalingSettings

        self._policy = Policy(
            ScalingSettings(
                max_replicas=1,
                idle_s=idle_s or math.inf,
                warm_s=warm_s,
                kv_usage=0.0,
                interval_s=1.0,
                forecast=ForecastSettings(mode="off"),
            )
        )

    def decide(self, model: Model, now: float) -> None:
        """Have the policy look at a model: sets whether it is ``wanted``, and ``why``."""
        decision = self._policy.decide(now, self._seen(model, now), model.scaling)
        model.scaling, model.arrivals = decision.state, 0
        model.wanted, model.why = decision.replicas > 0, decision.why[-1]

    def _seen(self, model: Model, now: float) -> Signals:
        from orchestrator.scaling.signals import Signals

        there, up = model.state in THERE, model.state is State.UP
        asked = model.wanted_since is not None and now - model.asked_at <= ASKED_S
        return Signals(
            replicas=int(there),
            ready=int(up),
            held=int(asked),
            in_flight=model.running if up else 0,
            arrivals=model.arrivals if up else 0,
            router_age_s=now - model.looked_at if up else 0.0,
        )


def looked(model: Model, use: Use, now: float) -> None:
    """A worker was asked. Those that ended stand for those that came, of which the policy wants to hear: one that came
    and went between two looks is among them, and idle times begin at the end of the last."""
    if not use.none:
        model.used_at = now
    model.running, model.looked_at = use.running, now
    if use.running is not None:  # else what came meanwhile is among those of the next look that succeeds
        model.arrivals = None if use.ended is None or model.arrivals is None else model.arrivals + use.ended
