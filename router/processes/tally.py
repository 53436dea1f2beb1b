"""What several processes have counted, as one: ``/metrics`` of the whole router.

Counters and histograms are summed. What a process had counted when it was last asked stays in the sum after it has
died, so a counter never goes back. Gauges are summed over the living, except those of ``SHARED``, which each process
reads from what all share: of these the largest counts, as of an info. A ``_created`` is the earliest.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Final

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric

SHARED: Final = frozenset(
    f"helios_router_{name}"
    for name in (
        "in_flight", "in_flight_tokens", "worker_up", "breaker_state", "worker_hung", "shared_limits_up",
        "discovered_workers", "discovery_problems", "discovery_fresh_timestamp_seconds", "models_awaited",
        "warm_pairs",
    )
)  # fmt: skip
"""Gauges that say the same in every process, or one thing of one worker: what is worst counts."""
KEPT: Final = frozenset({"counter", "histogram", "summary"})
"""Kinds of metrics that outlive their process."""

Labels = tuple[tuple[str, str], ...]


class Sample(msgspec.Struct, frozen=True, array_like=True):
    name: str
    labels: Labels
    value: float


class Family(msgspec.Struct, frozen=True, array_like=True):
    """A metric of one process; ``kind`` is Prometheus' type."""

    name: str
    kind: str
    help: str
    samples: list[Sample]


def snapshot(registry: CollectorRegistry) -> list[Family]:
    """What a registry holds now."""
    return [
        Family(
            metric.name,
            metric.type,
            metric.documentation,
            [Sample(s.name, tuple(s.labels.items()), float(s.value)) for s in metric.samples],
        )
        for metric in registry.collect()
    ]


class _Sum:
    """One metric, summed so far."""

    __slots__ = ("help", "kind", "name", "values")

    def __init__(self, family: Family) -> None:
        self.name, self.kind, self.help = family.name, family.kind, family.help
        self.values: dict[tuple[str, Labels], float] = {}

    def add(self, samples: Iterable[Sample]) -> None:
        values = self.values
        largest = self.kind == "info" or self.name in SHARED
        for sample in samples:
            key = (sample.name, sample.labels)
            before = values.get(key)
            if before is None:
                values[key] = sample.value
            elif sample.name.endswith("_created"):
                values[key] = min(before, sample.value)
            else:
                values[key] = max(before, sample.value) if largest else before + sample.value


class Tally:
    """The sums of a router's processes, by whatever names a process."""

    def __init__(self) -> None:
        self._latest: dict[int, list[Family]] = {}
        self._gone: dict[str, _Sum] = {}

    def counted(self, process: int, families: list[Family]) -> None:
        """What a process said last."""
        self._latest[process] = families

    def died(self, process: int) -> None:
        """A process is gone; what it had counted is kept."""
        _add(self._gone, (family for family in self._latest.pop(process, []) if family.kind in KEPT))

    def render(self) -> bytes:
        """The sums, in Prometheus' text form."""
        sums: dict[str, _Sum] = {}
        for gone in self._gone.values():
            copy = sums[gone.name] = _Sum(Family(gone.name, gone.kind, gone.help, []))
            copy.values.update(gone.values)
        for families in self._latest.values():
            _add(sums, families)
        registry = CollectorRegistry()
        registry.register(_Collector(sums.values()))
        return generate_latest(registry)


def _add(sums: dict[str, _Sum], families: Iterable[Family]) -> None:
    for family in families:
        one = sums.get(family.name)
        if one is None:
            one = sums[family.name] = _Sum(family)
        one.add(family.samples)


class _Collector:
    """What ``generate_latest`` reads."""

    def __init__(self, sums: Collection[_Sum]) -> None:
        self._sums = sums

    def collect(self) -> Iterator[Metric]:
        for one in self._sums:
            metric = Metric(one.name, one.help, one.kind)
            for (name, labels), value in one.values.items():
                metric.add_sample(name, dict(labels), value)
            yield metric
