"""KV events as vLLM publishes them, read into one form.

A message is three ZMQ frames: topic, sequence number (8 bytes, big endian), payload. The payload is MessagePack,
``[timestamp, [event, ...], data_parallel_rank]``, whose last field may be missing. An event is a map with ``type``
(vllm#42892, June 2026) or, before, an array that begins with the type and goes on in the order of the fields;
trailing fields may be missing, later versions may append some. Source: vllm/distributed/kv_events.py.

Each event is decoded on its own, so that a batch of many can be worked off in small steps, and one of a type that is
not known costs only itself. Everything that comes from outside is checked here; ``BadEvent`` says what was wrong.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, Final, Protocol, TypeVar

import msgspec
from msgspec import Raw

from helios.decoding import converted, msgpack_decoder

SEQUENCE_BYTES: Final = 8
EVENTS_MAX: Final = 1 << 20
"""Most events in a batch."""
RANKS_MAX: Final = 1024
"""Most data-parallel ranks."""


class BadEvent(Exception):
    """What was received is no batch or event of vLLM's; what it should have said is lost."""


class Events(Protocol):
    """What takes events, one method for each type. Each gives control back between small steps."""

    def stored(self, event: Stored) -> Iterator[None]: ...

    def removed(self, event: Removed) -> Iterator[None]: ...

    def cleared(self) -> Iterator[None]: ...


class Batch(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One message: ``events`` are not decoded yet. ``ts`` is in seconds since 1970."""

    ts: float
    events: list[Raw]
    rank: int | None = None


class _Fields(msgspec.Struct, frozen=True, gc=False):
    """The fields of ``BlockStored`` in vLLM's order, both as a map and, below, as an array."""

    block_hashes: list[int | bytes]
    parent_block_hash: int | bytes | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[Any] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None


class _Gone(msgspec.Struct, frozen=True, gc=False):
    block_hashes: list[int | bytes]
    medium: str | None = None
    group_idx: int | None = None


class _Tag(msgspec.Struct):
    type: str


class Stored(msgspec.Struct, frozen=True, gc=False):
    """Blocks that follow each other are in a worker's cache.

    ``hashes`` name them at that worker; ``tokens`` are the token ids of all of them, packed (``pack``), or nothing
    where the worker does not say (some connectors). ``parent`` is the block before the first, None at the start of a
    prompt.
    ``extras``: what besides the tokens went into the worker's hash of each block, the adapter's name left out.
    """

    hashes: list[int]
    parent: int | None
    tokens: bytes
    block_size: int
    adapter: str | None
    medium: str
    extras: Sequence[Sequence[Any]]
    group: int
    kind: str

    def act(self, on: Events) -> Iterator[None]:
        return on.stored(self)


class Removed(msgspec.Struct, frozen=True, gc=False):
    """Blocks are no longer in the cache."""

    hashes: list[int]
    medium: str
    group: int

    def act(self, on: Events) -> Iterator[None]:
        return on.removed(self)


class Cleared(msgspec.Struct, frozen=True, gc=False):
    """Nothing is in the cache."""

    def act(self, on: Events) -> Iterator[None]:
        return on.cleared()


Event = Stored | Removed | Cleared

_batch = msgpack_decoder(Batch)
_tag = msgpack_decoder(_Tag)
_array = msgpack_decoder(list[Any])
_fields = msgpack_decoder(_Fields)
_gone = msgpack_decoder(_Gone)
_Form = TypeVar("_Form", bound=msgspec.Struct)
_MALFORMED: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def sequence_of(frame: bytes) -> int:
    """A message's number; -1 ends a replay. Raises BadEvent."""
    if len(frame) != SEQUENCE_BYTES:
        raise BadEvent(f"a sequence number has {len(frame)} bytes, not {SEQUENCE_BYTES}")
    return int.from_bytes(frame, "big", signed=True)


def read_batch(payload: bytes) -> Batch:
    """The outer form of a payload. Raises BadEvent."""
    try:
        batch = _batch.decode(payload)
    except _MALFORMED as error:
        raise BadEvent(f"not a batch of events: {error}") from None
    if not math.isfinite(batch.ts):
        raise BadEvent(f"a batch of the time {batch.ts}")
    if len(batch.events) > EVENTS_MAX:
        raise BadEvent(f"a batch of {len(batch.events)} events")
    if not 0 <= (batch.rank or 0) < RANKS_MAX:
        raise BadEvent(f"a batch of the rank {batch.rank}")
    return batch


def read_event(raw: Raw) -> Event | None:
    """One event, of either encoding; None for a type that is not known. Raises BadEvent."""
    data = memoryview(raw)
    try:
        if _is_array(data[0]):
            return _from_array(_array.decode(data))
        return _from_map(_tag.decode(data).type, data)
    except _MALFORMED as error:
        raise BadEvent(f"not an event: {error}") from None


def pack(token_ids: Sequence[int]) -> bytes:
    """Token ids as the index keeps them, 4 bytes each. Raises OverflowError or TypeError for what is no token id."""
    return array("I", token_ids).tobytes()


def _is_array(first: int) -> bool:
    """Whether a MessagePack value that begins with this byte is an array (fixarray, array 16, array 32)."""
    return first & 0xF0 == 0x90 or first in (0xDC, 0xDD)


def _from_map(kind: str, data: memoryview) -> Event | None:
    if kind == "BlockStored":
        return _stored(_fields.decode(data))
    if kind == "BlockRemoved":
        return _removed(_gone.decode(data))
    return Cleared() if kind == "AllBlocksCleared" else None


def _from_array(values: list[Any]) -> Event | None:
    """The same from an array: fields that are not known come after those that are."""
    kind, *fields = values or [None]
    if kind == "BlockStored":
        return _stored(_convert(fields, _Fields))
    if kind == "BlockRemoved":
        return _removed(_convert(fields, _Gone))
    if kind == "AllBlocksCleared":
        return Cleared()
    if isinstance(kind, str):
        return None
    raise BadEvent("an event without a type")


def _convert(fields: list[Any], form: type[_Form]) -> _Form:
    named = dict(zip(form.__struct_fields__, fields, strict=False))
    return converted(named, form)


def _stored(fields: _Fields) -> Stored:
    try:
        tokens = pack(fields.token_ids)
    except (OverflowError, TypeError):
        raise BadEvent("a token id is not between 0 and 2^32") from None
    extras = fields.extra_keys or ()
    name = fields.lora_name
    if name is None and fields.lora_id is not None:
        name = f"#{fields.lora_id}"  # before vLLM 0.12 an adapter has only its number, which no request names
    parent = fields.parent_block_hash
    return Stored(
        hashes=_hashes(fields.block_hashes),
        parent=None if parent is None else _hash(parent),
        tokens=tokens,
        block_size=fields.block_size,
        adapter=name,
        medium=fields.medium or "GPU",
        extras=[[key for key in keys or () if key != name] for keys in extras],
        group=fields.group_idx or 0,
        kind=fields.kv_cache_spec_kind or "full_attention",
    )


def _removed(fields: _Gone) -> Removed:
    return Removed(_hashes(fields.block_hashes), fields.medium or "GPU", fields.group_idx or 0)


def _hashes(hashes: list[int | bytes]) -> list[int]:
    return [_hash(one) for one in hashes]


def _hash(value: int | bytes) -> int:
    """Bytes become what vLLM itself makes of them for events with numbers: their last 64 bits."""
    return int.from_bytes(value[-8:], "big") if isinstance(value, bytes) else value
