"""The cluster and its clock: requests come, wait, and are worked at; replicas start, drain and end.

A replica works at as many requests as it has slots; what finds none free is held at the router, in order, however long
it takes, as Helios does (``waking_s`` and ``saturated_s`` aside). Who scales is told of a request for a model that has
no replica, looks in its own intervals, and calls ``scale``. A replica that is to go gets nothing new and ends with its
last request. It takes its GPUs from when it is placed until it is gone, and that is what is paid for; without free GPUs
it waits.

A request counts as **hit by a cold start** if it waited for more than a second, and a replica of its model was starting
meanwhile. It **misses its objective** if it waited for more than ``OBJECTIVE_S``.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from typing import Any, Final, Protocol

import numpy as np

from benchmarks.cluster.nodes import Node, Nodes, start_s
from benchmarks.cluster.traffic import Stream

OBJECTIVE_S: Final = 5.0
NOTICED_S: Final = 1.0
TICK, READY, DONE, GONE = range(4)


class Scaler(Protocol):
    """Who decides how many replicas there are."""

    interval_s: float

    def look(self, now: float, site: Site) -> None:
        """Its interval is over."""
        ...

    def held(self, now: float, site: Site, model: Model) -> None:
        """A router holds a request for a model that has no replica, and no other request of it."""
        ...


class Replica:
    __slots__ = ("draining", "load", "node", "ready", "since")

    def __init__(self, since: float) -> None:
        self.since = since
        self.node: Node | None = None
        self.ready = self.draining = False
        self.load = 0


class Model:
    """One model and its replicas; ``wanted`` is ``spec.replicas``."""

    __slots__ = (
        "arrivals", "flying", "held", "last_ready", "number", "ready", "replicas", "spec", "starting", "wanted",
    )  # fmt: skip

    def __init__(self, number: int, stream: Stream) -> None:
        self.number, self.spec = number, stream.model
        self.replicas: list[Replica] = []
        """Those that are not draining."""
        self.held: deque[tuple[float, float]] = deque()
        """When each came, and what it takes."""
        self.flying = self.arrivals = self.starting = self.ready = self.wanted = 0
        self.last_ready = -1.0


class Site:
    """One run of one scaler. Times are seconds since the streams began, ``start`` to ``end``."""

    def __init__(self, streams: Sequence[Stream], nodes: int, start: float, end: float) -> None:
        self.models = [Model(number, stream) for number, stream in enumerate(streams)]
        self.nodes = Nodes(nodes)
        self.end = end
        self.start = start
        self._streams = streams
        self._events: list[tuple[float, int, int, Any, Any]] = []
        self._number = 0
        self._unplaced: deque[tuple[Model, Replica]] = deque()
        self.requests = self.hit = self.missed = self.starts = 0
        self.replica_s = self.gpu_s = 0.0
        self.waits: list[float] = []

    def run(self, scaler: Scaler) -> None:
        """All of it."""
        ends = [np.searchsorted(stream.at, (self.start, self.end)) for stream in self._streams]
        at = np.concatenate([stream.at[first:last] for stream, (first, last) in zip(self._streams, ends, strict=True)])
        takes = np.concatenate(
            [stream.takes[first:last] for stream, (first, last) in zip(self._streams, ends, strict=True)]
        )
        whose = np.repeat(np.arange(len(ends)), [last - first for first, last in ends])
        order = np.argsort(at, kind="stable")
        self.requests = len(order)
        self._add(self.start, TICK, scaler, None)
        events, models = self._events, self.models
        for now, taken, number in zip(at[order].tolist(), takes[order].tolist(), whose[order].tolist(), strict=True):
            while events[0][0] <= now:
                self._event(heapq.heappop(events))
            model = models[number]
            model.arrivals += 1
            if not model.held and (replica := _least(model)) is not None:
                self._begin(now, model, replica, taken)
                continue
            model.held.append((now, taken))
            if not model.wanted and len(model.held) == 1:
                scaler.held(now, self, model)
        while events and events[0][0] <= self.end:
            self._event(heapq.heappop(events))
        for model in models:
            for came, _ in model.held:
                self._waited(model, came, self.end)
            for replica in model.replicas:
                self._paid(model, replica, self.end)
        for _, _, what, model, replica in events:
            if what == DONE and replica.draining:
                replica.load -= 1
                if not replica.load:
                    self._paid(model, replica, self.end)

    def scale(self, now: float, model: Model, replicas: int) -> None:
        """There shall be so many."""
        model.wanted = replicas
        while len(model.replicas) < replicas:
            replica = Replica(now)
            model.replicas.append(replica)
            model.starting += 1
            if not self._place(now, model, replica):
                self._unplaced.append((model, replica))
        while len(model.replicas) > replicas:  # as Kubernetes does: those that are not ready first, then the youngest
            replica = min(model.replicas, key=lambda one: (one.ready, one.load, -one.since))
            model.replicas.remove(replica)
            replica.draining = True
            if replica.ready:
                model.ready -= 1
            else:
                model.starting -= 1
            if not replica.load:
                self._gone(now, model, replica)

    # --- what happens ---

    def _event(self, event: tuple[float, int, int, Any, Any]) -> None:
        now, _, what, model, replica = event
        if what == DONE:
            replica.load -= 1
            model.flying -= 1
            if replica.draining:
                if not replica.load:
                    self._gone(now, model, replica)
            elif model.held:
                self._next(now, model, replica)
        elif what == READY:
            if replica.draining:
                return
            replica.ready = True
            model.ready += 1
            model.starting -= 1
            model.last_ready = now
            while model.held and replica.load < model.spec.slots:
                self._next(now, model, replica)
        else:
            model.look(now, self)  # a scaler
            self._add(now + model.interval_s, TICK, model, None)

    def _next(self, now: float, model: Model, replica: Replica) -> None:
        came, takes = model.held.popleft()
        self._waited(model, came, now)
        self._begin(now, model, replica, takes)

    def _begin(self, now: float, model: Model, replica: Replica, takes: float) -> None:
        replica.load += 1
        model.flying += 1
        self._number += 1
        heapq.heappush(self._events, (now + takes, self._number, DONE, model, replica))

    def _waited(self, model: Model, came: float, now: float) -> None:
        waited = now - came
        self.waits.append(waited)
        self.missed += waited > OBJECTIVE_S
        self.hit += waited > NOTICED_S and (model.starting > 0 or model.last_ready >= came)

    def _place(self, now: float, model: Model, replica: Replica) -> bool:
        placed = self.nodes.place(model.spec)
        if placed is None:
            return False
        replica.node, cached = placed
        replica.since = now
        self.starts += 1
        self._add(now + start_s(model.spec, cached), READY, model, replica)
        return True

    def _gone(self, now: float, model: Model, replica: Replica) -> None:
        if replica.node is None:
            self._unplaced.remove((model, replica))
            return
        replica.node.free += model.spec.gpus
        self._paid(model, replica, now)
        while self._unplaced and self._place(now, *self._unplaced[0]):
            self._unplaced.popleft()

    def _paid(self, model: Model, replica: Replica, now: float) -> None:
        if replica.node is not None:
            self.replica_s += now - replica.since
            self.gpu_s += (now - replica.since) * model.spec.gpus

    def _add(self, at: float, what: int, one: Any, other: Any) -> None:
        self._number += 1
        heapq.heappush(self._events, (at, self._number, what, one, other))


def _least(model: Model) -> Replica | None:
    """The ready replica with the fewest requests that has a free slot."""
    best, load = None, model.spec.slots
    for replica in model.replicas:
        if replica.ready and replica.load < load:
            best, load = replica, replica.load
    return best
