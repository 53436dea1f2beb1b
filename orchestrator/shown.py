"""What the operator's metrics show of services: what their status says."""

from __future__ import annotations

from collections.abc import Iterator

from helios.metrics import RoleState
from orchestrator.actions import View
from orchestrator.api.parse import service_status
from orchestrator.reconcile.kinds import INFERENCE_SERVICE


def roles(view: View) -> Iterator[RoleState]:
    """Of every service in the caches, whether this process leads or not."""
    for one in view.all(INFERENCE_SERVICE):
        metadata = one["metadata"]
        for role, its in service_status(one).roles.items():
            yield RoleState(metadata["namespace"], metadata["name"], role, its.desired, its.ready, its.forecast)
