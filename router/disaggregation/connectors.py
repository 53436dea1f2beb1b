"""Which parameters vLLM's connectors want of the two requests, as a table.

What the prefill worker answers is never looked into: fields come and go with vLLM's releases, and only the other
worker has to understand them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Connector:
    """``prefill``: the parameters of the request for prefill, JSON. The other one has what that is answered with."""

    name: str
    prefill: bytes
    handshake: bool
    """Whether two workers' first exchange takes seconds."""


NIXL: Final = Connector(
    # vllm/distributed/kv_transfer/kv_connector/v1/nixl, pull mode; the nulls are for releases that want the names.
    "nixl",
    b'{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,'
    b'"remote_host":null,"remote_port":null}',
    handshake=True,
)
CONNECTORS: Final = {one.name: one for one in (NIXL,)}
