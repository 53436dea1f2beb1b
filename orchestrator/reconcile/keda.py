"""KEDA's ScaledObjects, which have the operator's external scaler asked."""

from __future__ import annotations

from typing import Final

from helios.kube.kinds import DEPLOYMENT
from orchestrator import external
from orchestrator.actions import Apply
from orchestrator.api.service import Scaling
from orchestrator.reconcile.deployment import metadata
from orchestrator.reconcile.hpa import behavior
from orchestrator.reconcile.kinds import SCALED_OBJECT
from orchestrator.reconcile.pod import Workers

PAUSED: Final = "autoscaling.keda.sh/paused"
AUTHENTICATION: Final = "ClusterTriggerAuthentication"
POLL_SECONDS: Final = 15


def scaled_object(its: Workers, scaling: Scaling, floor: int, *, paused: bool) -> Apply:
    """``paused``: while there is none, KEDA keeps its hands off; 0 and 1 are the operator's."""
    most = max(1, scaling.max_replicas)
    described = metadata(its.owner, its.name, its.labels) | ({"annotations": {PAUSED: "true"}} if paused else {})
    where = {"namespace": its.namespace, **external.selector(its.service, its.role, its.commit)}
    where |= {"scalerAddress": its.site.keda_scaler} | ({"enableTLS": "true"} if its.site.scaler_tls else {})
    authentication = its.site.keda_authentication
    trusted = {"authenticationRef": {"kind": AUTHENTICATION, "name": authentication}} if authentication else {}
    manifest = {
        "apiVersion": SCALED_OBJECT.api_version,
        "kind": SCALED_OBJECT.kind,
        "metadata": described,
        "spec": {
            "scaleTargetRef": {"apiVersion": DEPLOYMENT.api_version, "kind": DEPLOYMENT.kind, "name": its.name},
            "pollingInterval": POLL_SECONDS,
            "minReplicaCount": max(1, min(floor, most)),
            "maxReplicaCount": most,
            "advanced": {"horizontalPodAutoscalerConfig": {"behavior": behavior(scaling)}},
            "triggers": [
                {
                    "type": "external",
                    "metricType": "AverageValue" if one.average else "Value",
                    "metadata": {"metric": one.name, "target": str(target), **where},
                    **trusted,
                }
                for one, target in external.wanted(scaling.targets)
            ],
        },
    }
    return Apply(SCALED_OBJECT, manifest)
