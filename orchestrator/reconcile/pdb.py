"""PodDisruptionBudgets: of each role one worker at a time may be evicted."""

from __future__ import annotations

from helios.kube.kinds import DISRUPTION_BUDGET
from orchestrator.actions import Apply, Ref
from orchestrator.reconcile import names
from orchestrator.reconcile.deployment import metadata


def budget(owner: Ref, role: str) -> Apply:
    """Over the workers of every commit. ``maxUnavailable`` 1 and no least number: a node with the only worker can be
    drained. What isn't ready may always be evicted: it serves nobody."""
    manifest = {
        "apiVersion": DISRUPTION_BUDGET.api_version,
        "kind": DISRUPTION_BUDGET.kind,
        "metadata": metadata(owner, names.of_role(owner.name, role), names.labels(owner.name, role)),
        "spec": {
            "maxUnavailable": 1,
            "selector": {"matchLabels": names.selector(owner.name, role)},
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
        },
    }
    return Apply(DISRUPTION_BUDGET, manifest)
