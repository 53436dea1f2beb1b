"""Where requests go, through a whole router: the default policy, others by name, and what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tests.fakes.vllm.client import Control
from tests.fakes.vllm.fixtures import allowed_violations, fake_vllm
from tests.support.routing import StartRouter, start_router

__all__ = ["allowed_violations", "fake_vllm", "start_router"]
Start = Callable[..., Control]


def asked(fakes: list[Control]) -> list[int]:
    return [len(fake.journal()) for fake in fakes]


def chat(router: Any, text: str, headers: dict[str, str] | None = None, **fields: Any) -> None:
    body = {"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": text}], **fields}
    assert router.request("POST", "/v1/chat/completions", body, headers).status == 200


def test_prompts_that_begin_alike_go_to_one_worker_in_every_router(fake_vllm: Start, start_router: StartRouter) -> None:
    fakes = [fake_vllm("tiny") for _ in range(3)]
    policy = json.dumps({"name": "prefix-affinity", "prefix_chars": 300})
    one, other = (start_router(*some, args=("--policy", policy)) for some in (fakes, fakes[::-1]))
    start = "tell me a long story about a router " * 10
    for number in range(4):
        chat(one, f"{start} {number}")
        chat(other, f"{start} {number} again", stream=True)
    assert sorted(asked(fakes)) == [0, 0, 8]
    for number in range(30):
        chat(one, f"{number} {start}")
    assert all(asked(fakes))


def test_a_prompt_stays_with_who_took_it_over_from_a_worker_that_was_down(
    fake_vllm: Start, start_router: StartRouter, wait_for: Any
) -> None:
    """A worker that comes back has most likely been started anew, and has nothing in its cache."""
    fakes = [fake_vllm("tiny", max_model_len=10_000) for _ in range(2)]
    router = start_router(*fakes, processes=2, slow_start_s=0)
    prompts = [f"{number}: " + "tell me a long story about a router " * 60 for number in range(6)]
    for prompt in prompts * 2:
        chat(router, prompt)
    had = asked(fakes)
    gone = had.index(max(had))
    fakes[gone].refuse()
    wait_for(lambda: router.up() == 1, what="one worker to be down")
    for prompt in prompts:
        chat(router, prompt)
    fakes[gone].accept()
    wait_for(lambda: router.up() == 2, what="it to be up again")
    for prompt in prompts * 4:  # each process has some of them
        chat(router, prompt)
    had[1 - gone] += 5 * len(prompts)
    assert asked(fakes) == had


def test_sessions_by_header_and_a_table_on_the_command_line(fake_vllm: Start, start_router: StartRouter) -> None:
    fakes = [fake_vllm("tiny") for _ in range(3)]
    policy = json.dumps({"name": "session-affinity", "header": "X-Agent"})
    router = start_router(*fakes, args=("--policy", policy))
    for number in range(6):
        chat(router, f"prompt {number}", {"X-AGENT": "seven"})
    assert sorted(asked(fakes)) == [0, 0, 6]


def test_workers_metrics_are_read_where_the_policy_wants_them(
    fake_vllm: Start, start_router: StartRouter, wait_for: Any
) -> None:
    fakes = [fake_vllm("tiny"), fake_vllm("tiny")]
    router = start_router(*fakes, args=("--policy", "queue-depth"), scrape_interval_s=0.1)
    for number in range(10):
        chat(router, f"prompt {number}")
    assert asked(fakes) == [5, 5]
    assert not [line for line in router.messages() if "metrics" in line.get("message", "")]


def test_a_lora_adapter_is_asked_for_by_its_name(fake_vllm: Start, start_router: StartRouter) -> None:
    one, two = fake_vllm("tiny"), fake_vllm("tiny")
    router = start_router(f"tiny={one.url},adapter=poems", f"tiny={two.url}", wait_up=False)
    assert [card["id"] for card in router.request("GET", "/v1/models").json()["data"]] == ["poems", "tiny"]
    body = {"model": "poems", "messages": []}
    router.request("POST", "/v1/chat/completions", body)  # the fake has no adapter and says so
    assert asked([one, two]) == [1, 0]
