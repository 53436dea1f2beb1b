"""What the operator says of a service's load to whoever scales it: names of external metrics, and their labels."""

from __future__ import annotations

from typing import Final

import msgspec

from orchestrator.api.service import Targets


class External(msgspec.Struct, frozen=True):
    """``target`` is the field of ``spec.scaling.targets``; ``average``: it is divided by the number of workers, as
    what adds up over them is."""

    name: str
    target: str
    average: bool = True


QUEUED: Final = External("helios_queued_requests", "queued")
KV_USAGE: Final = External("helios_kv_usage_percent", "kv_usage_percent")
IN_FLIGHT: Final = External("helios_in_flight_requests", "in_flight")
TOKENS: Final = External("helios_tokens_in_flight", "tokens")
TTFT: Final = External("helios_ttft_milliseconds", "ttft_milliseconds", average=False)
ITL: Final = External("helios_itl_milliseconds", "itl_milliseconds", average=False)
DESIRED: Final = External("helios_desired_replicas", "")
"""What the scaling policy wants, for whoever scales by nothing else: target 1."""
ALL: Final = (QUEUED, KV_USAGE, IN_FLIGHT, TOKENS, TTFT, ITL)


def wanted(targets: Targets) -> list[tuple[External, int]]:
    """Those that have a target, with it; where none has, requests in flight count."""
    found = [(one, int(target)) for one in ALL if (target := getattr(targets, one.target)) is not None]
    return found or [(IN_FLIGHT, 16)]


def selector(service: str, role: str, commit: str) -> dict[str, str]:
    """The labels of a metric: whose workers it is about."""
    return {"service": service, "role": role, "revision": commit}
