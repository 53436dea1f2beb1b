"""What the best rule could reach that knows every model's rate at all times, but not when requests come.

Requests are a Poisson process at a rate that is known here (``traffic.planned``), so what came so far says nothing of
when the next one comes. A rule chooses when there is a first replica; it may not take one away that the reactive policy
would hold. That is a Markov decision process: a model is asleep, starts, or has a replica that is held for some time
yet. It is solved backwards in time (Puterman, Markov Decision Processes, 1994, chapter 4), with a price for a second of
a replica in requests that are hit. By weak duality no rule within a budget has fewer of these than the least sum at any
price, less what the budget costs at that price (Altman, Constrained Markov Decision Processes, 1999).

Further replicas, and whom their starts hit, are left out; a replica that was raised may go as soon as it is ready;
starts read from the node's disk. So what it says is to be compared with what it says of the reactive policy, and that
with the simulator (docs/performance.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.cluster.nodes import start_s
from benchmarks.cluster.site import NOTICED_S
from benchmarks.cluster.traffic import NOISE_S, ModelSpec, Times

STEP_S: Final = 15.0
WORTHS: Final = (400.0, 500.0, 600.0, 700.0)
"""Prices that are tried: seconds of a replica for one request."""


class Cost(NamedTuple):
    """Expected, of all models' first replicas: requests hit, and seconds of replicas."""

    hit: float
    replica_s: float


class Least(NamedTuple):
    """Requests that are hit, as is expected here: with the reactive policy, and at least, whatever the rule."""

    reactive: float
    fewest: float


def reactive(models: Sequence[tuple[ModelSpec, Times]], start: float, end: float, hold_s: float) -> Cost:
    """What the reactive policy costs in this model: to be compared with the simulator. ``hold_s``: for how long a
    request keeps a replica, in seconds; ``start``, ``end``: seconds since rates begin."""
    return _solved(models, start, end, hold_s, None)


def fewest(models: Sequence[tuple[ModelSpec, Times]], start: float, end: float, hold_s: float, more_s: float) -> Least:
    """What the best rule can do with ``more_s`` more seconds of replicas than the reactive policy takes."""
    plain = reactive(models, start, end, hold_s)
    budget = plain.replica_s + more_s
    costs = [(worth, _solved(models, start, end, hold_s, worth)) for worth in WORTHS]
    return Least(plain.hit, max(cost.hit + (cost.replica_s - budget) / worth for worth, cost in costs))


def _solved(
    models: Sequence[tuple[ModelSpec, Times]], start: float, end: float, hold_s: float, worth_s: float | None
) -> Cost:
    """The rule that is best at a price; the reactive one without."""
    count, held = len(models), round(hold_s / STEP_S)
    steps = round((end - start) / STEP_S)
    rates = np.array([rate for _, rate in models])
    starts_s = np.array([start_s(spec, cached=True) for spec, _ in models])
    starts = np.rint(starts_s / STEP_S).astype(int)
    price = np.array([1.0, 1.0 / worth_s if worth_s else 0.0])[:, None]
    # of the two costs in all that follows the first axis: requests hit, and seconds
    awake = np.zeros((2, held + 1, count))  # by the steps that the replica is held for yet
    asleep = np.zeros((2, count))
    fulls, frees = (np.zeros((steps + 1 + int(starts.max()), 2, count)) for _ in range(2))
    each = np.arange(count)
    for step in range(steps - 1, -1, -1):
        rate = rates[:, math.floor((start + step * STEP_S) / NOISE_S)]
        comes = -np.expm1(-rate * STEP_S)
        waking = np.stack([1 + rate * (starts_s - NOTICED_S), starts_s]) + fulls[step + 1 + starts, :, each].T
        sleeps = comes * waking + (1 - comes) * asleep
        stays = comes * awake[:, -1:] + (1 - comes) * np.concatenate([awake[:, :1], awake[:, :-1]], axis=1)
        stays[1] += STEP_S
        if worth_s is None:
            asleep = sleeps
            stays[:, 0] = asleep
        else:
            raised = np.stack([rate * (starts_s - NOTICED_S), starts_s]) + frees[step + starts, :, each].T
            asleep = _better(sleeps, raised, price)
            stays[:, 0] = _better(asleep, stays[:, 0], price)
        awake = stays
        fulls[step], frees[step] = awake[:, -1], awake[:, 0]
    hit, replica_s = asleep.sum(axis=1)
    return Cost(float(hit), float(replica_s))


def _better(one: NDArray[np.float64], other: NDArray[np.float64], price: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where((one * price).sum(axis=0) <= (other * price).sum(axis=0), one, other)
