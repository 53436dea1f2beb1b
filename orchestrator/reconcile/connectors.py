"""How KV blocks get from prefill to decode: what the engines of each role are told (docs/router-disaggregation.md)."""

from __future__ import annotations

import json
from typing import Any, Final

import msgspec

from helios import worker_labels
from orchestrator.api.service import ServiceSpec
from orchestrator.reconcile import names

TRANSFER: Final = "--kv-transfer-config"
KV: Final = "/kv"
"""Where the storage that prefill and decode share is mounted."""
BOOTSTRAP_PORT: Final = 8998
"""Where Mooncake's prefill engines are met (vLLM's VLLM_MOONCAKE_BOOTSTRAP_PORT)."""
KV_ROLES: Final = {"prefill": "kv_producer", "decode": "kv_consumer"}


class Wiring(msgspec.Struct, frozen=True):
    """``ports``: by name."""

    arguments: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    ports: tuple[tuple[str, int], ...] = ()


def wiring(connector: str, role: str, directory: str = "") -> Wiring:
    """For a worker that computes one of the two. NIXL is what ``helios worker`` itself sets up; what stands in its
    arguments wins over that. ``directory``: where ``shared-storage`` has its blocks; empty: its arguments say it."""
    if role == "both":
        return Wiring()
    if connector == "nixl-push":
        return Wiring(_transfer("NixlPushConnector", role))
    if connector == "mooncake":
        met = role == "prefill"
        port = (("VLLM_MOONCAKE_BOOTSTRAP_PORT", str(BOOTSTRAP_PORT)),) if met else ()
        return Wiring(
            _transfer("MooncakeConnector", role), port, ((worker_labels.BOOTSTRAP, BOOTSTRAP_PORT),) if met else ()
        )
    if connector == "shared-storage" and directory:
        return Wiring(_transfer("ExampleConnector", role, directory))
    return Wiring()


def directory(service: str, commit: str, spec: ServiceSpec, image: str) -> str:
    """Where the service's workers of a commit share blocks in their storage. vLLM's connector finds blocks by their
    tokens alone, so others must not meet there: other services and commits, and engines that were told otherwise."""
    roles = [[role.args, role.accelerator.count] for role in (spec.prefill, spec.decode) if role is not None]
    told = names.digest_of([image, spec.engine.args, roles])
    return f"{KV}/{service}/{names.short(commit)}-{told[:8]}"


def _transfer(connector: str, role: str, directory: str = "") -> tuple[str, ...]:
    told: dict[str, Any] = {"kv_connector": connector, "kv_role": "kv_both" if directory else KV_ROLES[role]}
    if directory:
        told["kv_connector_extra_config"] = {"shared_storage_path": directory}
    if role == "decode":
        told["kv_load_failure_policy"] = "recompute"
    return TRANSFER, json.dumps(told, separators=(",", ":"))
