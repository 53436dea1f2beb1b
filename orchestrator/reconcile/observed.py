"""What reconciles see: values, taken from the caches and from what others know. No I/O, no clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final, Protocol

import msgspec

from helios import worker_labels
from orchestrator.actions import Manifest, Problem, Ref
from orchestrator.api.model import ModelSpec
from orchestrator.api.service import ServiceSpec


class Object(msgspec.Struct, frozen=True):
    """What every resource has."""

    ref: Ref
    generation: int = 1
    deleting: bool = False
    finalizers: tuple[str, ...] = ()
    status: Manifest = {}


def object_of(ref: Ref, manifest: Mapping[str, Any]) -> Object:
    metadata = manifest["metadata"]
    return Object(
        ref, metadata.get("generation", 1), bool(metadata.get("deletionTimestamp")),
        tuple(metadata.get("finalizers") or ()), manifest.get("status") or {},
    )  # fmt: skip


# --- what the registry says ---


class Answer(msgspec.Struct, frozen=True):
    """What a revision names, as an adapter last heard. ``problem`` is one word in CamelCase where ``commit`` is None or
    older than ``since`` (Unix seconds): RegistryUnreachable, NotFound, Forbidden, Retired, NotHere, Fetching,
    UpstreamUnreachable."""

    commit: str | None = None
    checked_at: float = 0.0
    problem: str = ""
    message: str = ""
    since: float = 0.0


class Facts(msgspec.Struct, frozen=True):
    """Of one commit. ``signer`` None: nobody whom a rule of the registry asked for has signed it. ``problem``: nothing
    is known, and this is why, one word in CamelCase as in an ``Answer``."""

    size_bytes: int
    signer: str | None = None
    problem: str = ""
    message: str = ""


class Registry(Protocol):
    """What an adapter has heard from the registry; it asks in the background and has the resource's turn come when
    something is new. None: not known yet."""

    def answer(self, repo: str, revision: str, pull: bool, every_s: float) -> Answer | None:
        """``pull``: the registry may fetch it from its upstream; ``every_s``: how often it is to be asked."""
        ...

    def facts(self, repo: str, commit: str) -> Facts | None: ...


# --- what scaling and the router say ---


class Wanted(msgspec.Struct, frozen=True):
    """How many workers a role should have, as the scaling policy decided last: ``replicas`` now; ``floor``: what an
    autoscaler may not go below; ``signals``: whether what it goes by is known; ``others``: services that answer for the
    same name, whose requests can't be told from its own."""

    replicas: int
    floor: int = 1
    reason: str = ""
    forecast: int | None = None
    signals: bool = True
    others: int = 0


class Health(msgspec.Struct, frozen=True):
    """What routers measured of a commit since it has its weight. None: nobody knows."""

    requests: int = 0
    error_percent: float | None = None
    ttft_ms: float | None = None
    in_flight: int | None = None


class Scaling(Protocol):
    """The policy's last decisions, and what it wants to be remembered (``status.scaling``, opaque)."""

    def wanted(self, namespace: str, service: str) -> Mapping[str, Wanted]:
        """By role: ``both``, ``prefill``, ``decode``; without one that nothing was decided for yet."""
        ...

    def health(self, namespace: str, service: str) -> Mapping[str, Health]:
        """By commit."""
        ...

    def state(self, namespace: str, service: str) -> str: ...

    def prefetch(self, namespace: str, model: str) -> int | None:
        """Nodes that should have a Model for workers that are expected; None: not known yet."""
        ...


# --- what the cluster has ---


class Capabilities(msgspec.Struct, frozen=True):
    istio: bool = False
    inference_pool: bool = False
    keda: bool = False


class PodSeen(msgspec.Struct, frozen=True):
    """``reason``: why it does not run, one word of Kubernetes', and ``since`` when (RFC 3339); empty where it does, or
    nobody says. ``doing``: what it is at while it is neither ready nor wrong, with the time since when."""

    name: str
    commit: str
    role: str
    ready: bool = False
    ending: bool = False
    reason: str = ""
    message: str = ""
    since: str = ""
    doing: str = ""


WAITING: Final = ("ContainerCreating", "PodInitializing")
"""Reasons that are none: it is on its way."""
LAST_WORDS: Final = 500
"""Of what a container said at its end so many characters are shown, the last ones."""


def pod_seen(pod: Manifest) -> PodSeen:
    """A worker's pod, and why it does not run."""
    metadata, status = pod["metadata"], pod.get("status") or {}
    labels = metadata.get("labels") or {}
    found = {one.get("type"): one for one in status.get("conditions") or ()}
    reason, message = "", ""
    scheduled = found.get("PodScheduled", {})
    if scheduled.get("status") == "False":
        reason, message = scheduled.get("reason") or "Unschedulable", scheduled.get("message") or ""
    containers = [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]
    for container in containers:
        waiting = (container.get("state") or {}).get("waiting") or {}
        if not reason and waiting.get("reason") and waiting["reason"] not in WAITING:
            reason, message = waiting["reason"], (waiting.get("message") or "") + _ended(container)
    if not reason and status.get("phase") == "Failed":
        reason, message = status.get("reason") or "Failed", status.get("message") or ""
    since = (scheduled if scheduled.get("status") == "False" else found.get("Ready", {})).get("lastTransitionTime")
    ready, ending = found.get("Ready", {}).get("status") == "True", bool(metadata.get("deletionTimestamp"))
    return PodSeen(
        metadata["name"], labels.get(worker_labels.REVISION, ""), labels.get(worker_labels.ROLE, ""),
        ready and not ending, ending, reason, message, (since or "") if reason else "",
        "" if ready or ending or reason else _doing(status),
    )  # fmt: skip


def _ended(container: Manifest) -> str:
    """How it ended before it was to start again: its log's last words, as the kubelet kept them."""
    last = (container.get("lastState") or {}).get("terminated") or {}
    if not last:
        return ""
    said = " ".join(str(last.get("message") or "").split())[-LAST_WORDS:]
    return f"; it ended with {last.get('reason') or 'Error'}, exit code {last.get('exitCode')}" + (said and f": {said}")


def _doing(status: Manifest) -> str:
    for container in status.get("containerStatuses") or ():
        state = container.get("state") or {}
        if since := (state.get("running") or {}).get("startedAt"):
            return f"its engine starts, since {since}"
        if (state.get("waiting") or {}).get("reason") in WAITING:
            since = status.get("startTime")
            return "it waits for its volumes and its container" + (f", since {since}" if since else "")
    return ""


class ModelSeen(msgspec.Struct, frozen=True):
    """The Model of a service. ``commit`` None: none counts yet, and ``reason``, ``message`` say why."""

    name: str
    spec: ModelSpec
    commit: str | None = None
    reason: str = ""
    message: str = ""


class ServiceObserved(msgspec.Struct, frozen=True):
    """``spec`` None: it can't be read, and ``wrong`` says why. ``children``: everything that it owns."""

    object: Object
    spec: ServiceSpec | None
    wrong: str = ""
    model: ModelSeen | None = None
    children: tuple[tuple[Ref, Manifest], ...] = ()
    pods: tuple[PodSeen, ...] = ()
    wanted: Mapping[str, Wanted] = {}
    health: Mapping[str, Health] = {}
    scaling_state: str = ""
    capabilities: Capabilities = Capabilities()
    problems: Sequence[Problem] = ()
    now: float = 0.0


class NodeSeen(msgspec.Struct, frozen=True):
    """``usable``: it is ready, and pods may be put there."""

    name: str
    labels: Mapping[str, str]
    usable: bool = True


class ModelObserved(msgspec.Struct, frozen=True):
    """``users``: names of the services of its namespace that use it; ``in_use``: the commits that they run."""

    object: Object
    spec: ModelSpec | None
    wrong: str = ""
    answer: Answer | None = None
    facts: Mapping[str, Facts] = {}
    users: tuple[str, ...] = ()
    in_use: frozenset[str] = frozenset()
    nodes: tuple[NodeSeen, ...] = ()
    expected: int | None = 0
    """Nodes that should have it for workers that are expected; None: not known yet, so what is there stays."""
    children: tuple[tuple[Ref, Manifest], ...] = ()
    problems: Sequence[Problem] = ()
    now: float = 0.0


def moment(text: str) -> float:
    """RFC 3339 as Unix seconds; 0 for what is none."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return 0.0
