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
    """Why the roles can't be wired, and what to do; empty: they can."""
    apart = [name for name in ("prefill", "decode") if getattr(spec, name) is not None]
    if spec.aggregated is None and not apart:
        return "the service has no role: say spec.aggregated, or spec.prefill and spec.decode"
    if spec.aggregated is not None and apart:
        return f"spec.aggregated and spec.{apart[0]} exclude each other: keep one"
    if len(apart) == 1:
        return f"spec.{apart[0]} is there alone: prefill and decode need each other"
    if apart and spec.engine.connector == "none":
        return "spec.engine.connector is none: prefill and decode need one; nixl is the default"
    if apart and spec.engine.connector == "shared-storage":
        for name in apart:
            if not _says([*spec.engine.args, *getattr(spec, name).args]):
                return (
                    f"spec.engine.connector is shared-storage, and the engine's arguments don't say which: give "
                    f"{TRANSFER} in spec.engine.args or spec.{name}.args"
                )
    return ""


def _says(arguments: Sequence[str]) -> bool:
    return any(one.partition("=")[0].replace("_", "-") == TRANSFER for one in arguments)
