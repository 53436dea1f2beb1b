"""The scale subresource (autoscaling/v1 Scale) of kinds that have one."""

from __future__ import annotations

from typing import Any

from tests.fakes.kubernetes import patches
from tests.fakes.kubernetes.cluster import Cluster
from tests.fakes.kubernetes.custom import Served
from tests.fakes.kubernetes.errors import Refusal, invalid
from tests.fakes.kubernetes.faults import Call
from tests.fakes.kubernetes.store import Manifest


def perform(cluster: Cluster, call: Call, served: Served, how: str, options: dict[str, Any]) -> Manifest:
    live = cluster.get(served.kind, call.namespace, call.name)
    scale = shown(live, served)
    if call.verb == "get":
        return scale
    if call.verb == "update":
        wanted = call.body
    elif call.verb == "patch":
        wanted = patches.json_patch(scale, call.body) if how == "json" else patches.merge_patch(scale, call.body)
    else:
        raise Refusal(405, "MethodNotAllowed", f"{call.verb} of scale")
    replicas = (wanted.get("spec") or {}).get("replicas", 0)
    if not isinstance(replicas, int) or replicas < 0:
        raise invalid("Scale.autoscaling", call.name, [("spec.replicas", f"Invalid value: {replicas}: must be >= 0")])
    assert served.scale is not None
    patch: Manifest = {}
    at = patch
    *steps, last = served.scale["specReplicasPath"].lstrip(".").split(".")
    for step in steps:
        at = at.setdefault(step, {})
    at[last] = replicas
    if version := (wanted.get("metadata") or {}).get("resourceVersion"):
        patch["metadata"] = {"resourceVersion": version}
    one = cluster.patch(served, call.namespace, call.name, patch, "merge", **options)
    return shown(one, served)


def shown(one: Manifest, served: Served) -> Manifest:
    """The Scale of an object."""
    assert served.scale is not None
    metadata = {key: one["metadata"][key] for key in ("name", "uid", "resourceVersion", "creationTimestamp")}
    if "namespace" in one["metadata"]:
        metadata["namespace"] = one["metadata"]["namespace"]
    status: Manifest = {"replicas": _at(one, served.scale["statusReplicasPath"], 0)}
    if "labelSelectorPath" in served.scale:
        status["selector"] = _at(one, served.scale["labelSelectorPath"], "")
    return {
        "kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": metadata,
        "spec": {"replicas": _at(one, served.scale["specReplicasPath"], 0)}, "status": status,
    }  # fmt: skip


def _at(one: Any, path: str, default: Any) -> Any:
    for step in path.lstrip(".").split("."):
        one = one.get(step) if isinstance(one, dict) else None
    return default if one is None else one
