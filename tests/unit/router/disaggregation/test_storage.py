"""Workers that share a storage, through the relay: blocks that stay, and a worker that is asked first what it has."""

from __future__ import annotations

import json
from typing import Any

import pytest

from helios.config import RetrySettings
from router.disaggregation.holding import DOCUMENT_MAX, STREAM_MAX
from tests.support.relaying import EVENTS
from tests.support.splitting import LONG, WORKERS, Split, answer, asked, joins

GENERATION = RetrySettings(most=2, budget_floor_per_s=100, retry_generation=True)
COMPUTED = answer({"choices": [{"finish_reason": "length"}]})
ANSWER = answer({"choices": [{"message": {"content": "hello"}, "finish_reason": "stop"}]})
MISSED = answer({"choices": [{"message": {"content": ""}, "finish_reason": "cache_threshold"}]})
STREAM = json.dumps(json.loads(LONG) | {"stream": True}).encode()
ROLE = b'data: {"choices":[{"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
TEXT = b'data: {"choices":[{"delta":{"content":"hi"},"finish_reason":null}]}\n\n'
THRESHOLD = b'data: {"choices":[{"delta":{},"finish_reason":"cache_threshold"}]}\n\n'
DONE = b"data: [DONE]\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def test_the_prompt_is_computed_first_and_nothing_is_said_of_blocks() -> None:
    scene = Split(connector="shared-storage", warm=False).asks()
    prefill = joins(scene, b"p:1")
    assert asked(prefill)[2]["max_tokens"] == 1
    prefill.comes(COMPUTED)
    decode = joins(scene, b"d:1")
    assert asked(decode)[2] == json.loads(LONG)
    decode.comes(ANSWER)
    assert scene.results() == {"remote": 1}
    scene.settled()


@pytest.mark.parametrize("connector", ["shared-storage", "cache-threshold"])
def test_what_is_in_the_storage_is_there_for_the_next_worker_however_late(connector: str) -> None:
    scene = Split(connector=connector, workers=(*WORKERS, "m=http://e:1,role=decode"), retries=GENERATION).asks()
    if connector == "cache-threshold":
        joins(scene, b"d:1").comes(MISSED)
    joins(scene, b"p:1").comes(COMPUTED)
    scene.now += 40
    joins(scene, b"d:1").breaks(stale=False)
    other = joins(scene, b"e:1")
    assert asked(other)[2].get("cache_hit_threshold") in (None, 0)
    other.comes(ANSWER)
    assert scene.results() == {"remote": 1}, "computed once"
    scene.settled()


def test_a_worker_that_has_enough_answers_at_once() -> None:
    scene = Split(connector="cache-threshold").asks()
    decode = joins(scene, b"d:1")
    assert asked(decode)[2] == json.loads(LONG) | {"cache_hit_threshold": 0.8}
    decode.comes(ANSWER)
    assert scene.text.endswith(ANSWER.partition(b"\r\n\r\n")[2])
    assert scene.results() == {"cached": 1}
    scene.settled()


@pytest.mark.parametrize("cut", ["whole", "bytes"])
def test_a_stream_begins_when_it_shows_that_it_is_one(cut: str) -> None:
    scene = Split(connector="cache-threshold").asks(STREAM)
    decode = joins(scene, b"d:1")
    comes = EVENTS + chunk(b": alive\n\n") + chunk(ROLE)
    decode.comes(comes)
    assert scene.text == b""
    rest = chunk(TEXT) + chunk(DONE) + b"0\r\n\r\n"
    for piece in [rest] if cut == "whole" else [rest[at : at + 1] for at in range(len(rest))]:
        decode.comes(piece)
    assert scene.text.endswith(chunk(DONE) + b"0\r\n\r\n")
    assert ROLE in scene.text
    assert scene.results() == {"cached": 1}
    scene.settled()


@pytest.mark.parametrize("comes", [chunk(ROLE) + chunk(THRESHOLD), chunk(ROLE + THRESHOLD + DONE) + b"0\r\n\r\n"])
@pytest.mark.parametrize("cut", ["whole", "bytes"])
def test_a_stream_that_says_that_too_little_is_cached_is_seen_by_nobody(comes: bytes, cut: str) -> None:
    scene = Split(connector="cache-threshold").asks(STREAM)
    decode = joins(scene, b"d:1")
    decode.comes(EVENTS)
    for piece in [comes] if cut == "whole" else [comes[at : at + 1] for at in range(len(comes))]:
        if decode.asker is not None:
            decode.comes(piece)
    assert decode.ended in ("kept", "aborted")
    assert scene.text == b""
    prefill = joins(scene, b"p:1")
    assert asked(prefill)[2]["cache_hit_threshold"] == 0
    prefill.comes(COMPUTED)
    again = joins(scene, b"d:1")
    assert asked(again)[2] == json.loads(STREAM) | {"cache_hit_threshold": 0}
    again.comes(EVENTS + chunk(ROLE) + chunk(TEXT) + chunk(DONE) + b"0\r\n\r\n")
    assert scene.text.count(ROLE) == 1
    assert scene.results() == {"remote": 1}
    scene.settled()


@pytest.mark.parametrize("fault", ["not_connected", "broke", "refused", "late"])
def test_where_the_prompt_can_not_be_computed_elsewhere_the_worker_does_without_a_threshold(fault: str) -> None:
    scene = Split(connector="cache-threshold").asks()
    joins(scene, b"d:1").comes(MISSED)
    if fault == "not_connected":
        scene.connecting().not_connected("refused")
    else:
        prefill = joins(scene, b"p:1")
        if fault == "broke":
            prefill.breaks(stale=False)
        elif fault == "refused":
            prefill.comes(answer({}, b"500 Internal Server Error"))
        else:
            scene.later(21)
    again = joins(scene, b"d:1")
    assert asked(again)[2] == json.loads(LONG)
    again.comes(ANSWER)
    scene.settled()


@pytest.mark.parametrize(
    "comes",
    [
        answer({"error": {}}, b"400 Bad Request"),
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 3\r\n\r\nabc",
        answer({"choices": []}),
        answer({"choices": [{"text": "x" * (DOCUMENT_MAX + 10)}]}),
    ],
)
def test_whatever_else_it_says_is_its_answer(comes: bytes) -> None:
    scene = Split(connector="cache-threshold").asks()
    joins(scene, b"d:1").comes(comes)
    assert scene.text.endswith(comes.partition(b"\r\n\r\n")[2])
    scene.settled()


def test_what_is_held_has_a_bound() -> None:
    scene = Split(connector="cache-threshold").asks(STREAM)
    decode = joins(scene, b"d:1")
    decode.comes(EVENTS)
    comment = chunk(b": " + b"x" * 1000 + b"\n\n")
    for _ in range(STREAM_MAX // 1000 + 1):
        decode.comes(comment)
    assert scene.text.count(comment) > 10
    decode.comes(b"0\r\n\r\n")
    scene.settled()


def test_a_worker_that_breaks_off_while_it_is_asked_is_replaced_and_the_next_one_is_asked_too() -> None:
    scene = Split(connector="cache-threshold", workers=(*WORKERS, "m=http://e:1,role=decode"), retries=GENERATION)
    decode = joins(scene.asks(STREAM), b"d:1")
    decode.comes(EVENTS + chunk(ROLE))
    decode.breaks(stale=False)
    other = joins(scene, b"e:1")
    assert asked(other)[2]["cache_hit_threshold"] == 0.8
    other.comes(ANSWER)
    assert scene.text.startswith(b"HTTP/1.1 200")
    scene.settled()


@pytest.mark.parametrize("body", [LONG, STREAM])
def test_a_client_that_leaves_ends_it(body: bytes) -> None:
    scene = Split(connector="cache-threshold").asks(body)
    decode = joins(scene, b"d:1")
    decode.comes(EVENTS + chunk(ROLE))
    scene.exchange.gone()
    assert decode.ended == "aborted"
    scene.settled()


def test_a_stale_connection_is_asked_anew() -> None:
    scene = Split(connector="cache-threshold")
    scene.pool.has_idle = True
    scene.asks()
    scene.pool.made[-1].breaks(stale=True)
    again = joins(scene, b"d:1")
    assert asked(again)[2]["cache_hit_threshold"] == 0.8
    again.comes(ANSWER)
    assert scene.results() == {"cached": 1}
    scene.settled()


def test_what_has_other_workers_of_no_use_is_not_asked() -> None:
    found: Any = {}
    for name, workers in (("no_worker", WORKERS[:1]), ("short", WORKERS)):
        scene = Split(connector="cache-threshold", workers=workers)
        scene.asks(LONG if name == "no_worker" else json.dumps({"model": "m", "messages": []}).encode())
        decode = joins(scene, b"d:1")
        assert "cache_hit_threshold" not in asked(decode)[2]
        decode.comes(ANSWER)
        found |= scene.results()
    assert found == {"no_worker": 1, "short": 1}
