"""What scaling goes by: one sample for a model and one of its roles.

``None`` is *not known*, and never stands for 0: what isn't known may keep replicas or add some, and takes none away.
Counts of requests and tokens come from all routers together, the rest from workers and from Kubernetes.
"""

from __future__ import annotations

from typing import Final

import msgspec

UNHEARD: Final = float("inf")
"""Age of a source that has never said anything, in seconds."""


class WorkerSignals(msgspec.Struct, frozen=True, kw_only=True):
    """What one ready worker says of itself (``vllm:num_requests_running``, ``…_waiting``, ``kv_cache_usage_perc``)."""

    kv_usage: float | None = None
    """Part of the KV cache that running requests hold, 0 to 1."""
    running: int | None = None
    waiting: int | None = None
    """Requests that it was sent and has not begun."""
    age_s: float = 0.0
    """How old this is."""


class Signals(msgspec.Struct, frozen=True, kw_only=True):
    """One sample. A model that serves prefill and decode apart has one for each role."""

    replicas: int
    """What the cluster was asked for: ``spec.replicas``."""
    ready: int = 0
    """Of these, those that take requests."""

    held: int | None = None
    """Requests at routers that no worker has: queued, or waiting for the model to wake."""
    held_tokens: int | None = None
    """Their prompts' tokens, as routers estimate them."""
    in_flight: int | None = None
    """Requests at workers, by the routers' own count."""
    in_flight_tokens: int | None = None
    arrivals: int | None = None
    """Requests that came since the sample before, those included that are gone again: answered, refused or given up."""
    router_age_s: float = 0.0
    """How old the oldest of the routers' counts is; ``UNHEARD``: there are none."""
    partial: bool = False
    """Some router was not heard: its requests are missing, so that counts may add replicas and take none away."""

    workers: tuple[WorkerSignals, ...] = ()
    """Of the ready workers those that could be asked."""
    ttft_s: float | None = None
    """Time to the first token in the last minutes, at the percentile the objective is about; None also: no requests."""
    itl_s: float | None = None
    """Time between tokens, likewise."""
    latency_age_s: float = 0.0

    @property
    def starting(self) -> int:
        """Replicas that were asked for and are not ready."""
        return max(0, self.replicas - self.ready)
