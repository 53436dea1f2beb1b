"""Who scales: Helios' policy as it is, and beside it others, made after their descriptions.

- ``Hpa``: Kubernetes' HorizontalPodAutoscaler on the average of requests per pod (docs: "Horizontal Pod Autoscaling",
  algorithm details): every 15 s ``ceil(sum / target)``, unless that is within 10% of what there is; up at most by 4
  pods or 100% in 15 s, down to the most that was recommended within 300 s; never below 1.
- ``KubeAi``: its moving average (docs: "Autoscaling"): every 10 s ``ceil(average / target)`` of the requests of the
  last 10 minutes; down only after its ``scaleDownDelaySeconds``, 30 s, by so many votes in a row; a request for a model
  without replicas brings one at once.

All are given the same requests per replica to aim at, three quarters of the slots.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.cluster.site import Model, Site
from benchmarks.cluster.traffic import MONDAY, WEEK, Stream
from orchestrator.scaling.forecast import Forecast
from orchestrator.scaling.outlook import Outlook
from orchestrator.scaling.policy import Policy
from orchestrator.scaling.settings import ScalingSettings
from orchestrator.scaling.signals import Signals
from orchestrator.scaling.state import State

TARGET: Final = 0.75
MOST: Final = 40
LEARN_S: Final = 300.0
OUTLOOK_S: Final = 59.0
"""A forecast is asked again after so long, in seconds."""


def _active(site: Site) -> NDArray[np.int64]:
    """Requests of each model, under way and held."""
    return np.array([model.flying + len(model.held) for model in site.models])


class Hpa:
    interval_s = 15.0
    TOLERANCE, WINDOW = 0.1, 21
    """Looks within 300 s, this one and the one 300 s before included."""

    def __init__(self) -> None:
        self._said: NDArray[np.int64] | None = None
        self._look = 0

    def look(self, now: float, site: Site) -> None:
        wanted = np.array([model.wanted for model in site.models])
        load = _active(site) / np.array([TARGET * model.spec.slots for model in site.models])
        near = np.abs(load - wanted) <= self.TOLERANCE * wanted
        said = np.where(near, wanted, np.maximum(1, np.ceil(load))).astype(int)
        if self._said is None:  # as installed
            self._said = np.zeros((self.WINDOW, len(site.models)), dtype=int)
            said = np.ones(len(site.models), dtype=int)
        self._said[self._look % self.WINDOW] = said
        self._look += 1
        said = np.where(said < wanted, np.minimum(wanted, self._said.max(axis=0)), said)
        said = np.minimum(said, np.where(wanted, np.maximum(2 * wanted, wanted + 4), 1))
        for number in np.flatnonzero(said != wanted):
            site.scale(now, site.models[number], min(MOST, int(said[number])))

    def held(self, now: float, site: Site, model: Model) -> None: ...


class KubeAi:
    interval_s = 10.0
    WINDOW, DELAY_S = 60, 30.0

    def __init__(self) -> None:
        self._past: NDArray[np.int64] | None = None
        self._sum = self._votes = np.zeros(0, dtype=int)
        self._look = 0

    def look(self, now: float, site: Site) -> None:
        active = _active(site)
        if self._past is None:
            self._past = np.zeros((self.WINDOW, len(active)), dtype=int)
            self._sum, self._votes = np.zeros_like(active), np.zeros_like(active)
        place = self._look % self.WINDOW
        self._look += 1
        self._sum = self._sum + active - self._past[place]
        self._past[place] = active
        wanted = np.array([model.wanted for model in site.models])
        each = np.array([TARGET * model.spec.slots for model in site.models])
        said = np.ceil(self._sum / self.WINDOW / each).astype(int)
        self._votes = np.where(said < wanted, self._votes + 1, 0)
        due = (said > wanted) | (self._votes * self.interval_s >= self.DELAY_S)
        for number in np.flatnonzero(due):
            site.scale(now, site.models[number], min(MOST, int(said[number])))

    def held(self, now: float, site: Site, model: Model) -> None:
        site.scale(now, model, 1)


class Helios:
    """The operator's loop: it looks when a decision says so, and when a router holds something. With ``learnt``, a
    forecast for each model that has seen what came before, it acts on forecasts."""

    def __init__(self, settings: ScalingSettings, learnt: list[Forecast] | None = None) -> None:
        self.interval_s = settings.interval_s
        self._policy = Policy(settings)
        self._states: dict[int, State] = {}
        self._due: dict[int, float] = {}
        self._forecasts = learnt
        self._outlooks: dict[int, tuple[Outlook | None, float]] = {}

    def look(self, now: float, site: Site) -> None:
        for model in site.models:
            if now >= self._due.get(model.number, now):
                self._decide(now, site, model)

    def held(self, now: float, site: Site, model: Model) -> None:
        self._decide(now, site, model)

    def _decide(self, now: float, site: Site, model: Model) -> None:
        number, state = model.number, self._states.get(model.number)
        at = MONDAY + now
        outlook, fresh = None, False
        if self._forecasts is not None:
            forecast = self._forecasts[number]
            forecast.observe(at, model.arrivals, model.flying)
            outlook, made_at = self._outlooks.get(number, (None, 0.0))
            if now - made_at >= OUTLOOK_S or outlook is None:
                fresh = True
                outlook = forecast.outlook(at, self._policy.lead_s(state))
                self._outlooks[number] = outlook, now
        seen = Signals(
            replicas=model.wanted, ready=model.ready, held=len(model.held), in_flight=model.flying,
            arrivals=model.arrivals,
        )  # fmt: skip
        model.arrivals = 0
        decision = self._policy.decide(at, seen, state, outlook)
        self._states[number] = decision.state
        self._due[number] = now + decision.next_look_s - 1e-3
        if decision.replicas != model.wanted:
            site.scale(now, model, decision.replicas)
        if fresh and decision.prefetch > decision.replicas:
            site.nodes.prefetch(model.spec, decision.prefetch)


def learnt(streams: list[Stream], settings: ScalingSettings, weeks: int) -> list[Forecast]:
    """Forecasts that have seen so many weeks, a look in five minutes: as they would be in a cluster in which nobody
    waits."""
    made = []
    edges = np.arange(0.0, weeks * WEEK + 1, LEARN_S)
    for stream in streams:
        forecast = Forecast(settings.forecast)
        came = np.diff(np.searchsorted(stream.at, edges)).tolist()
        flying = (
            np.searchsorted(stream.at, edges[1:]) - np.searchsorted(np.sort(stream.at + stream.takes), edges[1:])
        ).tolist()
        for edge, arrivals, busy in zip(edges[1:].tolist(), came, flying, strict=True):
            forecast.observe(MONDAY + edge, arrivals, busy)
        made.append(forecast)
    return made
