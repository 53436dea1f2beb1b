"""KV events as they come: recorded from vLLM 0.32, made by hand in both encodings, and hostile ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.kv.index import KvIndex
from router.kv.wire import BadEvent, Cleared, Removed, Stored, pack, read_batch, read_event, sequence_of
from tests.support.kv_events import CLEARED, decode, encode, removed, stored

RECORDED = Path(__file__).parents[3] / "golden" / "vllm" / "kv-events.jsonl"


def take(index: KvIndex, frames: list[str], *, arrays: bool) -> None:
    """Take in a recorded message, or the same in the older encoding."""
    *_, payload = map(bytes.fromhex, frames)
    if arrays:
        ts, events, rank = msgspec.msgpack.decode(payload)
        payload = encode(events, arrays=True, rank=rank, ts=ts)
    for event in decode(payload):
        assert event is not None
        for _ in event.act(index.rank("w", 0)):
            pass


@pytest.mark.parametrize("arrays", [False, True])
def test_the_index_says_what_real_vllm_has_cached_for_each_prompt(arrays: bool) -> None:
    """Prompts that share beginnings, repeat and push each other out, and what vLLM 0.32 itself reported of each."""
    index, number, said = KvIndex(), 0, []
    _, *asked = map(json.loads, RECORDED.read_text().splitlines())
    for one in asked:
        said.append(index.score(pack(one["prompt"]), ["w"]).get("w", 0))
        for message in one["messages"]:
            assert sequence_of(bytes.fromhex(message["frames"][1])) == number
            number += 1
            take(index, message["frames"], arrays=arrays)
    assert said == [one["cached"] for one in asked]
    assert len(set(said)) > 5
    assert index.skipped == {}


def test_a_replay_of_real_vllm_brings_the_same() -> None:
    index, again = KvIndex(), KvIndex()
    first, *asked = map(json.loads, RECORDED.read_text().splitlines())
    *messages, end = first["replay"]
    assert sequence_of(bytes.fromhex(end["frames"][-2])) == -1
    for number, message in enumerate(messages):
        assert sequence_of(bytes.fromhex(message["frames"][-2])) == number
        take(again, message["frames"], arrays=False)
    for one in asked:
        for message in one["messages"]:
            take(index, message["frames"], arrays=False)
    assert 0 < index.held == again.held
    for one in asked:
        assert index.score(pack(one["prompt"]), ["w"]) == again.score(pack(one["prompt"]), ["w"])


@pytest.mark.parametrize("arrays", [False, True])
def test_both_encodings_say_the_same(arrays: bool) -> None:
    events = [
        stored([5, 6], 4, range(8), lora_id=3, lora_name="sql", extra_keys=[["sql", ["image", 1]], None], group_idx=2),
        removed([7], medium="CPU", group_idx=1),
        CLEARED,
    ]
    assert decode(encode(events, arrays=arrays)) == [
        Stored([5, 6], 4, pack(range(8)), 4, "sql", "GPU", [[["image", 1]], []], 2, "full_attention"),
        Removed([7], "CPU", 1),
        Cleared(),
    ]


def test_events_of_the_first_versions_lack_the_later_fields() -> None:
    old = [
        ["BlockStored", [1, 2], None, list(range(8)), 4, None],
        ["BlockStored", [3], 2, list(range(4)), 4, 7, "CPU"],
        ["BlockRemoved", [1]],
        ["AllBlocksCleared"],
    ]
    first, second, third, fourth = decode(msgspec.msgpack.encode([1.0, old]))
    assert first == Stored([1, 2], None, pack(range(8)), 4, None, "GPU", [], 0, "full_attention")
    assert second == Stored([3], 2, pack(range(4)), 4, "#7", "CPU", [], 0, "full_attention")
    assert (third, fourth) == (Removed([1], "GPU", 0), Cleared())
    assert read_batch(msgspec.msgpack.encode([1.0, []])).rank is None


@pytest.mark.parametrize("arrays", [False, True])
def test_later_versions_may_add_fields_and_types(arrays: bool) -> None:
    events = [
        stored([1], None, range(4))
        | {"window": None, "locality": "LOCAL", "ownership": None, "session": "s", "z": [1]},
        {"type": "BlockMoved", "block_hashes": [1]},
        removed([1]) | {"locality": None, "ownership": None, "z": 1},
    ]
    one, two, three = decode(encode(events, arrays=arrays))
    assert (type(one), two, three) == (Stored, None, Removed([1], "GPU", 0))
    assert len(read_batch(msgspec.msgpack.encode([1.0, [], 0, "more", {}])).events) == 0


def test_names_in_bytes_are_their_last_64_bits() -> None:
    digest = bytes(range(32))
    number = int.from_bytes(digest, "big") & (1 << 64) - 1
    assert decode(encode([removed([digest, number])])) == [Removed([number, number], "GPU", 0)]


@pytest.mark.parametrize(
    "payload",
    [b"", b"\xc1", b"\x93", b"not MessagePack at all", *map(msgspec.msgpack.encode, (
        None, {}, [], [1.0], ["now", []], [1.0, {}], [1.0, [], "0"], [1.0, [], -1], [1.0, [], 5000],
    ))],
)  # fmt: skip
def test_what_is_no_batch_is_refused(payload: bytes) -> None:
    with pytest.raises(BadEvent):
        read_batch(payload)


@pytest.mark.parametrize(
    "event",
    [
        None, 1, "BlockStored", {}, [], [None], {"type": 1}, {"type": "BlockStored"}, ["BlockStored"],
        ["BlockStored", 1], ["BlockRemoved"], {"type": "BlockRemoved", "block_hashes": [1.5]},
        stored([1], None, [-1] * 4), stored([1], None, [1 << 32] * 4), stored([1], None, ["a"]),
        stored(["x"], None, []),
        stored([1], "x", [1] * 4), stored([1], None, [1] * 4, "4"), stored([1], None, [1] * 4, extra_keys=[1]),
        stored([1], None, [1] * 4, group_idx="0"), {"type": "\ud800".encode("utf-8", "surrogatepass")},
    ],
)  # fmt: skip
def test_what_is_no_event_is_refused(event: Any) -> None:
    (raw,) = read_batch(msgspec.msgpack.encode([1.0, [event]])).events
    with pytest.raises(BadEvent):
        read_event(raw)


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(BadEvent):
        decode(b"\x92\xcb" + bytes(8) + b"\x91" * 100_000 + b"\xc0")


@given(st.binary(max_size=60) | st.recursive(
    st.none() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=3) | st.sampled_from(["BlockStored", "type"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=12,
).map(lambda value: msgspec.msgpack.encode([1.0, [value]])))  # fmt: skip
def test_anything_else_is_read_or_refused(payload: bytes) -> None:
    try:
        events = decode(payload)
    except BadEvent:
        return
    index = KvIndex()
    for event in events:
        if event is not None:
            for _ in event.act(index.rank("w", 0)):
                pass


@pytest.mark.parametrize(("frame", "number"), [(bytes(8), 0), (b"\xff" * 8, -1), (b"\0" * 6 + b"\1\2", 258)])
def test_numbers_of_messages(frame: bytes, number: int) -> None:
    assert sequence_of(frame) == number
    with pytest.raises(BadEvent):
        sequence_of(frame[1:])
