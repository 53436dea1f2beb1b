"""The InferencePool of a service, for gateways that ask an endpoint picker (Gateway API Inference Extension)."""

from __future__ import annotations

from orchestrator.actions import Apply, Ref
from orchestrator.reconcile import names
from orchestrator.reconcile.deployment import metadata
from orchestrator.reconcile.kinds import INFERENCE_POOL
from orchestrator.reconcile.pod import DEFAULTS
from orchestrator.reconcile.site import Site


def pool(owner: Ref, site: Site, role: str) -> Apply:
    """The workers that answer. Without the picker nobody knows which weight a commit has: requests fail then."""
    manifest = {
        "apiVersion": INFERENCE_POOL.api_version,
        "kind": INFERENCE_POOL.kind,
        "metadata": metadata(owner, names.bounded(owner.name), names.labels(owner.name, "gateway")),
        "spec": {
            "selector": {"matchLabels": names.selector(owner.name, role)},
            "targetPorts": [{"number": DEFAULTS.vllm_port}],
            "endpointPickerRef": {
                "group": "", "kind": "Service", "name": site.picker_service, "port": {"number": site.picker_port},
                "failureMode": "FailClose",
            },
        },
    }  # fmt: skip
    return Apply(INFERENCE_POOL, manifest)
