"""``InferenceService``: a Model that answers requests, with one kind of workers or with prefill and decode apart."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, field

from orchestrator.api.common import (
    MAX_SECONDS,
    Arguments,
    Commit,
    Conditions,
    Count,
    EnvironmentVariable,
    LabelKey,
    LabelValue,
    Name,
    Part,
    Percent,
    Quantity,
    Seconds,
    Selector,
    ShortCommit,
    Subdomain,
    Time,
    Toleration,
    Whole,
)

Positive = Annotated[int, Meta(ge=1, le=1_000_000_000)]
Window = Annotated[int, Meta(ge=0, le=3600)]
"""Seconds; an HPA takes no longer ones."""


class ModelRef(Part, frozen=True, kw_only=True):
    """A Model of the same namespace."""

    name: Name
    """Its name."""


class KvStorage(Part, frozen=True, kw_only=True):
    """A volume that prefill and decode workers write to and read from, at ``/kv``."""

    claim_name: Subdomain
    """A PersistentVolumeClaim of the same namespace that many nodes may mount to write (``ReadWriteMany``)."""


class Engine(Part, frozen=True, kw_only=True):
    """The program in the pods: ``helios worker`` around an unmodified vLLM (docs/worker.md)."""

    image: Annotated[str, Meta(min_length=1, max_length=512, pattern=r"^[^\s]+\Z")] | None = None
    """Default: the operator's ``worker_image``."""
    args: Arguments = field(default_factory=list)
    """vLLM's."""
    env: Annotated[
        list[EnvironmentVariable],
        Meta(
            max_length=256,
            extra_json_schema={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
        ),
    ] = field(default_factory=list)
    """As in a container."""
    connector: Literal["nixl", "nixl-push", "mooncake", "shared-storage", "none"] = "nixl"
    """What carries KV blocks from prefill to decode."""
    kv_storage: KvStorage | None = None
    """With ``connector: shared-storage``: where the blocks are. Without it ``args`` name another storage that both see
    (``--kv-transfer-config``)."""
    start_timeout_seconds: Annotated[int, Meta(ge=10, le=MAX_SECONDS)] = 900
    """How long a worker may take to start."""
    drain_seconds: Annotated[int, Meta(ge=5, le=MAX_SECONDS)] = 120
    """How long requests under way have when a worker ends."""
    shared_memory: Quantity = "8Gi"
    """Limit of the memory at ``/dev/shm``."""


class Accelerator(Part, frozen=True, kw_only=True):
    """What a worker computes on."""

    type: Annotated[LabelValue, Meta(min_length=1)] | None = None
    """Value of the node label ``label``: ``NVIDIA-H100-80GB-HBM3``. Default: any."""
    label: LabelKey = "nvidia.com/gpu.product"
    """The label of nodes that says their type."""
    resource: LabelKey = "nvidia.com/gpu"
    """What it is called among a node's resources."""
    count: Annotated[int, Meta(ge=0, le=64)] = 1
    """Of each worker; it is its tensor-parallel size, too. 0: it runs on the CPU."""


class Placement(Part, frozen=True, kw_only=True):
    """On which nodes workers run."""

    node_selector: Selector = field(default_factory=dict)
    """Labels that a node has to have, beside the accelerator's."""
    tolerations: Annotated[
        list[Toleration], Meta(max_length=64, extra_json_schema={"x-kubernetes-list-type": "atomic"})
    ] = field(default_factory=list)
    """Of nodes' taints, as in a pod."""
    zone_spread: Literal["None", "Preferred", "Required"] = "Preferred"
    """Whether workers of a role are to be in all zones alike."""
    prefer_cached: bool = True
    """Nodes come first that have the commit in their caches."""
    near: bool = True
    """Prefill workers come near decode workers of the same service (same zone; blocks travel between them)."""
    priority_class_name: Subdomain | None = None
    """Of the pods."""
    runtime_class_name: Subdomain | None = None
    """Of the pods."""


class Targets(Part, frozen=True, kw_only=True):
    """What one worker is to have at most, on average. What is left out does not count; one has to be named. Without
    any ``targets``: 16 in flight, 4 queued, 80% of the KV cache."""

    in_flight: Positive | None = None
    """Requests that it answers."""
    queued: Positive | None = None
    """Requests that wait in the engine or at the router, for each worker."""
    tokens: Positive | None = None
    """Tokens in flight."""
    kv_usage_percent: Annotated[int, Meta(ge=1, le=100)] | None = None
    """Of the memory for KV blocks."""
    ttft_milliseconds: Positive | None = None
    """Objective for the time to the first token, at the 95th percentile."""
    itl_milliseconds: Positive | None = None
    """… for the time between tokens."""


class Forecast(Part, frozen=True, kw_only=True):
    """What is to be expected by the hour of the week, recency and trend."""

    mode: Literal["Off", "Observe", "Act"] = "Observe"
    """``Observe``: it is computed and shown; ``Act``: it raises replicas ahead of demand, and lowers none."""
    margin_percent: Percent = 10
    """Added to what is expected."""


class Overprovision(Part, frozen=True, kw_only=True):
    """Room for bursts above what is needed now."""

    replicas: Count = 0
    """So many more workers than needed..."""
    percent: Percent = 0
    """...and this share more, while anything is asked for."""


class Scaling(Part, frozen=True, kw_only=True):
    """How many workers there are, and who decides it."""

    by: Literal["Auto", "Operator", "HPA", "KEDA"] = "Auto"
    """Who moves replicas between 1 and the maximum; 0 to 1 and back is the operator's in any case. ``Auto``: an HPA
    where the cluster has the operator's external metrics, else the operator."""
    min_replicas: Count = 1
    """0: it may sleep."""
    max_replicas: Annotated[int, Meta(ge=1, le=10_000)] = 4
    """More there never are."""
    targets: Targets = Targets(in_flight=16, queued=4, kv_usage_percent=80)
    idle_seconds: Annotated[int, Meta(ge=10, le=MAX_SECONDS)] = 600
    """With ``min_replicas: 0``: how long nothing may have been asked for before it sleeps."""
    warm_seconds: Seconds = 120
    """How long it stays up after it woke, whatever is asked for."""
    up_window_seconds: Window = 0
    """More workers come when they were needed all this time."""
    down_window_seconds: Window = 300
    """Workers go when they were not needed all this time."""
    max_cost: Positive | None = None
    """Ceiling for accelerators of all its workers together."""
    overprovision: Overprovision = Overprovision()
    forecast: Forecast = Forecast()


class Role(Part, frozen=True, kw_only=True):
    """One kind of workers."""

    accelerator: Accelerator = Accelerator()
    cpu: Quantity = "4"
    """That each worker asks for."""
    memory: Quantity = "16Gi"
    """That each worker asks for, and its limit."""
    cache: Quantity = "20Gi"
    """Room for what the engine compiles and writes (an emptyDir)."""
    args: Arguments = field(default_factory=list)
    """vLLM's, after the engine's."""
    scaling: Scaling | None = None
    """Default: the service's; instead of it as a whole."""
    placement: Placement | None = None
    """Default: the service's; instead of it as a whole."""


class Weight(Part, frozen=True, kw_only=True):
    """A commit's share of the requests."""

    commit: Commit
    """Of the model."""
    weight: Annotated[int, Meta(ge=0, le=100)]
    """In percent."""


class Rollout(Part, frozen=True, kw_only=True):
    """How requests move to a new commit."""

    strategy: Literal["Shift", "Recreate"] = "Shift"
    """``Shift``: workers of both commits run, and requests move by steps. ``Recreate``: the old ones go first; for
    where there are accelerators for one of the two only."""
    steps: Annotated[
        list[Annotated[int, Meta(ge=1, le=100)]],
        Meta(min_length=1, max_length=20, extra_json_schema={"x-kubernetes-list-type": "atomic"}),
    ] = field(default_factory=lambda: [10, 50, 100])
    """Share of the new commit in each step, in percent; they rise and end with 100."""
    step_seconds: Annotated[int, Meta(ge=1, le=MAX_SECONDS)] = 300
    """How long each step lasts."""
    max_error_percent: Percent = 2
    """More errors than the old commit has by this much: the old one comes back."""
    max_ttft_percent: Annotated[int, Meta(ge=100, le=10_000)] = 150
    """A time to first token that is this much of the old commit's (median): the old one comes back."""
    min_requests: Count = 20
    """Fewer requests in a step say nothing: it lasts until there are so many, or ``progress_deadline_seconds``."""
    progress_deadline_seconds: Seconds = 3600
    """A new commit whose next workers aren't ready after so long: the old one comes back."""


class Limits(Part, frozen=True, kw_only=True):
    """Of the service at each router, all processes of which keep them together."""

    max_in_flight: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    """Requests that are answered at the same time; more wait."""
    max_queued: Count | None = None
    """Requests that wait, for it to wake, too; more are refused with 429. 0: none waits."""


class ServiceSpec(Part, frozen=True, kw_only=True):
    """What is wanted of a service."""

    model: ModelRef
    served_name: (
        Annotated[str, Meta(min_length=1, max_length=200, pattern=r"^[^\x00-\x20\x7f@-][^\x00-\x20\x7f@]*\Z")] | None
    ) = None
    """The name by which clients ask for it, without spaces or ``@``, which begins a revision; default: the
    repository's. (More names: the router's ``aliases``.)"""
    engine: Engine = Engine()
    aggregated: Role | None = None
    """Workers that do both, prefill and decode..."""
    prefill: Role | None = None
    """...or workers for prompts alone..."""
    decode: Role | None = None
    """...and workers that generate."""
    scaling: Scaling = Scaling()
    placement: Placement = Placement()
    rollout: Rollout = Rollout()
    traffic: Annotated[
        list[Weight],
        Meta(
            max_length=8,
            extra_json_schema={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["commit"]},
        ),
    ] = field(default_factory=list)
    """A split between commits that stays, in percent; while there is one, nothing is rolled out."""
    replicas: Count | None = None
    """So many workers of the decode or only role, whatever is asked for, and nothing scales (0: it sleeps, and no
    request wakes it), until the field is taken out. It is what ``kubectl scale`` sets."""
    limits: Limits = Limits()


class RoleStatus(Part, frozen=True, kw_only=True):
    """Of one kind of workers."""

    replicas: Whole = 0
    """That there are."""
    ready: Whole = 0
    """That answer requests."""
    desired: Whole = 0
    """That there are to be."""
    reason: Annotated[str, Meta(max_length=1024)] = ""
    """Why so many."""
    forecast: Whole | None = None
    """How many the forecast would have."""


class RevisionStatus(Part, frozen=True, kw_only=True):
    """Of the workers of one commit."""

    commit: Commit
    """Of the model."""
    weight: Whole = 0
    """Its share of the requests, in percent."""
    ready: Whole = 0
    """Its workers that answer requests."""
    since: Time = ""
    """RFC 3339: since when it has this weight."""


class ServiceStatus(Part, frozen=True, kw_only=True):
    """Conditions: ``ModelReady``, ``Scheduled``, ``Available``, ``Progressing``, ``ScalingActive``, and ``Ready``."""

    observed_generation: Whole = 0
    """Of the specification that this is about."""
    conditions: Conditions = field(default_factory=list)
    """What is the case, since when and why."""
    commit: Commit | None = None
    """The one that gets requests, or most of them."""
    short_commit: ShortCommit = ""
    """Its first digits, for people."""
    revisions: Annotated[list[RevisionStatus], Meta(max_length=64)] = field(default_factory=list)
    """Commits that have workers."""
    refused: Commit | None = None
    """A commit that was rolled back; it is not tried again, until another one has all requests."""
    refused_at: Time = ""
    """RFC 3339: when that was."""
    refused_why: Annotated[str, Meta(max_length=1024)] = ""
    """What was wrong with it."""
    roles: Annotated[dict[str, RoleStatus], Meta(max_length=8)] = field(default_factory=dict)
    """``aggregated``, or ``prefill`` and ``decode``."""
    replicas: Whole = 0
    """Of the decode or only role: what ``kubectl scale`` shows."""
    ready_replicas: Whole = 0
    """Those of them that answer requests."""
    selector: Annotated[str, Meta(max_length=1024)] = ""
    """Of the pods that ``replicas`` counts."""
    scaling: Annotated[str, Meta(max_length=1 << 18)] = ""
    """The scaling policy's state, opaque."""
