"""What a fake serves and how fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["both", "prefill", "decode"]


@dataclass(frozen=True, slots=True)
class Settings:
    """A fake's settings; times are in seconds."""

    model: str
    role: Role = "both"
    """``prefill`` and ``decode`` take part in disaggregation; ``both`` accepts no ``kv_transfer_params``."""
    connector: Literal["nixl", "nixl-push", "mooncake", "shared-storage", "cache-threshold", "sglang"] = "nixl"
    """How blocks get from one to another (``links``)."""
    storage: str = ""
    """Directory that workers share, for those connectors that want one."""
    runner: Literal["generate", "pooling", "all"] = "all"
    """vLLM serves generation or pooling; ``all`` serves both, which spares a test a second fake."""
    max_model_len: int = 1024
    """Longest prompt plus answer, in tokens."""
    prefill_s: float = 0.0
    """Time to the first token."""
    token_s: float = 0.0
    """Time between tokens."""
    lease_s: float = 30.0
    """How long a prefill worker keeps blocks that no decode worker fetched (vLLM's ``kv_lease_duration``)."""
    created: int | None = None
    """The ``created`` of every answer; None: the time of day."""
    keep_alive_s: int = 5
    """After this long without a request a connection is closed (vLLM's VLLM_HTTP_TIMEOUT_KEEP_ALIVE)."""
    api_key: str = ""
    """The key that is wanted (vLLM's ``--api-key``) on the paths that vLLM asks it on; empty: none."""
    gateway: bool = False
    """A gateway (Envoy) may be before it, which does not name it in ``Host`` and sends bodies in chunks."""
    block_tokens: int = 16
    """Tokens in a KV block."""
    load_tracking: bool = False
    """It counts the requests that are not answered to their end (vLLM's ``--enable-server-load-tracking``)."""
    kv_events: bool = False
    """It publishes KV events (vLLM's ``--kv-events-config``)."""
    sleep_mode: bool = False
    """It can be put to sleep (vLLM's ``--enable-sleep-mode`` and ``VLLM_SERVER_DEV_MODE=1``)."""
