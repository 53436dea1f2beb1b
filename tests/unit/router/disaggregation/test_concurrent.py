"""Requests that both workers have at once, through the relay: whose answer counts, what becomes of the other one."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest

from helios.config import HedgeSettings, HedgingSettings, RetrySettings
from router.relay.upstream import Connection
from tests.support.relaying import EVENT, EVENTS, LAST
from tests.support.splitting import LONG, PUSHED, WORKERS, Split, answer, asked, both, joins

CONNECTORS = ("nixl-push", "mooncake", "sglang")
ALONE = ("nixl-push", "mooncake")
"""Those whose decode workers can compute a prompt themselves."""
GENERATION = RetrySettings(most=2, budget_floor_per_s=100, retry_generation=True)
ANSWER = answer({"choices": [{"message": {"content": "hello"}, "finish_reason": "stop"}]})


def computed(connector: str, **more: Any) -> bytes:
    """What a prefill worker answers."""
    params = PUSHED if connector == "nixl-push" else None
    return answer({"choices": [{"finish_reason": "length"}], "kv_transfer_params": params, **more})


@pytest.mark.parametrize("connector", CONNECTORS)
def test_both_get_the_request_at_once_and_the_answer_is_held_until_the_prompt_is_computed(connector: str) -> None:
    scene = Split(connector=connector).asks()
    assert scene.load("http://d:1") == (1, 0), "it has nothing to compute"
    prefill, decode = both(scene)
    first, second = asked(prefill)[2], asked(decode)[2]
    assert first["stream"] is False
    assert {name: second[name] for name in json.loads(LONG)} == json.loads(LONG)
    decode.comes(ANSWER)
    assert scene.text == b""
    assert decode.paused, "what comes now stays in the connection"
    prefill.comes(computed(connector))
    assert scene.text.endswith(ANSWER.partition(b"\r\n\r\n")[2])
    assert (prefill.ended, decode.ended) == ("kept", "kept")
    assert scene.results() == {"remote": 1}
    scene.settled()


@pytest.mark.parametrize("connector", CONNECTORS)
def test_a_stream_that_is_held_goes_on_whole(connector: str) -> None:
    body = json.dumps(json.loads(LONG) | {"stream": True}).encode()
    scene = Split(connector=connector).asks(body)
    prefill, decode = both(scene)
    decode.comes(EVENTS + EVENT)
    decode.comes(EVENT)
    assert scene.text == b""
    prefill.comes(computed(connector))
    assert scene.text.count(EVENT) == 2
    assert not decode.paused
    decode.comes(EVENT + LAST)
    assert scene.text.count(EVENT) == 3
    assert scene.text.endswith(LAST)
    scene.settled()


@pytest.mark.parametrize("connector", CONNECTORS)
def test_an_answer_that_comes_after_is_not_held(connector: str) -> None:
    scene = Split(connector=connector).asks()
    prefill, decode = both(scene)
    prefill.comes(computed(connector))
    assert scene.text == b""
    assert not decode.paused
    decode.comes(EVENTS + EVENT)
    assert EVENT in scene.text
    decode.comes(LAST)
    scene.settled()


def fails_to_connect(scene: Split) -> None:
    one = next(one for one in scene.pool.connecting if getattr(one.asker, "_said", None) is not None)
    asker, one.asker = one.asker, None
    assert asker is not None
    asker.not_connected("refused")


def breaks(scene: Split) -> None:
    joins(scene, b"p:1").breaks(stale=False)


def is_late(scene: Split) -> None:
    joins(scene, b"p:1")
    scene.later(21)


def is_broken(scene: Split) -> None:
    joins(scene, b"p:1").comes(answer({"error": {}}, b"500 Internal Server Error"))


def is_refused(scene: Split) -> None:
    joins(scene, b"p:1").comes(answer({"error": {"message": "too long"}}, b"400 Bad Request"))


FAULTS = [
    (fails_to_connect, "not_sent"), (breaks, "broke"), (is_late, "late"), (is_broken, "refused"),
]  # fmt: skip


PLACES = [
    (when, fault, why)
    for when in ("connecting", "waiting", "answered", "answered_badly")
    for fault, why in [*FAULTS, (is_refused, "refused")]
    if (when, why) != ("answered_badly", "late")  # that error has waited long enough
]


@pytest.mark.parametrize("connector", ALONE)
@pytest.mark.parametrize(("when", "fault", "why"), PLACES)
def test_where_the_prompt_fails_the_other_answer_does_not_count(
    connector: str, when: str, fault: Any, why: str
) -> None:
    """Whatever the worker has answered by then; it is asked anew, and computes the prompt itself."""
    scene = Split(connector=connector).asks()
    decode = None if when == "connecting" else joins(scene, b"d:1")
    if decode is not None and when.startswith("answered"):
        decode.comes(ANSWER if when == "answered" else answer({"error": {}}, b"500 Internal Server Error"))
    fault(scene)
    assert scene.text == b""
    assert decode is None or decode.ended, "it waited for what never comes"
    assert scene.load("http://p:1") == (0, 0)
    again = joins(scene, b"d:1")
    assert asked(again)[2] == json.loads(LONG), "the client's own body"
    assert asked(again)[1]["x-request-id"] == b"id-1"
    again.comes(ANSWER)
    assert scene.text.startswith(b"HTTP/1.1 200")
    assert scene.results() == {why: 1}
    assert scene.guards[0].failed == 0, "it did nothing wrong"
    scene.settled()


@pytest.mark.parametrize("answered", [False, True])
@pytest.mark.parametrize(("fault", "why"), FAULTS)
def test_a_worker_that_can_compute_no_prompt_gets_it_from_the_next_one(answered: bool, fault: Any, why: str) -> None:
    scene = Split(connector="sglang").asks()
    decode = joins(scene, b"d:1")
    if answered:
        decode.comes(ANSWER)
    fault(scene)
    assert decode.ended == "aborted"
    assert scene.text == b""
    prefill, decode = both(scene)
    prefill.comes(computed("sglang"))
    decode.comes(ANSWER)
    assert scene.text.startswith(b"HTTP/1.1 200")
    assert scene.results() == {why: 1, "remote": 1}
    scene.settled()


def test_and_after_two_the_client_hears_that_nobody_computes_it() -> None:
    scene = Split(connector="sglang").asks()
    joins(scene, b"d:1")
    breaks(scene)
    joins(scene, b"d:1").comes(ANSWER)
    breaks(scene)
    assert scene.text.startswith(b"HTTP/1.1 503")
    assert b"no_prefill_worker" in scene.text
    assert scene.results() == {"broke": 2, "failed": 1}
    scene.settled()


def test_without_any_it_is_an_error_at_once_and_short_prompts_go_there_as_well() -> None:
    scene = Split(connector="sglang", workers=WORKERS[:1]).asks()
    assert scene.text.startswith(b"HTTP/1.1 503")
    scene.settled()
    short = json.dumps({"model": "m", "messages": [], "n": 2}).encode()
    scene = Split(connector="sglang").asks(short)
    prefill, decode = both(scene)
    assert asked(prefill)[2]["bootstrap_room"] == asked(decode)[2]["bootstrap_room"]
    prefill.comes(computed("sglang"))
    decode.comes(ANSWER)
    scene.settled()


def test_a_pair_that_is_not_warm_yet_is_better_than_none_where_nothing_else_answers() -> None:
    scene = Split(connector="sglang", warm=False).asks()
    prefill, decode = both(scene)
    prefill.comes(computed("sglang"))
    decode.comes(ANSWER)
    scene.settled()


def test_what_is_wrong_with_a_request_the_client_hears_from_the_worker_that_was_to_compute_its_prompt() -> None:
    scene = Split(connector="sglang").asks()
    joins(scene, b"d:1").comes(ANSWER)
    is_refused(scene)
    assert scene.text.startswith(b"HTTP/1.1 400")
    assert b"too long" in scene.text
    scene.settled()


def test_an_end_of_its_own_leaves_no_blocks_with_mooncake() -> None:
    """vLLM keeps them only where the limit ended the request, and tells nobody."""
    scene = Split(connector="mooncake").asks()
    prefill, decode = both(scene)
    prefill.comes(answer({"choices": [{"finish_reason": "stop"}]}))
    assert decode.ended == "aborted"
    again = joins(scene, b"d:1")
    assert asked(again)[2] == json.loads(LONG)
    again.comes(ANSWER)
    assert scene.results() == {"no_blocks": 1}
    scene.settled()


def test_a_worker_that_was_started_anew_is_met_anew() -> None:
    """The other one was told of an engine that is no more, so it would wait for ever."""
    scene = Split(connector="nixl-push").asks()
    prefill, decode = both(scene)
    prefill.comes(answer({"choices": [], "kv_transfer_params": PUSHED | {"remote_engine_id": "another"}}))
    assert decode.ended == "aborted"
    again = joins(scene, b"d:1")
    assert asked(again)[2] == json.loads(LONG)
    again.comes(ANSWER)
    assert scene.results() == {"moved": 1}
    assert scene.relay.splits is not None
    assert [one.url for one, _, _ in scene.relay.splits.pairs.due(scene.workers)] == ["http://p:1"], "to be warmed"
    scene.settled()


@pytest.mark.parametrize("connector", CONNECTORS)
@pytest.mark.parametrize("when", ["connecting", "computing", "answered", "between", "answering"])
def test_a_client_that_leaves_ends_both(connector: str, when: str) -> None:
    scene = Split(connector=connector).asks()
    if when != "connecting":
        prefill, decode = both(scene)
        if when == "answered":
            decode.comes(ANSWER)
            assert not any(leg.whole for leg in scene.relay.dispatches), "nobody has it"
        if when in ("between", "answering"):
            prefill.comes(computed(connector))
        if when == "answering":
            decode.comes(EVENTS + EVENT)
    scene.exchange.gone()
    scene.settled()
    assert all(connection.ended for connection in scene.pool.made)


@pytest.mark.parametrize("connector", CONNECTORS)
@pytest.mark.parametrize("when", ["not_connected", "broke", "broke_half", "failed"])
def test_a_worker_that_can_not_answer_is_replaced_and_both_begin_anew(connector: str, when: str) -> None:
    """The next one gets blocks of its own: the first one may have registered for those that were on their way."""
    scene = Split(connector=connector, workers=(*WORKERS, "m=http://e:1,role=decode"), retries=GENERATION).asks()
    first = joins(scene, b"p:1")
    if when == "not_connected":
        asker, scene.pool.connecting[-1].asker = scene.pool.connecting[-1].asker, None
        assert asker is not None
        asker.not_connected("refused")
    else:
        decode = joins(scene, b"d:1")
        if when == "broke":
            decode.breaks(stale=False)
        elif when == "broke_half":
            decode.comes(EVENTS + EVENT)
            decode.breaks(stale=False)
        else:
            first.comes(computed(connector))
            decode.comes(answer({"error": {}}, b"503 Service Unavailable"))
    assert first.ended == ("kept" if when == "failed" else "aborted")
    prefill, other = joins(scene, b"p:1"), joins(scene, b"e:1")
    prefill.comes(computed(connector))
    other.comes(ANSWER)
    assert scene.text.startswith(b"HTTP/1.1 200")
    assert scene.results() == {"remote": 2 if when == "failed" else 1}
    scene.settled()


@pytest.mark.parametrize("connector", CONNECTORS)
def test_a_worker_that_refuses_is_not_waited_for_by_who_waits_for_it(connector: str) -> None:
    """SGLang's prefill worker begins when the decode worker is there; one that said no never is."""
    scene = Split(connector=connector, workers=(*WORKERS, "m=http://e:1,role=decode"), retries=GENERATION).asks()
    first, decode = both(scene)
    decode.comes(answer({"error": {}}, b"503 Service Unavailable"))
    scene.later(0.5)
    assert not first.ended, "its own error would count"
    scene.later(0.6)
    assert first.ended == "aborted"
    prefill, other = joins(scene, b"p:1"), joins(scene, b"e:1")
    prefill.comes(computed(connector))
    other.comes(ANSWER)
    assert scene.text.startswith(b"HTTP/1.1 200")
    assert scene.results() == {"remote": 1}
    scene.settled()


def test_workers_that_can_not_be_reached_do_not_count_against_the_ones_that_compute() -> None:
    others = tuple(f"m=http://e{number}:1,role=decode" for number in range(4))
    scene = Split(connector="sglang", workers=(*WORKERS, *others)).asks()
    for _ in range(4):
        joins(scene, b"p:1")
        asker, scene.pool.connecting[-1].asker = scene.pool.connecting[-1].asker, None
        assert asker is not None
        asker.not_connected("refused")
    prefill = joins(scene, b"p:1")
    decode = scene.connected()
    prefill.comes(computed("sglang"))
    decode.comes(ANSWER)
    assert scene.text.startswith(b"HTTP/1.1 200")
    scene.settled()


@pytest.mark.parametrize("computes", ["yet", "no more"])
def test_after_a_stale_connection_both_begin_anew(computes: str) -> None:
    """The worker may have met the other one before it broke off: with the same mark it would wait for ever."""
    numbers = iter(range(10, 1000))
    scene = Split(connector="mooncake", bits=lambda _: next(numbers))
    scene.pool.has_idle = True
    scene.asks()
    prefill, decode = scene.pool.made
    first = asked(decode)[2]["kv_transfer_params"]
    if computes == "no more":
        prefill.comes(computed("mooncake"))
    scene.pool.has_idle = False
    decode.breaks(stale=True)
    assert prefill.ended
    other, again = both(scene)
    second = asked(again)[2]["kv_transfer_params"]
    assert second["transfer_id"] == asked(other)[2]["kv_transfer_params"]["transfer_id"] != first["transfer_id"]
    other.comes(computed("mooncake"))
    again.comes(ANSWER)
    assert scene.results() == {"remote": 1 if computes == "yet" else 2}
    scene.settled()


@pytest.mark.parametrize("connector", CONNECTORS)
def test_when_neither_says_anything_there_is_an_end(connector: str) -> None:
    scene = Split(connector=connector).asks()
    both(scene)
    for _ in range(12):
        if scene.exchange.response_complete:
            break
        scene.later(21)
        for one in list(scene.pool.connecting):
            if one.asker is not None:
                asker, one.asker = one.asker, None
                asker.connected(cast(Connection, scene.pool.connection(reused=False)))
    assert scene.text.startswith(b"HTTP/1.1 504" if connector in ALONE else b"HTTP/1.1 503")
    scene.settled()


def test_each_attempt_has_a_mark_of_its_own_and_the_same_at_both_workers() -> None:
    numbers = iter(range(10, 1000))
    marks = set()
    for connector in CONNECTORS:
        scene = Split(connector=connector, bits=lambda _: next(numbers)).asks()
        for _ in range(2):
            prefill, decode = both(scene)
            bodies = asked(prefill)[2], asked(decode)[2]
            names = [asked(one)[1]["x-request-id"] for one in (prefill, decode)]
            assert names[0] == names[1]
            found = [body.get("bootstrap_room") or body["kv_transfer_params"]["transfer_id"] for body in bodies]
            assert found[0] == found[1]
            marks.add(str(found[0]))
            if connector == "nixl-push":
                assert names[0].startswith(b"id-1-")
                assert bodies[1]["kv_transfer_params"]["remote_request_id"] == names[0].decode()
            if connector != "sglang":
                break
            prefill.breaks(stale=False)
    assert len(marks) == 4


def test_what_was_cached_is_what_the_other_one_had() -> None:
    usage = {"usage": {"prompt_tokens": 900, "prompt_tokens_details": {"cached_tokens": 128}}}
    all_of_it = {"usage": {"prompt_tokens": 900, "prompt_tokens_details": {"cached_tokens": 899}}}
    scene = Split(connector="mooncake").asks()
    prefill, decode = both(scene)
    decode.comes(answer(all_of_it))
    prefill.comes(computed("mooncake", **usage))
    assert json.loads(scene.text.partition(b"\r\n\r\n")[2]) == usage
    scene.settled()


def test_the_rank_that_has_the_engine_computes_the_prompt_whatever_the_client_says() -> None:
    scene = Split(connector="mooncake")
    scene.exchange._said.headers = [*scene.exchange._said.headers, (b"x-data-parallel-rank", b"5")]
    worker = scene.workers.at("http://p:1")
    assert worker is not None
    assert scene.relay.splits is not None
    engines = {str(rank): {"engine_id": f"e-{rank}", "worker_addr": {}} for rank in range(3)}
    assert scene.relay.splits.peers.queried(worker, json.dumps(engines).encode())
    scene.asks()
    prefill, decode = both(scene)
    rank = asked(prefill)[1]["x-data-parallel-rank"]
    assert asked(prefill)[0].startswith(b"POST")
    assert prefill.asked.lower().count(b"x-data-parallel-rank") == 1
    assert asked(decode)[2]["kv_transfer_params"]["remote_engine_id"] == f"e-{rank.decode()}"
    prefill.comes(computed("mooncake"))
    decode.comes(ANSWER)
    scene.settled()


@pytest.mark.parametrize("wins", ["first", "second"])
def test_a_hedged_request_s_second_attempt_computes_the_prompt_itself(wins: str) -> None:
    hedging = HedgingSettings(models={"m": HedgeSettings(after_s=0.5)}, budget_floor_per_s=1)
    scene = Split(
        connector="mooncake", workers=(*WORKERS, "m=http://e:1,role=decode"), hedging=hedging, retries=GENERATION
    ).asks()
    prefill, decode = both(scene)
    scene.later(0.6)
    second = joins(scene, b"e:1")
    assert asked(second)[2] == json.loads(LONG)
    if wins == "second":
        second.comes(ANSWER)
        assert (prefill.ended, decode.ended) == ("aborted", "aborted")
    else:
        decode.comes(ANSWER)
        assert scene.text == b""
        prefill.comes(computed("mooncake"))
        assert second.ended == "aborted"
    assert scene.text.startswith(b"HTTP/1.1 200")
    scene.settled()


def test_what_the_prompt_took_is_not_counted_as_the_answering_workers() -> None:
    scene = Split(connector="mooncake").asks()
    prefill, decode = both(scene)
    scene.now += 8
    prefill.comes(computed("mooncake"))
    scene.now += 0.5
    decode.comes(ANSWER)
    worker = scene.workers.at("http://d:1")
    assert worker is not None
    assert worker.first_byte[0].value(scene.now) == pytest.approx(0.5)


def test_a_route_without_the_fields_goes_to_its_worker_as_it_came() -> None:
    scene = Split(connector="sglang", path=b"/v1/embeddings")
    scene.asks(json.dumps({"model": "m", "input": "x" * 4000}).encode())
    decode = joins(scene, b"d:1")
    assert "bootstrap_room" not in asked(decode)[2]
    decode.comes(ANSWER)
    assert scene.results() == {"route": 1}
    scene.settled()
