"""What answers call the model, for real clients of a router with an alias: the worker's name, or the one asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anthropic
import openai
import pytest

from tests.fakes.vllm.client import Control
from tests.fakes.vllm.fixtures import allowed_violations, fake_vllm
from tests.support.routing import CHAT, StartRouter, start_router

__all__ = ["allowed_violations", "fake_vllm", "start_router"]

MESSAGES: Any = [{"role": "user", "content": "hello there"}]


def names(url: str) -> list[set[str]]:
    """The model's names in all kinds of answers to a client that asks for ``fast``."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        chat: Any = {"model": "fast", "messages": MESSAGES, "max_tokens": 4}
        found = [
            {client.chat.completions.create(**chat).model},
            {chunk.model for chunk in client.chat.completions.create(**chat, stream=True)},
            {chunk.model for chunk in client.completions.create(model="fast", prompt="a", max_tokens=4, stream=True)},
            {client.embeddings.create(model="fast", input="a").model},
        ]
        events = list(client.responses.create(model="fast", input="a", max_output_tokens=4, stream=True))
        found.append({event.response.model for event in events if hasattr(event, "response")})
        assert {event.type for event in events} >= {"response.created", "response.completed"}
    with anthropic.Anthropic(base_url=url, api_key="any", max_retries=0) as client:
        message = {"model": "fast", "max_tokens": 4, "messages": MESSAGES}
        found.append({client.messages.create(**message).model})
        with client.messages.stream(**message) as stream:
            found.append({stream.get_final_message().model})
    return found


@pytest.mark.parametrize("mode", ["served", "asked"])
def test_what_answers_call_the_model(fake_vllm: Callable[..., Control], start_router: StartRouter, mode: str) -> None:
    worker = fake_vllm("org/tiny")
    router = start_router(worker, aliases='{"fast": "org/tiny"}', answer_model=mode)
    name = {"served": "org/tiny", "asked": "fast"}[mode]
    assert names(router.url) == [{name}] * 7
    body = {"model": "fast", "max_tokens": 4, **CHAT}
    answer = router.request("POST", "/v1/chat/completions", body, {"accept-encoding": "gzip"})
    assert int(answer.header("content-length") or 0) == len(answer.body)
    compressed = dict(worker.journal("/v1/chat/completions")[-1]["headers"]).get("accept-encoding")
    assert compressed == {"served": "gzip", "asked": None}[mode]
    wrong = router.request("POST", "/v1/chat/completions", {**body, "max_tokens": -1})
    assert wrong.status == 400
    assert router.request("POST", "/tokenize", {"model": "fast", "prompt": "a b"}).json()["count"] == 3
    with openai.OpenAI(base_url=f"{router.url}/v1", api_key="any", max_retries=0) as client:
        assert client.audio.transcriptions.create(model="org/tiny", file=("a.wav", b"RIFF")).text
        with pytest.raises(openai.BadRequestError) as form:  # it goes on as it came, where an alias means nothing
            client.audio.transcriptions.create(model="fast", file=("a.wav", b"RIFF"))
    assert (form.value.code, form.value.param) == ("alias_not_supported", "model")
    assert len(worker.journal("/v1/audio/transcriptions")) == 1
