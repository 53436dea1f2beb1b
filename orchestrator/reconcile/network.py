"""The NetworkPolicy of a service's workers: whatever is not here is refused, both ways."""

from __future__ import annotations

from typing import Final

from helios.kube.kinds import NETWORK_POLICY
from orchestrator.actions import Apply, Ref
from orchestrator.api.common import FreeForm
from orchestrator.reconcile import names
from orchestrator.reconcile.connectors import BOOTSTRAP_PORT
from orchestrator.reconcile.deployment import metadata
from orchestrator.reconcile.pod import DEFAULTS
from orchestrator.reconcile.site import Site, allowed

DNS: Final = 53
HBONE: Final = 15008
"""Istio's own port between meshed pods without sidecars."""
ISTIOD: Final = 15012


def policy(owner: Ref, site: Site, *, apart: bool) -> Apply:
    """``apart``: prefill and decode workers reach each other at every port, because NIXL takes free ones for blocks.

    Policies add up: whoever needs more (an engine that keeps blocks in a store) adds one of their own."""
    workers = names.selector(owner.name)
    meshed = site.mesh != "off"
    router = [DEFAULTS.vllm_port, DEFAULTS.kv_events_port, DEFAULTS.kv_replay_port, BOOTSTRAP_PORT]
    among = [{"podSelector": {"matchLabels": workers}}]
    ingress: list[FreeForm] = [
        {"from": [allowed(site.router)], "ports": _tcp(*router, *([HBONE] if meshed else []))},
    ]
    if site.picker_pods:  # a pool's picker is in its namespace
        picker = {"podSelector": {"matchLabels": site.picker_pods}}
        ingress.append({"from": [picker], "ports": _tcp(*router[:-1], *([HBONE] if meshed else []))})
    if site.gateway is not None:
        ports = _tcp(DEFAULTS.vllm_port, *([HBONE] if meshed else []))
        ingress.append({"from": [allowed(site.gateway)], "ports": ports})
    if site.monitoring is not None:
        ingress.append({"from": [allowed(site.monitoring)], "ports": _tcp(DEFAULTS.port)})
    egress: list[FreeForm] = [{"ports": [{"protocol": kind, "port": DNS} for kind in ("UDP", "TCP")]}]
    if apart:
        ingress.append({"from": among})
        egress.append({"to": among})
    if site.routers:
        egress.append({"to": [allowed(site.router)], "ports": _tcp(site.router_admin_port)})
    if site.registry_urls:
        egress.append({"to": [allowed(site.registry)], "ports": _tcp(site.registry_port)})
    if meshed:
        istiod = {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "istiod"}}}
        egress.append({"to": [istiod], "ports": _tcp(ISTIOD)})
    manifest = {
        "apiVersion": NETWORK_POLICY.api_version,
        "kind": NETWORK_POLICY.kind,
        "metadata": metadata(owner, names.bounded(owner.name), names.labels(owner.name, "network")),
        "spec": {
            "podSelector": {"matchLabels": workers},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": ingress,
            "egress": egress,
        },
    }
    return Apply(NETWORK_POLICY, manifest)


def _tcp(*ports: int) -> list[FreeForm]:
    return [{"protocol": "TCP", "port": port} for port in ports]
