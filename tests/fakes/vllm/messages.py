"""Anthropic's ``/v1/messages`` and ``/v1/messages/count_tokens``, as vLLM serves them."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Final

from tests.fakes.vllm import requests
from tests.fakes.vllm.endpoint import Answer, Call, Events, Json, sse
from tests.fakes.vllm.engine import Job
from tests.fakes.vllm.generation import job_of

STOP: Final = {"length": "max_tokens", "stop": "end_turn"}


async def messages(call: Call) -> Answer:
    request = requests.read(call.body, requests.Messages)
    job = job_of(call, request, "chatcmpl-", [request.prompt()], request.max_tokens)
    if request.stream:
        return Events(_events(call, job))
    (choice,) = await call.fake.engine.choices(job)
    transfer = call.fake.engine.minted(job)
    return Json(
        {
            "id": job.id,
            "type": "message",
            "role": "assistant",
            "content": [{"type": "text", "text": choice.text}],
            "model": call.fake.settings.model,
            "stop_reason": STOP[choice.finish],
            "usage": {"input_tokens": job.prompt_tokens, "output_tokens": len(choice.ids)},
            **({} if transfer is None else {"kv_transfer_params": transfer}),
        }
    )


async def count_tokens(call: Call) -> Answer:
    request = requests.read(call.body, requests.CountTokens)
    call.fake.check_model(request.model)
    count = len(request.prompt())
    return Json({"input_tokens": count, "context_management": {"original_input_tokens": count}})


async def _events(call: Call, job: Job) -> AsyncGenerator[bytes, None]:
    def event(kind: str, **fields: Any) -> bytes:
        return sse({"type": kind, **fields}, kind)

    message: dict[str, Any] = {
        "id": job.id, "type": "message", "role": "assistant", "content": [], "model": call.fake.settings.model,
        "stop_reason": None, "stop_sequence": None,
        "usage": {"input_tokens": job.prompt_tokens, "output_tokens": 0},
    }  # fmt: skip
    count, finish = 0, "length"
    async with aclosing(call.fake.engine.steps(job)) as steps:
        async for step in steps:
            if not count:
                yield event("message_start", message=message)
                yield event("content_block_start", content_block={"type": "text", "text": ""}, index=0)
            count, finish = count + 1, step.finish or finish
            yield event("content_block_delta", delta={"type": "text_delta", "text": step.text}, index=0)
    yield event("content_block_stop", index=0)
    delta = {"stop_reason": STOP[finish], "stop_sequence": None}
    yield event("message_delta", delta=delta, usage={"input_tokens": job.prompt_tokens, "output_tokens": count})
    yield event("message_stop")
