"""A real router between fakes of which some compute prompts and others answer: what tests of it share."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest

from router.disaggregation.warming import PROMPT
from tests.fakes.vllm.client import Control
from tests.support.routing import RouterProcess, StartRouter

Start = Callable[..., Control]
TEXT = "word " * 80
"""400 tokens of a fake, whose tokens are bytes."""
WARMED = len(PROMPT)
"""Tokens with which a pair was warmed."""
NUMBERS = itertools.count()


def says() -> dict[str, str]:
    """A message that nobody has seen before: of another one the decode worker would have the blocks itself."""
    return {"role": "user", "content": f"{next(NUMBERS)} {TEXT}"}


REQUESTS: dict[str, Callable[[], dict[str, Any]]] = {
    "/v1/chat/completions": lambda: {"messages": [says()], "max_tokens": 6, "min_tokens": 3},
    "/v1/completions": lambda: {"prompt": says()["content"], "max_tokens": 6},
    "/v1/responses": lambda: {"input": says()["content"], "max_output_tokens": 6},
    "/v1/messages": lambda: {"messages": [says()], "max_tokens": 6},
    "/inference/v1/generate": lambda: {
        "token_ids": [next(NUMBERS), *range(400)], "sampling_params": {"max_tokens": 6, "min_tokens": 2},
    },
}  # fmt: skip
DEFAULTS = {"disaggregation": json.dumps({"min_tokens": 64, "timeout_s": 3})}


Warm = Callable[..., RouterProcess]


@pytest.fixture
def start(start_router: StartRouter, wait_for: Any) -> Warm:
    """``start(pairs, worker, …)`` starts a router and waits until so many pairs are warm."""

    def begin(pairs: int, *workers: tuple[Control, str], **settings: Any) -> RouterProcess:
        texts = [worker(fake, *about.split()) for fake, about in workers]
        router = start_router(*texts, **({} if "disaggregation" in settings else DEFAULTS), **settings)
        wait_for(lambda: router.metric("helios_router_warm_pairs") == pairs, 20, what="pairs to be warm")
        for fake, _ in workers:
            fake.forget()
        return router

    return begin


def worker(fake: Control, role: str, revision: str = "") -> str:
    """As the command line names it; the fake's control port is what others meet it at."""
    met = f",bootstrap={fake.control.partition('://')[2]}" if role == "prefill" else ""
    return f"tiny={fake.url},role={role}{met}" + (f",revision={revision}" if revision else "")


def said(path: str, answer: Any) -> Any:
    """What an answer says, without what differs from request to request."""
    match path:
        case "/v1/responses":
            return answer["output"][0]["content"], answer["usage"]
        case "/v1/messages":
            return answer["content"], answer["usage"]
        case "/inference/v1/generate":
            return answer["choices"]
        case _:
            return answer["choices"], answer["usage"]


def texts(answer: Any) -> list[str]:
    """A stream's events, without ids and times."""
    keep = []
    for line in answer.read().decode().splitlines():
        if line.startswith("data: {"):
            event = json.loads(line[6:])
            for name in ("id", "created", "response", "message", "item_id", "item", "sequence_number"):
                event.pop(name, None)
            keep.append(json.dumps(event, sort_keys=True))
    return keep


def by_source(decode: Control) -> tuple[float, float]:
    """Tokens of prompts that came from elsewhere, and that were computed here."""
    name = "vllm:prompt_tokens_by_source_total"
    return decode.metric(name, source="external_kv_transfer"), decode.metric(name, source="local_compute")
