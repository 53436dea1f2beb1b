"""``InferenceService``: a Model that answers requests, with one kind of workers or with prefill and decode apart."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, field

from orchestrator.api.common import (
    MAX_SECONDS,
    Commit,
    Condition,
    Count,
    FreeForm,
    Name,
    Part,
    Percent,
    Quantity,
    Seconds,
)

Positive = Annotated[int, Meta(ge=1)]


class ModelRef(Part, frozen=True, kw_only=True):
    """A Model of the same namespace."""

    name: Name


class Engine(Part, frozen=True, kw_only=True):
    """The program in the pods: ``helios worker`` around an unmodified vLLM (docs/worker.md)."""

    image: Annotated[str, Meta(min_length=1)] = ""
    """Default: the operator's ``worker_image``."""
    args: list[str] = field(default_factory=list)
    """vLLM's."""
    env: list[FreeForm] = field(default_factory=list)
    """As in a container."""
    connector: Literal["nixl", "nixl-push", "mooncake", "shared-storage", "none"] = "nixl"
    """What carries KV blocks from prefill to decode."""
    start_timeout_seconds: Annotated[int, Meta(ge=10, le=MAX_SECONDS)] = 900
    drain_seconds: Annotated[int, Meta(ge=5, le=MAX_SECONDS)] = 120
    shared_memory: Quantity = "8Gi"
    """Limit of the memory at ``/dev/shm``."""


class Accelerator(Part, frozen=True, kw_only=True):
    type: str | None = None
    """Value of the node label ``label``: ``NVIDIA-H100-80GB-HBM3``. Default: any."""
    label: str = "nvidia.com/gpu.product"
    resource: str = "nvidia.com/gpu"
    count: Annotated[int, Meta(ge=0, le=64)] = 1
    """Of each worker; it is its tensor-parallel size, too. 0: it runs on the CPU."""


class Placement(Part, frozen=True, kw_only=True):
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: list[FreeForm] = field(default_factory=list)
    zone_spread: Literal["None", "Preferred", "Required"] = "Preferred"
    prefer_cached: bool = True
    """Nodes come first that have the commit in their caches."""
    near: bool = True
    """Prefill workers come near decode workers of the same service (same zone; blocks travel between them)."""
    priority_class_name: str | None = None
    runtime_class_name: str | None = None


class Targets(Part, frozen=True, kw_only=True):
    """What one worker is to have at most, on average. What is left out does not count."""

    in_flight: Positive | None = 16
    queued: Positive | None = 4
    """Requests that wait in the engine or at the router, for each worker."""
    tokens: Positive | None = None
    """Tokens in flight."""
    kv_usage_percent: Annotated[int, Meta(ge=1, le=100)] | None = 80
    ttft_milliseconds: Positive | None = None
    """Objective for the time to the first token, at the 95th percentile."""
    itl_milliseconds: Positive | None = None
    """… for the time between tokens."""


class Forecast(Part, frozen=True, kw_only=True):
    mode: Literal["Off", "Observe", "Act"] = "Observe"
    """``Observe``: it is computed and shown; ``Act``: it raises replicas ahead of demand, and lowers none."""
    margin_percent: Percent = 10


class Overprovision(Part, frozen=True, kw_only=True):
    """Room for bursts above what is needed now."""

    replicas: Count = 0
    percent: Percent = 0


class Scaling(Part, frozen=True, kw_only=True):
    by: Literal["Auto", "Operator", "HPA", "KEDA"] = "Auto"
    """Who moves replicas between 1 and the maximum; 0 to 1 and back is the operator's in any case. ``Auto``: an HPA
    where the cluster has the operator's external metrics, else the operator."""
    min_replicas: Count = 1
    """0: it may sleep."""
    max_replicas: Annotated[int, Meta(ge=1, le=10_000)] = 4
    targets: Targets = Targets()
    idle_seconds: Annotated[int, Meta(ge=10, le=MAX_SECONDS)] = 600
    """With ``min_replicas: 0``: how long nothing may have been asked for before it sleeps."""
    warm_seconds: Seconds = 120
    """How long it stays up after it woke, whatever is asked for."""
    up_window_seconds: Seconds = 0
    down_window_seconds: Seconds = 300
    max_cost: Positive | None = None
    """Ceiling for accelerators of all its workers together."""
    overprovision: Overprovision = Overprovision()
    forecast: Forecast = Forecast()


class Role(Part, frozen=True, kw_only=True):
    """One kind of workers."""

    accelerator: Accelerator = Accelerator()
    cpu: Quantity = "4"
    memory: Quantity = "16Gi"
    cache: Quantity = "20Gi"
    """Room for what the engine compiles and writes (an emptyDir)."""
    args: list[str] = field(default_factory=list)
    """vLLM's, after the engine's."""
    scaling: Scaling | None = None
    """Default: the service's."""
    placement: Placement | None = None


class Weight(Part, frozen=True, kw_only=True):
    commit: Commit
    weight: Annotated[int, Meta(ge=0, le=100)]


class Rollout(Part, frozen=True, kw_only=True):
    """How requests move to a new commit."""

    strategy: Literal["Shift", "Recreate"] = "Shift"
    """``Shift``: workers of both commits run, and requests move by steps. ``Recreate``: the old ones go first; for
    where there are accelerators for one of the two only."""
    steps: list[Annotated[int, Meta(ge=1, le=100)]] = field(default_factory=lambda: [10, 50, 100])
    """Share of the new commit in each step, in percent; they rise and end with 100."""
    step_seconds: Annotated[int, Meta(ge=1, le=MAX_SECONDS)] = 300
    max_error_percent: Percent = 2
    """More errors than the old commit has by this much: the old one comes back."""
    max_ttft_percent: Annotated[int, Meta(ge=100)] = 150
    """A time to first token that is this much of the old commit's (median): the old one comes back."""
    min_requests: Count = 20
    """Fewer requests in a step say nothing: it lasts until there are so many, or ``progress_deadline_seconds``."""
    progress_deadline_seconds: Seconds = 3600
    """A new commit whose next workers aren't ready after so long: the old one comes back."""


class Limits(Part, frozen=True, kw_only=True):
    """Of the service at the router."""

    max_in_flight: Count | None = None
    max_queued: Count | None = None


class ServiceSpec(Part, frozen=True, kw_only=True):
    model: ModelRef
    served_name: Annotated[str, Meta(min_length=1, max_length=200)] | None = None
    """The name by which clients ask for it; default: the repository's. (More names: the router's ``aliases``.)"""
    engine: Engine = Engine()
    aggregated: Role | None = None
    prefill: Role | None = None
    decode: Role | None = None
    scaling: Scaling = Scaling()
    placement: Placement = Placement()
    rollout: Rollout = Rollout()
    traffic: list[Weight] = field(default_factory=list)
    """A split between commits that stays, in percent of the sum; while there is one, nothing is rolled out."""
    limits: Limits = Limits()


class RoleStatus(Part, frozen=True, kw_only=True):
    replicas: int = 0
    ready: int = 0
    desired: int = 0
    reason: str = ""
    """Why so many."""
    forecast: int | None = None


class RevisionStatus(Part, frozen=True, kw_only=True):
    commit: Commit
    weight: int = 0
    ready: int = 0
    since: str = ""
    """RFC 3339: since when it has this weight."""


class ServiceStatus(Part, frozen=True, kw_only=True):
    """Conditions: ``ModelReady``, ``Scheduled``, ``Available``, ``Progressing``, ``ScalingActive``, and ``Ready``."""

    observed_generation: int = 0
    conditions: list[Condition] = field(default_factory=list)
    commit: Commit | None = None
    """The one that gets requests, or most of them."""
    revisions: list[RevisionStatus] = field(default_factory=list)
    refused: Commit | None = None
    """A commit that was rolled back; it is not tried again, until another one has all requests."""
    refused_at: str = ""
    """RFC 3339: when that was."""
    roles: dict[str, RoleStatus] = field(default_factory=dict)
    replicas: int = 0
    """Of the decode or only role: what ``kubectl scale`` shows."""
    selector: str = ""
    scaling: str = ""
    """The scaling policy's state, opaque."""
