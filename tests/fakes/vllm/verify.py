"""What no proxy may send to a worker."""

from __future__ import annotations

from typing import Final

from tests.fakes.vllm.journal import Record

HOP_BY_HOP: Final = frozenset(
    {"keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
     "transfer-encoding", "upgrade", "http2-settings", "expect"}
)  # fmt: skip
ONCE: Final = ("host", "content-length", "content-type", "authorization", "x-request-id")
ADMINISTRATION: Final = (
    "/sleep", "/wake_up", "/is_sleeping", "/collective_rpc", "/pause", "/resume", "/is_paused", "/abort_requests",
    "/update_weights", "/init_weight_transfer_engine", "/start_weight_update", "/finish_weight_update",
    "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/reset_prefix_cache", "/reset_mm_cache", "/server_info",
    "/start_profile", "/stop_profile", "/scale_elastic_ep", "/invocations", "/release_kv_cache_memory",
    "/inference/v1/abort_requests", "/fault_tolerance/apply", "/tokenizer_info",
)  # fmt: skip
"""Paths that vLLM serves (some with VLLM_SERVER_DEV_MODE=1) and that users must never reach."""


PROXIED: Final = ("x-request-id", "traceparent", "x-forwarded-for", "via")
"""Headers by which a request is known that came through a proxy."""


def problems(record: Record, own_host: str, *, owned: bool = False, gateway: bool = False) -> list[str]:
    """What is wrong with a request's head; ``own_host`` is the host and port it should name; ``owned``: the path is for
    the worker's owner, who calls it without a proxy; ``gateway``: one may send it, with its own host and in chunks.
    """
    found = []
    gateway = gateway and bool(record.header("x-forwarded-proto"))
    for name, value in record.headers:
        if name in HOP_BY_HOP and not (gateway and (name, value) == ("transfer-encoding", "chunked")):
            found.append(f"hop-by-hop header {name}: {value}")
        if name == "connection" and value.lower() not in ("keep-alive", "close"):
            found.append(f"connection: {value}")
    for name in ONCE:
        if len(record.header(name)) > 1:
            found.append(f"{name} comes {len(record.header(name))} times")
    if record.header("host") != [own_host] and not (gateway and len(record.header("host")) == 1):
        found.append(f"host is {record.header('host')}, not {own_host}")
    chunked = gateway and not record.header("content-length") and bool(record.header("transfer-encoding"))
    if record.method == "POST" and record.header("content-length") != [str(record.body_bytes)] and not chunked:
        found.append(f"content-length is {record.header('content-length')} for {record.body_bytes} bytes")
    if record.target.partition("?")[0] in ADMINISTRATION and not (owned and not any(map(record.header, PROXIED))):
        found.append(f"{record.target} must never be reached")
    return found
