"""A kubeconfig for the fake API server, and pods and EndpointSlices as a real one shows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.fakes.kubernetes.server import ApiServer


AUTHORITY = Path(__file__).with_name("authority.pem")
"""As a kubeconfig of a cluster names one; where none is each client reads all that the machine trusts, for 0.05 s."""


def kubeconfig(server: ApiServer, token: str | None = None) -> str:
    """A kubeconfig that leads to the server."""
    return json.dumps(
        {
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "k", "cluster": {"server": server.url, "certificate-authority": str(AUTHORITY)}}],
            "users": [{"name": "u", "user": {"token": token or server.token}}],
            "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u", "namespace": "ns"}}],
        }
    )  # fmt: skip


def pod(name: str, ip: str | None, *, ready: bool = True, ending: bool = False, **more: Any) -> dict[str, Any]:
    """A pod as the API server shows it, with ``labels`` and ``annotations``."""
    metadata: dict[str, Any] = {"name": name, "namespace": "ns", "uid": more.pop("uid", f"uid-{name}")}
    metadata |= {"labels": {"app": "vllm", **more.pop("labels", {})}, "annotations": more.pop("annotations", {})}
    if ending:
        metadata["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    conditions = [{"type": "Ready", "status": str(ready)}, {"type": "PodScheduled", "status": "True"}]
    return {
        "metadata": metadata,
        "spec": {"containers": [{"name": "v", "image": "i", "ports": [{"name": "http", "containerPort": 8000}]}]},
        "status": {"phase": "Running", "podIP": ip, "conditions": conditions},
    }


def endpoint(ip: str, pod_name: str | None, *, uid: str | None = None, **conditions: bool | None) -> dict[str, Any]:
    one: dict[str, Any] = {"addresses": [ip], "conditions": conditions, "nodeName": "n"}
    if pod_name is not None:
        one["targetRef"] = {"kind": "Pod", "namespace": "ns", "name": pod_name, "uid": uid or f"uid-{pod_name}"}
    return one


def endpoint_slice(name: str, endpoints: list[dict[str, Any]] | None, **more: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "namespace": "ns", "labels": {"app": "vllm", **more.pop("labels", {})}},
        "addressType": more.pop("family", "IPv4"),
        "endpoints": endpoints,
        "ports": more.pop("ports", [{"name": "http", "port": 8000, "protocol": "TCP"}]),
    }


def service(name: str, **more: Any) -> dict[str, Any]:
    """A Service as the API server shows it, with ``labels`` and ``annotations``."""
    metadata: dict[str, Any] = {"name": name, "namespace": "ns", "annotations": more.pop("annotations", {})}
    metadata["labels"] = {"app": "vllm", **more.pop("labels", {})}
    return {"metadata": metadata, "spec": {"clusterIP": "None", "ports": [{"name": "http", "port": 8000}]}}
