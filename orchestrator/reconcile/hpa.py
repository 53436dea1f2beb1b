"""HorizontalPodAutoscalers: between 1 and the most, on what the operator says of the load."""

from __future__ import annotations

from typing import Final

from helios.kube.kinds import AUTOSCALER, DEPLOYMENT
from orchestrator import external
from orchestrator.actions import Apply
from orchestrator.api.common import FreeForm
from orchestrator.api.service import Scaling
from orchestrator.reconcile.deployment import metadata
from orchestrator.reconcile.pod import Workers

LONGEST_WINDOW: Final = 3600
"""Kubernetes takes no longer one, in seconds."""


def behavior(scaling: Scaling) -> FreeForm:
    """At once up, as far as doubling each quarter of a minute goes; down by a half each minute, after the window."""
    return {
        "scaleUp": {
            "stabilizationWindowSeconds": min(LONGEST_WINDOW, scaling.up_window_seconds),
            "selectPolicy": "Max",
            "policies": [
                {"type": "Percent", "value": 100, "periodSeconds": 15},
                {"type": "Pods", "value": 4, "periodSeconds": 15},
            ],
        },
        "scaleDown": {
            "stabilizationWindowSeconds": min(LONGEST_WINDOW, scaling.down_window_seconds),
            "selectPolicy": "Max",
            "policies": [
                {"type": "Percent", "value": 50, "periodSeconds": 60},
                {"type": "Pods", "value": 1, "periodSeconds": 60},
            ],
        },
    }


def autoscaler(its: Workers, scaling: Scaling, floor: int) -> Apply:
    """For the workers of a role and commit. It does nothing while its Deployment has 0 replicas: 0 and 1 are the
    operator's."""
    chosen = external.selector(its.service, its.role, its.commit)
    most = max(1, scaling.max_replicas)
    spec: FreeForm = {
        "scaleTargetRef": {"apiVersion": DEPLOYMENT.api_version, "kind": DEPLOYMENT.kind, "name": its.name},
        "minReplicas": max(1, min(floor, most)),
        "maxReplicas": most,
        "metrics": [_metric(one, target, chosen) for one, target in external.wanted(scaling.targets)],
        "behavior": behavior(scaling),
    }
    manifest = {
        "apiVersion": AUTOSCALER.api_version,
        "kind": AUTOSCALER.kind,
        "metadata": metadata(its.owner, its.name, its.labels),
        "spec": spec,
    }
    return Apply(AUTOSCALER, manifest)


def _metric(one: external.External, target: int, chosen: dict[str, str]) -> FreeForm:
    aim = (
        {"type": "AverageValue", "averageValue": str(target)}
        if one.average
        else {"type": "Value", "value": str(target)}
    )
    return {
        "type": "External",
        "external": {"metric": {"name": one.name, "selector": {"matchLabels": chosen}}, "target": aim},
    }
