"""A worker's KV cache and its publisher, simulated: what vLLM's block pool stores, removes and says about it.

Blocks are physical: two requests that compute the same block at the same time give it two copies, each of which is
removed on its own, as in vLLM.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from router.kv.wire import Event, read_batch, read_event

BLOCK = 4
Prefix = tuple[Any, ...]
"""Adapter and salt, and then the tokens up to a block's end."""


def encode(events: Sequence[dict[str, Any]], *, arrays: bool = False, rank: int | None = 0, ts: float = 1.5) -> bytes:
    """A payload in either encoding. The fields of ``events`` are in vLLM's order."""
    listed = [list(event.values()) for event in events] if arrays else list(events)
    return msgspec.msgpack.encode([ts, listed] if rank is None else [ts, listed, rank])


def decode(payload: bytes) -> list[Event | None]:
    return [read_event(raw) for raw in read_batch(payload).events]


def stored(
    hashes: Sequence[int | bytes], parent: int | bytes | None, tokens: Sequence[int], block: int = BLOCK, **more: Any
) -> dict[str, Any]:
    """``BlockStored`` as vLLM 0.32 writes it."""
    event = {
        "type": "BlockStored", "block_hashes": list(hashes), "parent_block_hash": parent, "token_ids": list(tokens),
        "block_size": block, "lora_id": None, "medium": "GPU", "lora_name": None, "extra_keys": None, "group_idx": 0,
        "kv_cache_spec_kind": "full_attention",
    }  # fmt: skip
    return event | more


def removed(hashes: Sequence[int | bytes], **more: Any) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": list(hashes), "medium": "GPU", "group_idx": 0} | more


CLEARED = {"type": "AllBlocksCleared"}


@dataclass
class Cache:
    """Blocks by prefix with their copies, and the events since ``flush``."""

    seed: int = 0
    """Another seed gives other hashes, as another PYTHONHASHSEED does."""
    copies: dict[Prefix, int] = field(default_factory=dict)
    on_cpu: set[Prefix] = field(default_factory=set)
    events: list[dict[str, Any]] = field(default_factory=list)

    def name(self, prefix: Prefix) -> int:
        return hash((self.seed, prefix)) & (1 << 64) - 1

    def prefixes(self, tokens: Sequence[int], adapter: str | None = None, salt: str | None = None) -> list[Prefix]:
        ends = range(BLOCK, len(tokens) + 1, BLOCK)
        return [(adapter, salt, *tokens[:end]) for end in ends]

    def longest(self, tokens: Sequence[int], adapter: str | None = None, salt: str | None = None) -> int:
        """Cached tokens of a prompt, as the worker would find them: the last token is always computed."""
        count = 0
        for prefix in self.prefixes(tokens[:-1], adapter, salt):
            if prefix not in self.copies and prefix not in self.on_cpu:
                break
            count += BLOCK
        return count

    def compute(
        self, tokens: Sequence[int], adapter: str | None = None, salt: str | None = None, *, reuse: bool = True
    ) -> None:
        """A request: what is cached is reused, the rest stored. Without ``reuse`` all is computed once more."""
        all_of_it = self.prefixes(tokens, adapter, salt)
        first = 0
        if reuse:
            while first < len(all_of_it) and all_of_it[first] in self.copies:
                first += 1
        new = all_of_it[first:]
        if not new:
            return
        for prefix in new:
            self.copies[prefix] = self.copies.get(prefix, 0) + 1
        more: dict[str, Any] = {"lora_name": adapter, "lora_id": 7 if adapter else None}
        keys = [[adapter] if adapter else [] for _ in new]
        if salt and not first:
            keys[0].append(salt)
        if any(keys):
            more["extra_keys"] = [one or None for one in keys]
        parent = self.name(all_of_it[first - 1]) if first else None
        end = len(all_of_it) * BLOCK
        self.events.append(stored([self.name(p) for p in new], parent, tokens[first * BLOCK : end], **more))

    def remove(self, prefix: Prefix) -> None:
        """Give one copy of a block's memory to somebody else."""
        self.copies[prefix] -= 1
        if not self.copies[prefix]:
            del self.copies[prefix]
        self.events.append(removed([self.name(prefix)]))

    def offload(self, prefix: Prefix) -> None:
        """Copy a block to CPU memory, of which the connector says no tokens."""
        if prefix not in self.on_cpu:
            self.on_cpu.add(prefix)
            name = self.name(prefix)
            self.events.append(stored([name], None, [], 0, medium="CPU", kv_cache_spec_kind=None))

    def unload(self, prefix: Prefix) -> None:
        self.on_cpu.remove(prefix)
        self.events.append(removed([self.name(prefix)], medium="CPU"))

    def clear(self) -> None:
        self.copies.clear()
        self.on_cpu.clear()
        self.events.append(CLEARED)

    def flush(self, *, arrays: bool = False, rank: int | None = 0, ts: float = 1.5) -> bytes | None:
        """The payload of what happened, if anything did."""
        events, self.events = self.events, []
        return encode(events, arrays=arrays, rank=rank, ts=ts) if events else None


@dataclass
class Log:
    """A publisher's numbers and its memory of the last messages."""

    kept: int = 1000
    number: int = 0
    buffer: deque[tuple[int, bytes]] = field(default_factory=deque)

    def publish(self, payload: bytes) -> tuple[int, bytes]:
        message = (self.number, payload)
        self.number += 1
        self.buffer.append(message)
        while len(self.buffer) > self.kept:
            self.buffer.popleft()
        return message

    def replay(self, first: int) -> list[tuple[int, bytes]]:
        return [message for message in self.buffer if message[0] >= first]
