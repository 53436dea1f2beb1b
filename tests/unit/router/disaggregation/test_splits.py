"""Requests whose prompts another worker computes, through the relay: who is asked what, in which order, and what a
client gets when something fails (the cases of llm-d's sidecar, docs/router-disaggregation.md)."""

from __future__ import annotations

import json
from typing import Any

import pytest

from helios.config import RetrySettings
from router.resilience.outcome import Outcome
from tests.support.relaying import BODY, EVENT, EVENTS, LAST
from tests.support.splitting import ANSWER, BLOCKS, LONG, PREFILLED, WORKERS, Split, answer, asked


def test_the_prompt_is_computed_first_and_the_answer_has_its_blocks() -> None:
    scene = Split().asks()
    assert scene.load("http://d:1") == (1, 0), "it waits for its blocks, and has nothing to compute"
    assert scene.load("http://p:1")[0] == 1
    assert scene.load("http://p:1")[1] > 1000
    prefill = scene.connected()
    line, first, body = asked(prefill)
    assert (line, first["host"]) == (b"POST /v1/chat/completions HTTP/1.1", b"p:1")
    assert (body["max_tokens"], body["stream"]) == (1, False)
    assert body["kv_transfer_params"]["do_remote_decode"] is True
    prefill.comes(PREFILLED)
    assert prefill.ended == "kept"
    assert scene.load("http://p:1") == (0, 0)
    decode = scene.connected()
    line, second, body = asked(decode)
    assert second["host"] == b"d:1"
    assert body == json.loads(LONG) | {"kv_transfer_params": BLOCKS}
    assert first["x-request-id"] == second["x-request-id"] == b"id-1"
    assert first["traceparent"][:35] == second["traceparent"][:35]
    decode.comes(ANSWER)
    assert scene.text.endswith(b'{"choices": ["a"]}')
    assert scene.results() == {"remote": 1}
    scene.settled()


def test_a_stream_stays_one() -> None:
    body = json.dumps(json.loads(LONG) | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    scene = Split().asks(body)
    prefill = scene.connected()
    assert "stream_options" not in asked(prefill)[2]
    prefill.comes(PREFILLED)
    decode = scene.connected()
    assert asked(decode)[2] == json.loads(body) | {"kv_transfer_params": BLOCKS}
    decode.comes(EVENTS + EVENT + LAST)
    assert EVENT in scene.text
    scene.settled()


@pytest.mark.parametrize(
    ("body", "workers", "why"),
    [
        (BODY, WORKERS, "short"),
        (LONG, WORKERS[:1], "no_worker"),
        (LONG, ("m=http://d:1,role=decode,revision=b", "m=http://p:1,role=prefill,revision=a"), "no_worker"),
        (json.dumps(json.loads(LONG) | {"n": 2}).encode(), WORKERS, "several_answers"),
        (LONG, ("m=http://d:1", "m=http://p:1,role=prefill"), None),
    ],
)
def test_what_is_computed_where_it_is_answered(body: bytes, workers: Any, why: str | None) -> None:
    scene = Split(workers=workers).asks(body)
    decode = scene.connected()
    _, headers, got = asked(decode)
    assert (headers["host"], got) == (b"d:1", json.loads(body))
    decode.comes(ANSWER)
    assert scene.results() == ({why: 1} if why else {})
    scene.settled()


def test_a_pair_gets_nothing_before_it_has_exchanged_blocks() -> None:
    scene = Split(warm=False).asks()
    assert asked(scene.connected())[1]["host"] == b"d:1"
    assert scene.results() == {"cold": 1}


def fails_to_connect(scene: Split) -> None:
    scene.connecting().not_connected("refused")


def breaks(scene: Split) -> None:
    scene.connected().breaks(stale=False)


def is_late(scene: Split) -> None:
    scene.connected()
    scene.later(21)


def is_refused(scene: Split) -> None:
    scene.connected().comes(answer({"error": {}}, b"400 Bad Request"))


def is_broken(scene: Split) -> None:
    scene.connected().comes(answer({"error": {}}, b"500 Internal Server Error"))


def has_no_blocks(scene: Split) -> None:
    scene.connected().comes(answer({"kv_transfer_params": None}))


def is_no_json(scene: Split) -> None:
    scene.connected().comes(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc")


def is_no_http(scene: Split) -> None:
    scene.connected().comes(b"odd\r\n\r\n")


def goes_on_for_ever(scene: Split) -> None:
    connection = scene.connected()
    connection.comes(b"HTTP/1.1 200 OK\r\ncontent-length: 9999999\r\n\r\n")
    for _ in range(5):
        connection.comes(b"x" * (1 << 20))
        if connection.asker is None:
            break


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (fails_to_connect, "not_sent"), (breaks, "broke"), (is_late, "late"), (is_refused, "refused"),
        (is_broken, "refused"), (has_no_blocks, "no_blocks"), (is_no_json, "no_blocks"), (is_no_http, "broke"),
        (goes_on_for_ever, "too_long"),
    ],
)  # fmt: skip
def test_whatever_fails_there_costs_no_request(fault: Any, why: str) -> None:
    scene = Split().asks()
    fault(scene)
    assert scene.load("http://p:1") == (0, 0)
    decode = scene.connected()
    assert asked(decode)[1]["host"] == b"d:1"
    assert asked(decode)[2] == json.loads(LONG), "the client's own body"
    decode.comes(ANSWER)
    assert scene.text.startswith(b"HTTP/1.1 200")
    assert scene.results() == {why: 1}
    scene.settled()


def test_a_worker_that_keeps_failing_is_asked_no_more() -> None:
    scene = Split()
    worker = scene.workers.at("http://p:1")
    assert worker is not None
    for _ in range(scene.settings.breaker.failures):
        worker.guard.ended(worker.guard.breaker.enter(), Outcome.FAILED)
    scene.asks()
    assert asked(scene.connected())[1]["host"] == b"d:1"
    assert scene.results() == {"no_worker": 1}


@pytest.mark.parametrize("when", ["connecting", "computing", "between", "answering"])
def test_a_client_that_leaves_ends_both(when: str) -> None:
    scene = Split().asks()
    if when != "connecting":
        prefill = scene.connected()
        if when != "computing":
            prefill.comes(PREFILLED)
            if when == "answering":
                scene.connected()
    scene.exchange.gone()
    scene.settled()
    assert all(connection.ended for connection in scene.pool.made)


def test_what_the_prompt_took_is_not_counted_as_the_answering_workers() -> None:
    scene = Split().asks()
    prefill = scene.connected()
    scene.now += 8
    prefill.comes(PREFILLED)
    decode = scene.connected()
    scene.now += 0.5
    decode.comes(ANSWER)
    worker = scene.workers.at("http://d:1")
    assert worker is not None
    assert worker.first_byte[0].value(scene.now) == pytest.approx(0.5)
    assert worker.guard.recent.quantile(0.5) < 1


def test_blocks_that_nobody_has_read_go_to_the_next_worker() -> None:
    scene = Split(workers=(*WORKERS, "m=http://e:1,role=decode")).asks()
    scene.connected().comes(PREFILLED)
    first = scene.connecting()
    first.not_connected("refused")
    decode = scene.connected()
    assert asked(decode)[2]["kv_transfer_params"] == BLOCKS
    decode.comes(ANSWER)
    assert scene.results() == {"remote": 1}
    scene.settled()


def test_blocks_that_may_have_been_read_are_computed_anew() -> None:
    retries = RetrySettings(most=2, budget_floor_per_s=100, retry_generation=True)
    scene = Split(workers=(*WORKERS, "m=http://e:1,role=decode"), retries=retries).asks()
    scene.connected().comes(PREFILLED)
    scene.connected().breaks(stale=False)
    again = scene.connected()
    assert asked(again)[1]["host"] == b"p:1"
    again.comes(answer({"kv_transfer_params": BLOCKS | {"remote_block_ids": [[7]]}}))
    decode = scene.connected()
    assert asked(decode)[2]["kv_transfer_params"]["remote_block_ids"] == [[7]]
    decode.comes(ANSWER)
    assert scene.results() == {"remote": 2}
    scene.settled()


def test_a_stale_connection_costs_the_blocks_that_were_named_over_it() -> None:
    """The worker has most likely seen nothing; but one that broke off just then has read them."""
    scene = Split()
    scene.pool.has_idle = True
    scene.asks()
    scene.pool.made[-1].breaks(stale=True)
    scene.connected().comes(PREFILLED)
    scene.pool.made[-1].breaks(stale=True)
    scene.pool.made[-1].comes(answer({"kv_transfer_params": BLOCKS | {"remote_block_ids": [[7]]}}))
    decode = scene.connected()
    assert asked(decode)[1]["host"] == b"d:1"
    assert asked(decode)[2]["kv_transfer_params"]["remote_block_ids"] == [[7]]
    decode.comes(ANSWER)
    assert scene.results() == {"remote": 2}
    scene.settled()


def test_blocks_are_taken_well_inside_their_lease() -> None:
    scene = Split(lease_s=4).asks()
    scene.connected().comes(PREFILLED)
    scene.now += 3.3  # until there is a connection
    late = scene.connected()
    assert late.ended, "nothing was sent there"
    assert not late.asked
    again = scene.connected()
    assert asked(again)[1]["host"] == b"p:1"
    again.comes(PREFILLED)
    scene.now += 3.3
    scene.connected()
    decode = scene.connected()
    assert asked(decode)[2] == json.loads(LONG), "twice is enough"
    decode.comes(ANSWER)
    assert scene.results() == {"remote": 2, "failed": 1}
    scene.settled()


def test_what_was_cached_is_what_the_other_one_had() -> None:
    usage = {"usage": {"prompt_tokens": 900, "prompt_tokens_details": {"cached_tokens": 128}}}
    scene = Split().asks()
    scene.connected().comes(answer({"kv_transfer_params": BLOCKS, **usage}))
    all_of_it = {"usage": {"prompt_tokens": 900, "prompt_tokens_details": {"cached_tokens": 899}}}
    scene.connected().comes(answer(all_of_it))
    assert json.loads(scene.text.partition(b"\r\n\r\n")[2]) == usage
    scene.settled()


def test_the_rank_that_a_client_names_is_that_of_both() -> None:
    scene = Split()
    scene.exchange._said.headers = [*scene.exchange._said.headers, (b"x-data-parallel-rank", b"1")]
    scene.asks()
    prefill = scene.connected()
    prefill.comes(PREFILLED)
    decode = scene.connected()
    assert [asked(one)[1]["x-data-parallel-rank"] for one in (prefill, decode)] == [b"1", b"1"]
    decode.comes(ANSWER)
    scene.settled()
