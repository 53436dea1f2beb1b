"""What holds for all services of a cluster: where the others are, and what they are called. The operator's settings."""

from __future__ import annotations

from typing import Literal

import msgspec

from orchestrator.api.common import FreeForm


class SecretKey(msgspec.Struct, frozen=True):
    """A key of a Secret, which has to be in the namespace of whoever uses it."""

    name: str
    key: str


class Peer(msgspec.Struct, frozen=True):
    """Pods, by the labels of their namespace and their own; empty: all."""

    namespace: dict[str, str] = {}
    pods: dict[str, str] = {}

    def policy(self) -> FreeForm:
        """As a NetworkPolicy has it."""
        return {"namespaceSelector": {"matchLabels": self.namespace}, "podSelector": {"matchLabels": self.pods}}


class Site(msgspec.Struct, frozen=True):
    worker_image: str = "registry.example/helios/vllm:0.1.0"
    pause_image: str = "registry.k8s.io/pause:3.10"
    """What the pods run that keep a model on a node: it does nothing."""
    pull_secrets: tuple[str, ...] = ()
    csi_driver: str = "csi.helios.dev"
    host: Literal["0.0.0.0", "::"] = "0.0.0.0"  # noqa: S104 - in a pod of its own
    """Where workers listen."""
    routers: tuple[str, ...] = ()
    """Administrations at which workers register; none: routers find them by EndpointSlices."""
    registrar: SecretKey | None = None
    """The token for that."""
    registry_urls: tuple[str, ...] = ()
    """With them workers share what they compile (docs/compile-caches.md)."""
    registry_token: SecretKey | None = None
    compile_key: SecretKey | None = None
    router: Peer = Peer({"kubernetes.io/metadata.name": "helios"}, {"app.kubernetes.io/component": "router"})
    gateway: Peer | None = None
    """Others that send requests straight to workers: a gateway with an InferencePool."""
    monitoring: Peer | None = None
    registry: Peer = Peer({"kubernetes.io/metadata.name": "helios"}, {"app.kubernetes.io/component": "registry"})
    registry_port: int = 8470
    router_admin_port: int = 8481
    network_policies: bool = True
    mesh: Literal["off", "permissive", "strict"] = "off"
    """What Istio's PeerAuthentication says of workers, where Istio is; ``off``: nothing is made for Istio."""
    picker_service: str = ""
    """The endpoint picker's Service, in each namespace with workers; empty: no InferencePools."""
    picker_port: int = 9002
    external_metrics: bool = False
    """Whether the operator serves the cluster's external metrics: then HPAs can be made."""
    keda_scaler: str = ""
    """``HOST:PORT`` of the operator's KEDA external scaler."""
    cluster_domain: str = "cluster.local"
