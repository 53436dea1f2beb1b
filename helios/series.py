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
        self._series: dict[tuple[str, ...], list[Count]] = {}
        registry.register(self)

    def labels(self, *values: str) -> Count:
        """That of these values, in the order of the labels; keep it."""
        return (self._series.get(values) or [self.another(*values)])[0]

    def another(self, *values: str) -> Count:
        """One more of these values: what is shown is their sum. For who tells apart more than is shown."""
        assert len(values) == len(self._labels)
        count = Count()
        self._series.setdefault(values, []).append(count)
        return count

    def fold(self, count: Count, into: Count, *values: str) -> None:
        """Count for ``into`` what one more of the same values had, which counts no more."""
        into.value += count.value
        self._series[values].remove(count)

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        family = CounterMetricFamily(self._name, self._documentation, labels=self._labels)
        for values, counts in self._series.items():
            created = min(count.created for count in counts)
            family.add_metric(values, sum(count.value for count in counts), created=created)
        return iter((family,))


class Time:
    """One histogram; an observation is a search and two additions."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.sum += seconds

    def add(self, other: Time) -> None:
        """What another one of the same bounds has seen."""
        self.counts = [mine + its for mine, its in zip(self.counts, other.counts, strict=True)]
        self.sum += other.sum


class Times(Collector):
    """A histogram of seconds with one label."""

    def __init__(
        self, name: str, documentation: str, label: str, bounds: Sequence[float], registry: CollectorRegistry
    ) -> None:
        self._about = name, documentation, label
        self._bounds = tuple(bounds)
        self._series: dict[str, list[Time]] = {}
        registry.register(self)

    def another(self, value: str) -> Time:
        """One more of this value of the label; keep it. What is shown is the sum of all of a value."""
        time = Time(self._bounds)
        self._series.setdefault(value, []).append(time)
        return time

    def fold(self, time: Time, into: Time, value: str) -> None:
        """Count for ``into`` what one more of the same value had, which counts no more."""
        into.add(time)
        self._series[value].remove(time)

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        name, documentation, label = self._about
        family = HistogramMetricFamily(name, documentation, labels=[label])
        edges = [floatToGoString(bound) for bound in (*self._bounds, math.inf)]  # type: ignore[no-untyped-call]
        for value, parts in self._series.items():
            one = Time(self._bounds)
            for part in parts:
                one.add(part)
            family.add_metric([value], list(zip(edges, accumulate(one.counts), strict=True)), one.sum)
        return iter((family,))
