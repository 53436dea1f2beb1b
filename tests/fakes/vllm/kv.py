"""KV blocks between a prefill and a decode worker: minted once, under a lease, fetched once, unchanged.

The prefill worker's ``Ledger`` mints ``kv_transfer_params`` (the fields of vLLM's NIXL connector in pull mode, and one
of the fake's own, because more fields come with every release and a router must carry all of them). The decode worker
asks the prefill worker named in the parameters for them back (``POST /kv/claim`` on its control port, in the place of
NIXL's side channel); whatever differs from what was minted is refused.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from tests.fakes.vllm.settings import Settings

Params = dict[str, Any]
PREFILL_LEG: Final = {"do_remote_decode": True, "do_remote_prefill": False}


class KvError(Exception):
    """Parameters that are not a prefill worker's, or not any more."""


@dataclass(slots=True)
class Lease:
    params: Params
    blocks: int
    expires: float


class Ledger:
    """The blocks a prefill worker holds for decode workers. ``clock`` gives seconds."""

    def __init__(self, settings: Settings, clock: Callable[[], float], host: str, port: int) -> None:
        self._settings, self._clock, self._host, self._port = settings, clock, host, port
        self.engine = str(uuid.uuid4())
        self._leases: dict[str, Lease] = {}
        self._spent: set[str] = set()
        self._next_block = 1
        self.claimed = 0
        self.stranded = 0
        """Blocks whose lease ran out before anybody fetched them, since the start."""

    def mint(self, request_id: str, prompt_tokens: int) -> Params:
        """Pin the blocks of a prompt and return the parameters with which they can be fetched."""
        self.expire()
        params = self.described(request_id, prompt_tokens)
        blocks = sum(len(group) for group in params["remote_block_ids"])
        key = params["remote_request_id"]
        self._leases[key] = Lease(params, blocks, self._clock() + self._settings.lease_s)
        return params

    def described(self, request_id: str, prompt_tokens: int) -> Params:
        """New blocks of a prompt, and who has them."""
        key = f"{request_id}-0-{uuid.uuid4().hex[:8]}"
        blocks = -(-prompt_tokens // self._settings.block_tokens)
        params: Params = {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [list(range(self._next_block, self._next_block + blocks))],
            "remote_engine_id": self.engine,
            "remote_request_id": key,
            "remote_host": self._host,
            "remote_port": self._port,
            "tp_size": 1,
            "dcp_size": 1,
            "pp_size": 1,
            "remote_num_tokens": prompt_tokens,
            "remote_blocks_expiry_time": None,
            "transfer_mode": "pull",
            "remote_prefill_cached_tokens": 0,
            "fake_opaque": uuid.uuid4().hex,
        }
        self._next_block += blocks
        return params

    def claim(self, params: Params, prompt_tokens: int) -> None:
        """Fetch the blocks, which frees them; raises KvError."""
        self.expire()
        key = params.get("remote_request_id")
        if key in self._spent:
            raise KvError(f"the parameters of {key} were used before, or their lease ran out")
        if not isinstance(key, str) or (lease := self._leases.get(key)) is None:
            raise KvError(f"no blocks are held for {key!r}")
        if params != lease.params:
            names = sorted(k for k in params.keys() | lease.params.keys() if params.get(k) != lease.params.get(k))
            raise KvError(f"the parameters differ from those minted in {', '.join(names)}")
        if prompt_tokens != params["remote_num_tokens"]:
            raise KvError(f"the prompt has {prompt_tokens} tokens, the blocks hold {params['remote_num_tokens']}")
        del self._leases[key]
        self._spent.add(key)
        self.claimed += 1

    def expire(self) -> None:
        """Free the blocks whose lease ran out."""
        now = self._clock()
        for key in [key for key, lease in self._leases.items() if lease.expires <= now]:
            self.stranded += self._leases.pop(key).blocks
            self._spent.add(key)

    @property
    def held(self) -> int:
        """Blocks pinned now."""
        self.expire()
        return sum(lease.blocks for lease in self._leases.values())


def check_prefill_leg(params: Params, *, stream: bool, limit: int | None, min_tokens: int) -> None:
    """What a prefill worker demands of its leg; raises KvError."""
    if any(params.get(name) is not wanted for name, wanted in PREFILL_LEG.items()):
        raise KvError("a prefill leg says do_remote_decode true and do_remote_prefill false")
    if set_already := [k for k, v in params.items() if v is not None and k not in PREFILL_LEG]:
        raise KvError(f"a prefill leg names no remote: {', '.join(set_already)}")
    if stream or limit != 1 or min_tokens > 1:
        raise KvError(f"a prefill leg asks for one token and no stream, not {limit=} {stream=} {min_tokens=}")
