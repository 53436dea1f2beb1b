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

import math
from collections import deque
from typing import Final

import numpy as np

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


class Hpa:
    interval_s = 15.0
    TOLERANCE, WINDOW_S = 0.1, 300.0

    def __init__(self) -> None:
        self._said: dict[int, deque[tuple[float, int]]] = {}

    def look(self, now: float, site: Site) -> None:
        for model in site.models:
            if not model.wanted:  # as installed
                site.scale(now, model, 1)
                continue
            wanted, load = model.wanted, (model.flying + len(model.held)) / (TARGET * model.spec.slots)
            said = wanted if abs(load / wanted - 1) <= self.TOLERANCE else max(1, math.ceil(load))
            window = self._said.setdefault(model.number, deque())
            while window and window[0][0] < now - self.WINDOW_S:
                window.popleft()
            window.append((now, said))
            if said < wanted:
                said = min(wanted, max(number for _, number in window))
            said = min(said, max(2 * wanted, wanted + 4), MOST)
            if said != wanted:
                site.scale(now, model, said)

    def held(self, now: float, site: Site, model: Model) -> None: ...


class KubeAi:
    interval_s = 10.0
    WINDOW, DELAY_S = 60, 30.0

    def __init__(self) -> None:
        self._past: dict[int, deque[int]] = {}
        self._sums: dict[int, int] = {}
        self._votes: dict[int, int] = {}

    def look(self, now: float, site: Site) -> None:
        for model in site.models:
            past = self._past.setdefault(model.number, deque([0] * self.WINDOW))
            active = model.flying + len(model.held)
            past.append(active)
            total = self._sums[model.number] = self._sums.get(model.number, 0) + active - past.popleft()
            said = min(MOST, math.ceil(total / self.WINDOW / (TARGET * model.spec.slots)))
            if said >= model.wanted:
                self._votes[model.number] = 0
                if said > model.wanted:
                    site.scale(now, model, said)
                continue
            votes = self._votes[model.number] = self._votes.get(model.number, 0) + 1
            if votes >= self.DELAY_S / self.interval_s:
                site.scale(now, model, said)

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
        outlook = None
        if self._forecasts is not None:
            forecast = self._forecasts[number]
            forecast.observe(at, model.arrivals, model.flying)
            outlook, made_at = self._outlooks.get(number, (None, 0.0))
            if now - made_at >= OUTLOOK_S:
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
        if decision.prefetch > decision.replicas:
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
