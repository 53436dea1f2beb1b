"""Requests go to the worker that has their prompt, by its KV events; and they go on whatever becomes of those."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest

from helios.http.client import HttpClient
from tests.fakes.vllm.client import Control
from tests.fakes.vllm.fixtures import allowed_violations, fake_vllm
from tests.fakes.vllm.requests import Message, rendered
from tests.fakes.vllm.settings import Settings
from tests.support.routing import RouterProcess, StartRouter, start_router

__all__ = ["allowed_violations", "fake_vllm", "start_router"]
Start = Callable[..., Control]
CHAT = "/v1/chat/completions"
PATIENT = json.dumps({"wait_s": 5.0})
"""How long a request waits for the index where a test is about what that says."""


def followed(*fakes: Control) -> list[str]:
    """The fakes as ``--worker`` says it."""
    return [f"{f.model}={f.url},kv_events={f.kv_events},kv_replay={f.kv_replay}" for f in fakes]


def start(start_router: StartRouter, *workers: str, **settings: Any) -> RouterProcess:
    settings = {"kv_events": PATIENT, **settings}
    return start_router(*workers, args=("--policy", "prefix-index"), **settings)


def body(text: str) -> dict[str, Any]:
    return {"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": text}]}


def as_responses(text: str) -> dict[str, Any]:
    return {"model": "tiny", "max_output_tokens": 1, "input": [{"role": "user", "content": text}]}


def prompt(number: int) -> str:
    return f"prompt {number}: " + "tell me a long story about a router, " * 6


def put(fake: Control, text: str) -> None:
    """Have the worker compute a prompt, past the router."""
    client = HttpClient(fake.url, timeout_s=10)
    try:
        client.json("POST", CHAT, body=body(text))
    finally:
        client.close()


def takes(
    fakes: list[Control], router: RouterProcess, text: str, count: int = 3, path: str = CHAT, made: Any = body
) -> list[int]:
    """How many of so many requests for a prompt each worker gets. Each comes on a connection of its own."""
    before = [len(fake.journal(path)) for fake in fakes]
    assert [router.request("POST", path, made(text)).status for _ in range(count)] == [200] * count
    return [len(fake.journal(path)) - had for fake, had in zip(fakes, before, strict=True)]


def stored(router: RouterProcess) -> int:
    """Events of stored blocks that are in the index. A prompt that a worker hasn't had is one."""
    return int(router.metric("helios_router_kv_events_total", type="stored"))


def index_of(router: RouterProcess, home: Any) -> Any:
    """What the administration says of the index."""
    client = HttpClient(f"unix:{home.run / f'router-{router.address[1]}.sock'}")
    try:
        return client.json("GET", "/state")["index"]
    finally:
        client.close()


def publishers(router: RouterProcess, home: Any, of: Control | None = None, **state: Any) -> list[Any]:
    """The publishers in it, of one worker, in this state."""
    return [
        one
        for one in index_of(router, home)["publishers"]
        if (of is None or one["worker"] == of.url) and all(one[name] == value for name, value in state.items())
    ]


def blocks(text: str) -> int:
    """Blocks of the prompt that ``body`` makes."""
    return len(rendered([Message(role="user", content=text)])) // Settings("tiny").block_tokens


@pytest.fixture
def pair(fake_vllm: Start) -> list[Control]:
    return [fake_vllm("tiny", kv_events=True), fake_vllm("tiny", kv_events=True)]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_prompt_goes_to_the_worker_that_has_it(
    start_router: StartRouter, helios_home: Any, pair: list[Control], wait_for: Any, processes: int
) -> None:
    put(pair[0], prompt(0))  # before the router is there
    router = start(start_router, *followed(*pair), processes=processes)
    wait_for(lambda: router.metric("helios_router_kv_feeds_in_step") == 2, what="both workers to be followed")
    for number in range(1, 5):
        put(pair[number % 2], prompt(number))
    wait_for(lambda: stored(router) == 5, what="the events to be in the index")
    for number in range(5):
        assert takes(pair, router, prompt(number)) == ([0, 3] if number % 2 else [3, 0])
    assert router.metric("helios_router_kv_lookups_total", result="known") >= 15
    shown = index_of(router, helios_home)
    assert [(one["connected"], one["followed"], one["gaps"]) for one in shown["publishers"]] == [(True, True, 0)] * 2
    assert {one["worker"] for one in shown["publishers"]} == {one.url for one in pair}


def test_one_prompt_is_one_whichever_api_it_comes_by(
    start_router: StartRouter, pair: list[Control], wait_for: Any
) -> None:
    router = start(start_router, *followed(*pair))
    wait_for(lambda: router.metric("helios_router_kv_feeds_in_step") == 2, what="both workers to be followed")
    for number in range(4):
        put(pair[number % 2], prompt(number))  # as a chat
    wait_for(lambda: stored(router) == 4, what="the events to be in the index")
    for number in range(4):
        expected = [0, 3] if number % 2 else [3, 0]
        assert takes(pair, router, prompt(number), path="/v1/responses", made=as_responses) == expected
        assert takes(pair, router, prompt(number), path="/v1/messages") == expected
    known = router.metric("helios_router_kv_lookups_total", result="known")
    kept = {**as_responses(prompt(0)), "previous_response_id": "resp_1"}  # what it stands for, only a worker knows
    assert router.request("POST", "/v1/responses", kept).status == 200
    assert router.metric("helios_router_kv_lookups_total", result="known") == known == 24


def test_requests_flow_and_the_index_heals_whatever_becomes_of_a_publisher(
    start_router: StartRouter, helios_home: Any, pair: list[Control], wait_for: Any
) -> None:
    router = start(start_router, *followed(*pair), processes=2)
    wait_for(lambda: router.metric("helios_router_kv_feeds_in_step") == 2, what="both workers to be followed")

    pair[0].events(lose=1)  # a gap
    put(pair[0], prompt(0))
    put(pair[0], prompt(1))
    wait_for(lambda: stored(router) == 2, what="what was lost to come again")
    assert router.metric("helios_router_kv_gaps_total") == 1
    assert takes(pair, router, prompt(0)) == takes(pair, router, prompt(1)) == [3, 0]

    pair[0].events(away=True)  # nobody is there
    wait_for(lambda: router.metric("helios_router_kv_feeds_in_step") == 1, what="its absence to be noticed")
    assert sum(takes(pair, router, prompt(2))) == 3

    pair[0].events(away=False)  # another process, with nothing in its cache
    put(pair[0], prompt(3))
    wait_for(lambda: router.metric("helios_router_kv_feeds_in_step") == 2, what="the new one to be followed")
    wait_for(lambda: [one["blocks"] for one in publishers(router, helios_home, pair[0])] == [blocks(prompt(3))])
    assert takes(pair, router, prompt(3)) == [3, 0]

    (control,) = router.pids("control")  # the owner of the index
    os.kill(control, signal.SIGKILL)
    assert sum(takes(pair, router, prompt(4))) == 3
    wait_for(lambda: router.pids("control") not in ([], [control]), what="another owner")
    numbers = count(5)

    def learns() -> bool:
        """Whether new prompts of the second worker go there: asking once more would show nothing, since who got one
        by mistake has it, too."""
        wait_for(lambda: len(publishers(router, helios_home, followed=True)) == 2, what="both to be followed")
        (before,) = publishers(router, helios_home, pair[1])
        texts = [prompt(number) for number in islice(numbers, 4)]
        for text in texts:
            put(pair[1], text)
        held = before["blocks"] + sum(map(blocks, texts))
        wait_for(lambda: publishers(router, helios_home, pair[1])[0]["blocks"] >= held, what="them to be known")
        return [takes(pair, router, text, 1) for text in texts] == [[0, 1]] * 4

    wait_for(learns, what="its index to be asked")

    old = {*router.pids(), *router.pids("control")}  # all of them
    router.process.send_signal(signal.SIGHUP)
    wait_for(lambda: not old & {*router.pids(), *router.pids("control")}, what="all processes to be new")
    wait_for(learns, what="the new owner to be asked by the new")


def test_no_request_waits_for_who_does_not_tokenize(start_router: StartRouter, pair: list[Control]) -> None:
    never = f"{pair[1].model}={pair[1].url},kv_events=9"  # where nobody publishes
    router = start(start_router, *followed(pair[0]), never, kv_events=json.dumps({"wait_s": 0.02}))
    for fake in pair:
        fake.fault("slow", path="/tokenize", times=None, delay_s=1.5)
    assert [router.request("POST", CHAT, body(prompt(n))).status for n in range(20)] == [200] * 20
    assert router.metric("helios_router_kv_lookups_total", result="known") == 0
    ids = {"model": "tiny", "prompt": list(range(10, 110)), "max_tokens": 1}
    assert router.request("POST", "/v1/completions", ids).status == 200


def test_workers_are_followed_as_they_come_and_go(
    start_router: StartRouter, helios_home: Any, pair: list[Control], wait_for: Any, tmp_path: Path
) -> None:
    file = tmp_path / "workers.toml"
    entries = [
        f'[[workers]]\nmodel = "tiny"\nurl = "{f.url}"\nkv_events = "{f.kv_events}"\nkv_replay = "{f.kv_replay}"\n'
        for f in pair
    ]
    file.write_text(entries[0])
    discovery = json.dumps({"file": str(file), "file_poll_s": 0.05})
    router = start(start_router, wait_up=False, discovery=discovery)
    put(pair[1], prompt(0))
    wait_for(lambda: [one["worker"] for one in publishers(router, helios_home)] == [pair[0].url])
    file.write_text("".join(entries))
    wait_for(lambda: router.up() == 2 and stored(router) == 1, what="the second to be followed")
    assert takes(pair, router, prompt(0)) == [0, 3]
    file.write_text(entries[0])
    wait_for(lambda: [one["worker"] for one in publishers(router, helios_home)] == [pair[0].url])
    wait_for(lambda: router.metric("helios_router_kv_blocks") == 0, what="what it had to be forgotten")
    assert takes(pair, router, prompt(0)) == [3, 0]
