"""The clients people use, through a real router: OpenAI's and Anthropic's, whole and streamed answers, every route."""

from __future__ import annotations

import asyncio
import hashlib
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import openai
import pytest

from tests.fakes.vllm.client import Control
from tests.fakes.vllm.fixtures import allowed_violations, fake_vllm
from tests.support.routing import RouterProcess, StartRouter, address_of, start_router, stream

__all__ = ["allowed_violations", "fake_vllm", "start_router"]
Start = Callable[..., Control]
MESSAGES: Any = [{"role": "user", "content": "hello"}]
MORE: Any = {"ignore_eos": True}


@pytest.fixture
def fake(fake_vllm: Start) -> Control:
    return fake_vllm("org/tiny", created=1)


@pytest.fixture
def router(fake: Control, start_router: StartRouter) -> RouterProcess:
    return start_router(fake)


@pytest.fixture
def client(router: RouterProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{router.url}/v1", api_key="key", max_retries=0) as client:
        yield client


@pytest.fixture
def direct(fake: Control) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{fake.url}/v1", api_key="key", max_retries=0) as client:
        yield client


def test_openai_client_gets_through_the_router_what_it_gets_from_the_worker(
    client: openai.OpenAI, direct: openai.OpenAI, router: RouterProcess
) -> None:
    headers = {"x-request-id": "same"}

    def answers(c: openai.OpenAI) -> list[Any]:
        chat = c.chat.completions.create(model="org/tiny", messages=MESSAGES, max_tokens=9, extra_headers=headers)
        options: Any = {"include_usage": True}
        streamed = c.chat.completions.create(
            model="org/tiny", messages=MESSAGES, stream=True, stream_options=options, extra_headers=headers,
            extra_body=MORE, max_tokens=9,
        )  # fmt: skip
        text = c.completions.create(model="org/tiny", prompt="a", max_tokens=9, stream=True, extra_headers=headers)
        response = c.responses.create(model="org/tiny", input="hi", max_output_tokens=5, extra_headers=headers)
        events = c.responses.create(
            model="org/tiny", input="hi", max_output_tokens=5, stream=True, extra_headers=headers
        )  # fmt: skip
        embedded = c.embeddings.create(model="org/tiny", input=["a", "b"], extra_headers=headers)
        whole = [chat, response, embedded]
        pieces = [*streamed, *text, *events]
        return [item.model_dump() for item in (*whole, *pieces)]

    through, straight = answers(client), answers(direct)
    assert through == straight
    assert len(through) > 30
    assert router.in_flight() == 0


def test_models_are_listed_and_found_by_name(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["org/tiny"]
    assert client.models.retrieve("org/tiny").id == "org/tiny"  # the client sends org%2Ftiny
    with pytest.raises(openai.NotFoundError, match="org/other"):
        client.models.retrieve("org/other")


def test_audio_upload_arrives_whole(client: openai.OpenAI, fake: Control) -> None:
    sound = bytes(range(256)) * 16384  # 4 MiB: more than the router keeps in memory
    answer = client.audio.transcriptions.create(model="org/tiny", file=("a.wav", io.BytesIO(sound)))
    digest = hashlib.sha256(sound).hexdigest()
    assert answer.text == f"heard {digest[:16]}"
    assert fake.journal()[-1]["files"] == {"file": digest}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        translated = client.audio.translations.create(model="org/tiny", file=("a.wav", io.BytesIO(b"RIFF")))
    assert translated.text == f"heard {hashlib.sha256(b'RIFF').hexdigest()[:16]}"


@pytest.mark.parametrize(
    ("change", "error", "part"),
    [
        ({"model": "nope"}, openai.NotFoundError, "Available models: org/tiny"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens must be at least 1"),
        (
            {"extra_body": {"kv_transfer_params": {"do_remote_prefill": True}}},
            openai.BadRequestError,
            "clients must not",
        ),
    ],
)
def test_errors_are_openai_exceptions(client: openai.OpenAI, change: Any, error: Any, part: str) -> None:
    with pytest.raises(error, match=part):
        client.chat.completions.create(**{"model": "org/tiny", "messages": MESSAGES, **change})


def test_unavailable_and_timeouts_are_openai_exceptions(fake: Control, start_router: StartRouter) -> None:
    router = start_router(fake, first_byte_timeout_s=0.3)
    with openai.OpenAI(base_url=f"{router.url}/v1", api_key="key", max_retries=0) as client:
        fake.fault("stall")
        with pytest.raises(openai.InternalServerError, match="gave no first byte") as timeout:
            client.chat.completions.create(model="org/tiny", messages=MESSAGES)
        assert timeout.value.status_code == 504
        fake.refuse()
        with pytest.raises(openai.InternalServerError, match="connection refused") as down:
            client.chat.completions.create(model="org/tiny", messages=MESSAGES)
        assert (down.value.status_code, down.value.code) == (503, "no_healthy_worker")
        assert down.value.response.headers["retry-after"] == "1"
        fake.accept()


SAME = {"x-request-id": "same"}


def three_events(fake: Control, path: str, body: Any) -> int:
    """The length of a stream's first three events."""
    sock, answer = stream(address_of(fake.url), path, body, SAME)
    with sock, answer:
        return sum(len(event) + 2 for event in answer.read().split(b"\n\n")[:3])


@pytest.mark.parametrize(("more", "expected"), [(0, "The worker broke off"), (10, "Connection error")])
def test_a_stream_that_breaks_off_raises_in_the_openai_client(
    client: openai.OpenAI, fake: Control, more: int, expected: str
) -> None:
    body: Any = {"model": "org/tiny", "messages": MESSAGES, "max_tokens": 50, "stream": True}
    fake.fault("reset", after_bytes=three_events(fake, "/v1/chat/completions", {**body, **MORE}) + more)
    chunks: Any = client.chat.completions.create(**body, extra_body=MORE, extra_headers=SAME)
    assert [next(chunks) is not None for _ in range(3)] == [True] * 3
    with pytest.raises(openai.APIError, match=expected):
        next(chunks)


@pytest.mark.parametrize("more", [0, 10])
def test_a_stream_of_responses_that_breaks_off_raises_in_the_openai_client(
    client: openai.OpenAI, fake: Control, more: int
) -> None:
    body: Any = {"model": "org/tiny", "input": "hi", "stream": True}
    fake.fault("close", after_bytes=three_events(fake, "/v1/responses", body) + more)
    events: Any = client.responses.create(**body, extra_headers=SAME)
    assert [next(events) is not None for _ in range(3)] == [True] * 3
    with pytest.raises(openai.APIError, match="broke off" if more == 0 else "Connection error"):
        next(events)


def test_a_stream_that_breaks_off_raises_in_the_anthropic_client(router: RouterProcess, fake: Control) -> None:
    body: Any = {"model": "org/tiny", "messages": MESSAGES, "max_tokens": 50, "stream": True}
    fake.fault("reset", after_bytes=three_events(fake, "/v1/messages", {**body, **MORE}))
    with anthropic.Anthropic(base_url=router.url, api_key="key", max_retries=0) as client:
        events: Any = client.messages.create(**body, extra_body=MORE, extra_headers=SAME)
        assert [next(events) is not None for _ in range(3)] == [True] * 3
        with pytest.raises(anthropic.APIStatusError, match="broke off"):
            next(events)


def test_the_openai_clients_own_retries_reach_the_router_that_recovered(
    fake: Control, start_router: StartRouter
) -> None:
    router = start_router(fake)
    fake.fault("status", status=503, times=1)
    with openai.OpenAI(base_url=f"{router.url}/v1", api_key="key", max_retries=2) as client:
        assert client.chat.completions.create(model="org/tiny", messages=MESSAGES).choices


def test_many_async_clients_at_once(router: RouterProcess) -> None:
    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{router.url}/v1", api_key="key", max_retries=0) as client:

            async def one(number: int) -> str:
                got = []
                async for chunk in await client.chat.completions.create(
                    model="org/tiny",
                    messages=[{"role": "user", "content": str(number)}],
                    stream=True,
                    max_tokens=8,
                    extra_body=MORE,
                ):
                    got.append(chunk.choices[0].delta.content or "")
                return "".join(got)

            return await asyncio.gather(*(one(number % 10) for number in range(40)))

    texts = asyncio.run(all_of_them())
    assert [texts[i] for i in range(10)] == [texts[i + 30] for i in range(10)]
    assert len(set(texts)) == 10


def test_anthropic_client(router: RouterProcess) -> None:
    with anthropic.Anthropic(base_url=router.url, api_key="key", max_retries=0) as client:
        whole = client.messages.create(model="org/tiny", messages=MESSAGES, max_tokens=5, extra_body=MORE)
        with client.messages.stream(model="org/tiny", messages=MESSAGES, max_tokens=5, extra_body=MORE) as stream:
            streamed = stream.get_final_message()
        texts = [[block.to_dict()["text"] for block in message.content] for message in (whole, streamed)]
        assert texts[0] == texts[1]
        assert client.messages.count_tokens(model="org/tiny", messages=MESSAGES).input_tokens > 0
        with pytest.raises(anthropic.NotFoundError) as missing:
            client.messages.create(model="nope", messages=MESSAGES, max_tokens=5)
        error: Any = missing.value.body
        assert error["type"] == "error"
        assert error["error"]["type"] == "not_found_error"


OTHER_ROUTES: dict[str, dict[str, Any]] = {
    "/v1/rerank": {"query": "a", "documents": ["b", "c"]},
    "/v2/rerank": {"query": "a", "documents": ["b", "c"]},
    "/rerank": {"query": "a", "documents": ["b", "c"]},
    "/v1/score": {"text_1": "a", "text_2": ["b"]},
    "/score": {"text_1": "a", "text_2": ["b"]},
    "/pooling": {"input": "a"},
    "/classify": {"input": "a"},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [100]},
    "/inference/v1/generate": {"token_ids": [100], "sampling_params": {"max_tokens": 2}},
    "/v1/messages/count_tokens": {"messages": MESSAGES},
}


def test_other_routes_reach_the_worker(router: RouterProcess, fake: Control) -> None:
    for path, body in OTHER_ROUTES.items():
        answer = router.request("POST", path, {"model": "org/tiny", **body})
        assert answer.status == 200, (path, answer.body)
        assert fake.journal(path)[-1]["sent_sha256"] == hashlib.sha256(answer.body).hexdigest(), path
        assert router.request("POST", path, {"model": "nope", **body}).status == 404, path
        assert len(fake.journal(path)) == 1, path
