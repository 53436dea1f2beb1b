"""Services: one for each role and commit, by which routers find workers and hear of weights, and one for the whole."""

from __future__ import annotations

from helios import worker_labels
from helios.kube.kinds import SERVICE
from orchestrator.actions import Apply, Ref
from orchestrator.api.common import FreeForm
from orchestrator.api.service import ServiceSpec
from orchestrator.reconcile import names
from orchestrator.reconcile.deployment import metadata
from orchestrator.reconcile.pod import DEFAULTS, Workers


def weight_of(share: int, ready: int) -> str:
    """What ``helios.dev/weight`` of each worker is, so that ``ready`` of them together have a share, in percent, of the
    requests. Routers compare the weights of single workers."""
    return "0" if not share else f"{share / max(1, ready):.4g}"


def limits_of(spec: ServiceSpec) -> dict[str, str]:
    """What routers hear of ``spec.limits``, as labels."""
    said = {worker_labels.MAX_IN_FLIGHT: spec.limits.max_in_flight, worker_labels.MAX_QUEUED: spec.limits.max_queued}
    return {key: str(most) for key, most in said.items() if most is not None}


def headless(its: Workers, weight: str) -> Apply:
    """The workers of a role and commit. Its labels become those of its EndpointSlices: a weight or a limit changes
    without a change of pods. Its annotation is how routers know the model while it sleeps, unless no request is to wake
    it."""
    labels = {**its.labels, **worker_labels.SELECTED, worker_labels.WEIGHT: weight, **limits_of(its.spec)}
    spec: FreeForm = {
        "clusterIP": "None",
        "selector": its.selector,
        "ports": [_port(worker_labels.HTTP, DEFAULTS.vllm_port), _port(worker_labels.FRONT, DEFAULTS.port)],
    }
    described = metadata(its.owner, its.name, labels)
    if its.spec.replicas != 0:
        described["annotations"] = {worker_labels.MODEL: its.served}
    return _service(described, spec)


def whole(owner: Ref, role: str) -> Apply:
    """All workers that answer requests, of every commit: for clients within the cluster without a router."""
    labels = names.labels(owner.name, "service")
    spec: FreeForm = {
        "type": "ClusterIP",
        "selector": names.selector(owner.name, role),
        "ports": [_port(worker_labels.HTTP, DEFAULTS.vllm_port)],
    }
    return _service(metadata(owner, names.of_service(owner.name), labels), spec)


def _port(name: str, number: int) -> FreeForm:
    return {"name": name, "port": number, "targetPort": name, "protocol": "TCP"} | (
        {"appProtocol": "http"} if name == worker_labels.HTTP else {}
    )


def _service(described: FreeForm, spec: FreeForm) -> Apply:
    manifest = {"apiVersion": SERVICE.api_version, "kind": SERVICE.kind, "metadata": described, "spec": spec}
    return Apply(SERVICE, manifest)
