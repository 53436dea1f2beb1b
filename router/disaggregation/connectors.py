"""How blocks get from one worker to another, as a table: what each connector wants in the two requests, and in which
order they are sent.

    SEQUENTIAL      prefill, then decode
    CONCURRENT      both at once; decode's answer is held until prefill has succeeded
    STORAGE_FIRST   decode with a threshold; only where too little is cached: prefill, then decode without one

A row says which fields stand in either body; ``Known`` are values that no table can hold. What a prefill worker answers
is never looked into, but where a row says so: fields come and go with releases, and only the other worker has to
understand them.

Sources: vLLM 0.32.0 is vllm/distributed/kv_transfer/kv_connector/v1 of that release, read; vLLM main its examples/
disaggregated; SGLang main its srt/disaggregation, srt/managers/scheduler.py and srt/entrypoints/openai/protocol.py;
llm-d-router its pkg/sidecar/proxy; all as of 2026. Rows say what was read of whom.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, NamedTuple

CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"
RESPONSES: Final = "/v1/responses"
VLLM_ROUTES: Final = frozenset({CHAT, COMPLETIONS, RESPONSES, "/v1/messages", "/inference/v1/generate"})
TRANSFER: Final = "kv_transfer_params"
THRESHOLD: Final = "cache_hit_threshold"


class Shape(Enum):
    SEQUENTIAL = 0
    CONCURRENT = 1
    STORAGE_FIRST = 2


class Learns(Enum):
    """Where it is known from what a row says of the prefill worker before that has answered."""

    NOTHING = 0
    ADDRESS = 1
    """The worker's own setting ``bootstrap``."""
    QUERY = 2
    """Mooncake's bootstrap server, asked before the pair is warmed."""
    ANSWER = 3
    """What the worker answered when the pair was warmed."""


class Known(NamedTuple):
    """A value that is put in its place; one that is ``optional`` may be missing, and the field with it."""

    name: str
    optional: bool = False


Template = Mapping[str, Any]
"""A JSON object of which some values are ``Known``."""

ANSWER: Final = Known("answer")
"""The prefill worker's own ``kv_transfer_params``."""
TRANSFER_ID: Final = Known("transfer_id")
"""New for each attempt, also for the next one at the same request."""


@dataclass(frozen=True, slots=True)
class Connector:
    """``prefill`` and ``decode``: the fields of the two bodies that are not the client's."""

    name: str
    shape: Shape
    prefill: Template
    decode: Template
    handshake: bool
    """Whether two workers' first exchange takes seconds, so that pairs are warmed."""
    learns: Learns = Learns.NOTHING
    routes: frozenset[str] = VLLM_ROUTES
    capped: bool = True
    """Whether the prefill request has to ask for a single token."""
    answers: bool = False
    """Whether a prefill worker that has blocks says so in ``kv_transfer_params``."""
    cut: bool = False
    """Whether only an answer that its limit has ended leaves blocks."""
    keeps: bool = False
    """Whether blocks stay after they were read, and without a lease."""
    alone: bool = True
    """Whether a decode worker can compute a prompt itself."""
    own_ids: bool = False
    """Whether workers find each other by the request's id: each attempt has one of its own then."""
    named: Mapping[str, str] = field(default_factory=dict)
    """Routes whose requests have that id in a field of the body, which is this one."""
    identity: frozenset[str] = frozenset()
    """What of an answer's parameters is the worker's own, and the same each time."""


NIXL: Final = Connector(
    # vLLM 0.32.0, nixl/pull_scheduler.py. The nulls are for releases that want the names.
    "nixl",
    Shape.SEQUENTIAL,
    prefill={
        TRANSFER: {
            "do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None, "remote_block_ids": None,
            "remote_host": None, "remote_port": None,
        }
    },
    decode={TRANSFER: ANSWER},
    handshake=True,
    answers=True,
)  # fmt: skip
NIXL_PUSH: Final = Connector(
    # vLLM 0.32.0, nixl/push_scheduler.py and push_worker.py: the decode worker registers its own blocks with the
    # prefill worker, which finds them by the request's id, without the suffix that vLLM adds (get_base_request_id); so
    # with one id for two attempts blocks would be written for the one that is gone. It wants tp_size and
    # remote_request_id (KeyError without), and knows no transfer_id, by which vLLM main pairs instead
    # (disagg_proxy_pushconnector_demo.py). That the prefill worker's coordinates are learned from an earlier answer is
    # llm-d-router's way (nixl_push_identity.go). /v1/responses has the id in its body, not in X-Request-Id.
    "nixl-push",
    Shape.CONCURRENT,
    prefill={
        TRANSFER: {
            "do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None, "remote_block_ids": None,
            "remote_host": None, "remote_port": None, "transfer_id": TRANSFER_ID,
        }
    },
    decode={
        TRANSFER: {
            "do_remote_decode": False, "do_remote_prefill": True, "remote_engine_id": Known("remote_engine_id"),
            "remote_host": Known("remote_host"), "remote_port": Known("remote_port"), "tp_size": Known("tp_size"),
            "pp_size": Known("pp_size", True), "dcp_size": Known("dcp_size", True),
            "remote_request_id": Known("request_id"), "transfer_id": TRANSFER_ID,
        }
    },
    handshake=True,
    learns=Learns.ANSWER,
    answers=True,
    own_ids=True,
    named={RESPONSES: "request_id"},
    identity=frozenset({"remote_engine_id", "remote_host", "remote_port", "tp_size", "pp_size", "dcp_size"}),
)  # fmt: skip
MOONCAKE: Final = Connector(
    # vLLM 0.32.0, mooncake/mooncake_connector.py and mooncake_utils.py (GET /query). A prompt whose one token is a stop
    # token leaves no blocks (request_finished wants FINISHED_LENGTH_CAPPED), and nobody tells the decode worker, which
    # waits for VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT, 480 s. The answer has no kv_transfer_params.
    "mooncake",
    Shape.CONCURRENT,
    prefill={TRANSFER: {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": TRANSFER_ID}},
    decode={
        TRANSFER: {
            "do_remote_decode": False, "do_remote_prefill": True, "transfer_id": TRANSFER_ID,
            "remote_bootstrap_addr": Known("bootstrap_addr"), "remote_engine_id": Known("engine_id"),
        }
    },
    handshake=True,
    learns=Learns.QUERY,
    cut=True,
)  # fmt: skip
SHARED_STORAGE: Final = Connector(
    # vLLM 0.32.0: connectors that look into their storage for every prompt, and want nothing of a request. Of their
    # sources example_connector.py, hf3fs and mooncake/store read no kv_transfer_params; lmcache_integration,
    # lmcache_mp_connector.py, offloading and flexkv_connector.py read some that may be missing.
    "shared-storage",
    Shape.SEQUENTIAL,
    prefill={},
    decode={},
    handshake=False,
    keeps=True,
)
CACHE_THRESHOLD: Final = Connector(
    # vLLM RFC #24256, as llm-d-router (connector_shared_storage.go) and llm-d-inference-sim have it, for these two
    # routes. No release of vLLM has it up to 0.32.0, which ignores the field and computes the prompt.
    "cache-threshold",
    Shape.STORAGE_FIRST,
    prefill={THRESHOLD: 0},
    decode={THRESHOLD: 0},
    handshake=False,
    routes=frozenset({CHAT, COMPLETIONS}),
    keeps=True,
)
SGLANG: Final = Connector(
    # SGLang main: both requests name the prefill worker's bootstrap server and a room that is theirs. Prefill sets its
    # own limit to 1 (PrefillBootstrapQueue._process_req), and its token is the answer's first one, so that nothing of
    # the client's request may differ there; it answers when the decode worker has all blocks, and waits for that one
    # before it begins. A decode worker refuses what has no room (scheduler.py), so it can't compute a prompt itself.
    # Only these two of its routes take the fields (protocol.py).
    "sglang",
    Shape.CONCURRENT,
    prefill={
        "bootstrap_host": Known("bootstrap_host"), "bootstrap_port": Known("bootstrap_port"),
        "bootstrap_room": Known("room"),
    },
    decode={
        "bootstrap_host": Known("bootstrap_host"), "bootstrap_port": Known("bootstrap_port"),
        "bootstrap_room": Known("room"),
    },
    handshake=True,
    learns=Learns.ADDRESS,
    routes=frozenset({CHAT, COMPLETIONS}),
    capped=False,
    alone=False,
)  # fmt: skip
CONNECTORS: Final = {one.name: one for one in (NIXL, NIXL_PUSH, MOONCAKE, SHARED_STORAGE, CACHE_THRESHOLD, SGLANG)}
