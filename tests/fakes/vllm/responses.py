"""``/v1/responses``."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from tests.fakes.vllm import requests
from tests.fakes.vllm.endpoint import Answer, Call, Events, Json, sse
from tests.fakes.vllm.engine import Job
from tests.fakes.vllm.generation import job_of


async def responses(call: Call) -> Answer:
    request = requests.read(call.body, requests.Responses)
    job = job_of(call, request, "", [request.prompt()], request.max_output_tokens)
    if call.fake.settings.connector == "nixl-push":  # by which the workers meet; no header says it on this route
        job.id = request.request_id or uuid.uuid4().hex
    if request.stream:
        return Events(_events(call, job))
    (choice,) = await call.fake.engine.choices(job)
    item = _item(job, "completed", [_text(choice.text)])
    return Json(_response(call, job, [item], len(choice.ids), choice.finish, call.fake.engine.minted(job)))


def _text(text: str) -> dict[str, Any]:
    return {"annotations": [], "text": text, "type": "output_text", "logprobs": None}


def _item(job: Job, status: str, content: list[Any]) -> dict[str, Any]:
    return {
        "id": f"msg_{job.id}", "content": content, "role": "assistant", "status": status, "type": "message",
        "phase": None,
    }  # fmt: skip


def _response(
    call: Call, job: Job, output: list[Any], count: int, finish: str | None, transfer: Any = None
) -> dict[str, Any]:
    """The response object; ``finish`` is None while it is being made."""
    cut = finish == "length"
    status = "in_progress" if finish is None else "incomplete" if cut else "completed"
    return {
        "id": f"resp_{job.id}",
        "created_at": call.created,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "instructions": None,
        "metadata": None,
        "model": call.fake.settings.model,
        "object": "response",
        "output": output,
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "none",
        "tools": [],
        "top_p": 1.0,
        "background": False,
        "max_output_tokens": job.limit,
        "max_tool_calls": None,
        "previous_response_id": None,
        "prompt": None,
        "reasoning": None,
        "service_tier": "auto",
        "status": status,
        "text": None,
        "top_logprobs": None,
        "truncation": "disabled",
        "usage": None if finish is None else _usage(job.prompt_tokens, count),
        "user": None,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "kv_transfer_params": transfer,
        "ec_transfer_params": None,
        "input_messages": None,
        "output_messages": None,
    }


def _usage(prompt: int, completion: int) -> dict[str, Any]:
    return {
        "input_tokens": prompt,
        "input_tokens_details": {
            "cached_tokens": 0, "cache_write_tokens": 0, "input_tokens_per_turn": [], "cached_tokens_per_turn": [],
        },
        "output_tokens": completion,
        "output_tokens_details": {
            "reasoning_tokens": 0, "tool_output_tokens": 0, "output_tokens_per_turn": [],
            "tool_output_tokens_per_turn": [],
        },
        "total_tokens": prompt + completion,
    }  # fmt: skip


async def _events(call: Call, job: Job) -> AsyncGenerator[bytes, None]:
    number = 0

    def event(kind: str, **fields: Any) -> bytes:
        nonlocal number
        block = sse({**fields, "sequence_number": number, "type": f"response.{kind}"}, f"response.{kind}")
        number += 1
        return block

    place = {"item_id": f"msg_{job.id}", "output_index": 0}
    part = {"content_index": 0, **place}
    began = _response(call, job, [], 0, None)
    yield event("created", response=began)
    yield event("in_progress", response=began)
    text, count, finish = "", 0, "length"
    async with aclosing(call.fake.engine.steps(job)) as steps:
        async for step in steps:
            if not count:
                yield event("output_item.added", item=_item(job, "in_progress", []), output_index=0)
                yield event("content_part.added", **part, part={**_text(""), "logprobs": []})
            count, text, finish = count + 1, text + step.text, step.finish or finish
            yield event("output_text.delta", **part, delta=step.text, logprobs=[])
    item = _item(job, "completed", [_text(text)])
    yield event("output_text.done", **part, logprobs=[], text=text)
    yield event("content_part.done", **part, part=_text(text))
    yield event("output_item.done", item=item, output_index=0)
    yield event("completed", response=_response(call, job, [item], count, finish))
