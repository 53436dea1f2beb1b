"""The tokens an answer used: read from its own last bytes, however it was cut into pieces."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.admission.usage import KEPT, Meter

USAGE = {"prompt_tokens": 7, "total_tokens": 12, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 3}}
LIE = {"total_tokens": 1, "prompt_tokens": 1}


def chunks(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def event(document: Any, name: str = "") -> bytes:
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + json.dumps(document, separators=(",", ":")).encode() + b"\n\n"


def metered(data: bytes, cuts: list[int], *, chunked: bool, events: bool) -> int | None:
    meter = Meter()
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    for begin, end in pairwise(edges):
        meter.feed(data[begin:end])
    return meter.tokens(chunked, events)


TEXT = 'he said "usage":{"total_tokens":1} and \r\n5\r\n left'
DOCUMENT = {"id": "x", "choices": [{"message": {"content": TEXT}}], "usage": USAGE, "kv_transfer_params": None}
cuts = st.lists(st.integers(0, 100_000), max_size=8)


@given(cuts, st.booleans(), st.integers(0, 3))
def test_of_a_whole_answer(cut: list[int], chunked: bool, long: int) -> None:
    data = json.dumps(
        {**DOCUMENT, "metadata": {"usage": "1"}, "before": 0} | ({"id": "y" * 9000} if long else {})
    ).encode()
    pieces = [data[:50], data[50:90], data[90:]]
    assert metered(chunks(*pieces) if chunked else data, cut, chunked=chunked, events=False) == 12


@given(cuts, st.integers(0, 60))
def test_of_a_stream(cut: list[int], number: int) -> None:
    many = [event({"choices": [{"delta": {"content": TEXT}}]}) for _ in range(number)]
    data = chunks(*many, event({"choices": [], "usage": USAGE}), b"data: [DONE]\n\n")
    assert metered(data, cut, chunked=True, events=True) == 12


def test_of_a_stream_with_running_totals_the_last_counts() -> None:
    data = chunks(event({"usage": LIE}), event({"usage": USAGE}), b"data: [DONE]\n\n")
    assert metered(data, [], chunked=True, events=True) == 12


@pytest.mark.parametrize("length", [10, 4 * KEPT])
def test_of_a_stream_of_responses(length: int) -> None:
    usage = {
        "input_tokens": 4,
        "output_tokens": 6,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 10,
    }
    response = {"output": "y" * length, "usage": usage, "user": None}
    data = chunks(event({"type": "response.completed", "response": response}, "response.completed"))
    assert metered(data, [], chunked=True, events=True) == 10


def test_of_a_stream_of_messages() -> None:
    data = chunks(
        event({"type": "message_delta", "usage": {"input_tokens": 20, "output_tokens": 2}}, "message_delta"),
        event({"type": "message_stop"}, "message_stop"),
    )
    assert metered(data, [], chunked=True, events=True) == 22


@pytest.mark.parametrize(
    ("data", "events"),
    [(b"", False), (b"{}", False), (b'{"usage":null}', False), (b'{"usage":{"total_tokens":-4}}', False),
     (b'{"usage":{"total_tokens":"9"}}', False), (b'{"usage":{}}', False), (b"\x1f\x8b\xff", False),
     (event({"choices": []}) + b"data: [DONE]\n\n", True), (event({"a": '"usage":{"total_tokens":5}'}), True),
     (b'data: {"usage":{"total_tokens":5', True)],
)  # fmt: skip
def test_where_the_answer_does_not_say(data: bytes, events: bool) -> None:
    assert metered(data, [], chunked=False, events=events) is None


def test_of_a_long_answer_the_end_is_kept_and_no_more() -> None:
    meter = Meter()
    for _ in range(1000):
        meter.feed(b"x" * 1000)
    meter.feed(json.dumps(DOCUMENT).encode()[1:])
    assert meter.tokens(chunked=False, events=False) == 12
    assert sum(map(len, meter._pieces)) < KEPT + 1000
