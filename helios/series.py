"""Metrics of what happens with every request, for who counts in one thread.

prometheus-client's own take ten times as long, for a lock that nobody needs here. What is shown is the same.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class Count:
    """One counter."""

    __slots__ = ("created", "value")

    def __init__(self) -> None:
        self.value = 0.0
        self.created = time.time()

    def inc(self, amount: float = 1.0) -> None:
        self.value += amount


class Counts(Collector):
    """A counter with labels."""

    def __init__(self, name: str, documentation: str, labels: Sequence[str], registry: CollectorRegistry) -> None:
        """``name`` without its ``_total``."""
        self._name, self._documentation, self._labels = name, documentation, tuple(labels)
        self._series: dict[tuple[str, ...], Count] = {}
        registry.register(self)

    def labels(self, *values: str) -> Count:
        """That of these values, in the order of the labels; keep it."""
        assert len(values) == len(self._labels)
        return self._series.setdefault(values, Count())

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        family = CounterMetricFamily(self._name, self._documentation, labels=self._labels)
        for values, count in self._series.items():
            family.add_metric(values, count.value, created=count.created)
        return iter((family,))


class Time:
    """One histogram; an observation is a search and two additions."""

    __slots__ = ("_bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(self._bounds, seconds)] += 1
        self.sum += seconds


class Times(Collector):
    """A histogram of seconds with one label."""

    def __init__(
        self, name: str, documentation: str, label: str, bounds: Sequence[float], registry: CollectorRegistry
    ) -> None:
        self._about = name, documentation, label
        self._bounds = tuple(bounds)
        self._series: dict[str, Time] = {}
        registry.register(self)

    def of(self, value: str) -> Time:
        """That of this value of the label; keep it."""
        return self._series.setdefault(value, Time(self._bounds))

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        name, documentation, label = self._about
        family = HistogramMetricFamily(name, documentation, labels=[label])
        edges = [floatToGoString(bound) for bound in (*self._bounds, math.inf)]  # type: ignore[no-untyped-call]
        for value, one in self._series.items():
            family.add_metric([value], list(zip(edges, accumulate(one.counts), strict=True)), one.sum)
        return iter((family,))
