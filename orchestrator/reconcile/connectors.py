"""How KV blocks get from prefill to decode: what the engines of each role are told (docs/router-disaggregation.md)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from helios import worker_labels
from orchestrator.api.service import ServiceSpec

TRANSFER: Final = "--kv-transfer-config"
BOOTSTRAP_PORT: Final = 8998
"""Where Mooncake's prefill engines are met (vLLM's VLLM_MOONCAKE_BOOTSTRAP_PORT)."""
KV_ROLES: Final = {"prefill": "kv_producer", "decode": "kv_consumer"}


class Wiring(msgspec.Struct, frozen=True):
    """``ports``: by name."""

    arguments: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    ports: tuple[tuple[str, int], ...] = ()


def wiring(connector: str, role: str) -> Wiring:
    """For a worker that computes one of the two. NIXL is what ``helios worker`` itself sets up; what stands in its
    arguments wins over that."""
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
    return Wiring()


def _transfer(connector: str, role: str) -> tuple[str, ...]:
    told: dict[str, Any] = {"kv_connector": connector, "kv_role": KV_ROLES[role]}
    if role == "decode":
        told["kv_load_failure_policy"] = "recompute"
    return TRANSFER, json.dumps(told, separators=(",", ":"))


def wrong_with(spec: ServiceSpec) -> str:
    """Why the roles can't be wired, and what to do; empty: they can. (The schema has other rules.)"""
    if spec.engine.connector != "shared-storage":
        return ""
    for name in ("prefill", "decode"):
        role = getattr(spec, name)
        if role is not None and not _says([*spec.engine.args, *role.args]):
            return (
                f"spec.engine.connector: is shared-storage, and the engine's arguments don't say which: "
                f"give {TRANSFER} in spec.engine.args or spec.{name}.args"
            )
    return ""


def _says(arguments: Sequence[str]) -> bool:
    return any(one.partition("=")[0].replace("_", "-") == TRANSFER for one in arguments)
