"""What a worker says of itself: the few series of vLLM's ``/metrics`` that scheduling reads.

Always late (a worker reports seconds behind, and is asked every few seconds), so each reading carries when it was made,
and a reading that is too old is as good as none.

One server may run several engines (``engine`` labels): requests are added up, the use of the KV cache is the mean. Of
``vllm:lora_requests_info`` the series with the highest value counts, which is the time it was written.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Final

_SERIES: Final = re.compile(
    rb"^vllm:(num_requests_running|num_requests_waiting|kv_cache_usage_perc|lora_requests_info"
    rb"|inter_token_latency_seconds_sum|inter_token_latency_seconds_count)"
    rb'(?:\{((?:[^"}\n]|"(?:[^"\\\n]|\\.)*")*)\})?[ \t]+(\S+)',
    re.MULTILINE,
)
_LABEL: Final = re.compile(rb'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True)
class WorkerMetrics:
    """One reading. ``at``: when, in the router's seconds; ``sent``: the router's own count of requests there then."""

    at: float
    sent: int
    running: int
    waiting: int
    kv_usage: float
    """0 to 1."""
    adapters_running: frozenset[str] = frozenset()
    adapters_waiting: frozenset[str] = frozenset()
    adapters_max: int = 0
    """LoRA adapters that fit into a batch; 0: not known."""
    gap_sum_s: float = 0.0
    """Times between tokens since the worker began, added up..."""
    gaps: int = 0
    """...and how many; 0 where it doesn't say."""
    new_gap_sum_s: float = 0.0
    """The same since the reading before..."""
    new_gaps: int = 0
    """...which is 0 of the first one, and after the worker was started anew."""

    def since(self, before: WorkerMetrics | None) -> WorkerMetrics:
        """The same reading, which knows what is new since the one before."""
        if before is None or not before.gaps < self.gaps or self.gap_sum_s < before.gap_sum_s:
            return self
        return replace(self, new_gap_sum_s=self.gap_sum_s - before.gap_sum_s, new_gaps=self.gaps - before.gaps)


def parse(text: bytes, at: float, sent: int) -> WorkerMetrics | None:
    """Read Prometheus' text format; None when the series are not in it (it is no vLLM, or another version's names)."""
    running: list[float] = []
    waiting: list[float] = []
    usage: list[float] = []
    gap_sum_s, gaps = 0.0, 0.0
    lora_at, lora = -math.inf, b""
    for name, labels, number in _SERIES.findall(text):
        try:
            value = float(number)
        except ValueError:
            continue
        if not math.isfinite(value):
            continue
        if name == b"num_requests_running":
            running.append(value)
        elif name == b"num_requests_waiting":
            waiting.append(value)
        elif name == b"kv_cache_usage_perc":
            usage.append(value)
        elif name == b"inter_token_latency_seconds_sum":
            gap_sum_s += value
        elif name == b"inter_token_latency_seconds_count":
            gaps += value
        elif value > lora_at:
            lora_at, lora = value, labels
    if not running or not waiting:
        return None
    told = dict(_LABEL.findall(lora))
    most = told.get(b"max_lora", b"")
    return WorkerMetrics(
        at, sent, max(0, int(sum(running))), max(0, int(sum(waiting))),
        min(1.0, max(0.0, sum(usage) / len(usage))) if usage else 0.0,
        _names(told.get(b"running_lora_adapters", b"")), _names(told.get(b"waiting_lora_adapters", b"")),
        int(most) if most.isdigit() else 0, max(0.0, gap_sum_s), max(0, int(gaps)),
    )  # fmt: skip


def _names(value: bytes) -> frozenset[str]:
    return frozenset(name.strip() for name in value.decode("utf-8", "replace").split(",") if name.strip())
