"""The Deployment of a service's role and commit."""

from __future__ import annotations

from typing import Final

from helios.kube.kinds import DEPLOYMENT
from orchestrator.actions import Apply, Ref, owner_reference
from orchestrator.api.common import GROUP, FreeForm
from orchestrator.reconcile.pod import Workers, template

REPO: Final = f"{GROUP}/repo"
"""Annotation: the repository that the commit is of."""
NODE_SECONDS: Final = 900
"""What a node may take to join, in seconds, before the worker on it begins to start (Knative gave up after two minutes
while it booted)."""


def metadata(owner: Ref, name: str, labels: dict[str, str]) -> FreeForm:
    """Of an object that the owner's end ends, too."""
    return {"name": name, "namespace": owner.namespace, "labels": labels, "ownerReferences": [owner_reference(owner)]}


def deployment(its: Workers) -> Apply:
    """Without ``replicas``: whoever scales says them through the subresource (``Scale``, an autoscaler)."""
    rollout, start = its.spec.rollout, its.spec.engine.start_timeout_seconds
    surge = {"maxSurge": "25%", "maxUnavailable": 0}
    if rollout.strategy == "Recreate":  # there may be no accelerators for one more
        surge = {"maxSurge": 0, "maxUnavailable": 1}
    spec: FreeForm = {
        "selector": {"matchLabels": its.selector},
        "revisionHistoryLimit": 2,
        "progressDeadlineSeconds": max(rollout.progress_deadline_seconds, start + NODE_SECONDS),
        "strategy": {"type": "RollingUpdate", "rollingUpdate": surge},
        "template": template(its),
    }
    manifest = {
        "apiVersion": DEPLOYMENT.api_version,
        "kind": DEPLOYMENT.kind,
        "metadata": metadata(its.owner, its.name, its.labels) | {"annotations": {REPO: its.repo}},
        "spec": spec,
    }
    return Apply(DEPLOYMENT, manifest)
