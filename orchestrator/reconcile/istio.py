"""What Istio is told of a service's workers, so that it breaks no stream and repeats no answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from helios import worker_labels
from helios.kube.kinds import Kind
from orchestrator.actions import Apply, Ref
from orchestrator.api.common import FreeForm
from orchestrator.reconcile import names
from orchestrator.reconcile.connectors import BOOTSTRAP_PORT
from orchestrator.reconcile.deployment import metadata
from orchestrator.reconcile.kinds import DESTINATION_RULE, PEER_AUTHENTICATION, VIRTUAL_SERVICE
from orchestrator.reconcile.pod import DEFAULTS
from orchestrator.reconcile.site import Site

RETRY_ON: Final = "connect-failure,refused-stream,reset-before-request"
"""Nothing has been computed yet: Istio's own conditions would have a prompt answered twice."""
EJECTED: Final = 50
"""Most of the workers that are left out at a time, in percent; below so many healthy ones all are used again."""


def rules(owner: Ref, site: Site, role: str, weights: Mapping[str, int]) -> list[Apply]:
    """``role``: which workers answer; ``weights``: of commits, in percent, those that get requests."""
    kv = (DEFAULTS.side_channel_port, DEFAULTS.kv_events_port, DEFAULTS.kv_replay_port, BOOTSTRAP_PORT)
    service = names.of_service(owner.name)
    host = f"{service}.{owner.namespace}.svc.{site.cluster_domain}"
    subsets = {commit: weight for commit, weight in weights.items() if weight}
    authentication: FreeForm = {
        "selector": {"matchLabels": names.selector(owner.name)},
        "mtls": {"mode": "STRICT" if site.mesh == "strict" else "PERMISSIVE"},
        "portLevelMtls": {str(port): {"mode": "DISABLE"} for port in kv},
    }
    destination: FreeForm = {
        "host": host,
        "trafficPolicy": {
            "loadBalancer": {"simple": "LEAST_REQUEST"},
            "outlierDetection": {
                "consecutive5xxErrors": 0, "consecutiveGatewayErrors": 5, "interval": "10s", "baseEjectionTime": "30s",
                "maxEjectionPercent": EJECTED, "minHealthPercent": EJECTED,
            },
        },
        "subsets": [{"name": names.short(commit), "labels": {worker_labels.REVISION: commit}} for commit in subsets],
    }  # fmt: skip
    routes = [
        {"destination": {"host": host, "subset": names.short(commit)}, "weight": weight}
        for commit, weight in subsets.items()
    ]
    # No 'timeout': there is none then, and Istio's definition takes no 0.
    route = {
        "route": routes or [{"destination": {"host": host}}],
        "retries": {"attempts": 2, "retryOn": RETRY_ON},
    }
    virtual: FreeForm = {"hosts": [host], "http": [route]}
    return [
        _object(owner, PEER_AUTHENTICATION, authentication),
        _object(owner, DESTINATION_RULE, destination),
        _object(owner, VIRTUAL_SERVICE, virtual),
    ]


def _object(owner: Ref, kind: Kind, spec: FreeForm) -> Apply:
    described = metadata(owner, names.bounded(owner.name), names.labels(owner.name, "mesh"))
    return Apply(kind, {"apiVersion": kind.api_version, "kind": kind.kind, "metadata": described, "spec": spec})
