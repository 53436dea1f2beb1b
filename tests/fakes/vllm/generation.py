"""``/v1/chat/completions``, ``/v1/completions`` and ``/inference/v1/generate``."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Final

import msgspec

from tests.fakes.vllm import requests
from tests.fakes.vllm.endpoint import Answer, Call, Events, Json, sse
from tests.fakes.vllm.engine import Choice, Job
from tests.fakes.vllm.errors import VllmError, from_validation

FINGERPRINT: Final = "vllm-0.32.0-fake"


def usage(prompt: int, completion: int, *, details: bool = True) -> dict[str, Any]:
    out: dict[str, Any] = {
        "prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion,
    }  # fmt: skip
    return out | {"prompt_tokens_details": None, "completion_tokens_details": None} if details else out


def last(job: Job, choices: list[Choice]) -> dict[str, Any]:
    """The fields at the end of a whole answer."""
    return {
        "service_tier": None,
        "system_fingerprint": FINGERPRINT,
        "usage": usage(job.prompt_tokens, sum(len(c.ids) for c in choices)),
    }


def transfer(params: Any) -> dict[str, Any]:
    return {"kv_transfer_params": params, "ec_transfer_params": None, "metrics": None}


def job_of(call: Call, request: requests.Sampled, prefix: str, prompts: list[list[int]], limit: int | None) -> Job:
    call.fake.check_model(request.model)
    requests.check_sampling(request, limit, call.fake.settings.max_model_len)
    job = Job(f"{prefix}{call.request_id}", prompts, request, limit, call.record.header("x-data-parallel-rank"))
    call.fake.engine.check(job)
    return job


async def chat(call: Call) -> Answer:
    request = requests.read(call.body, requests.Chat)
    limit = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
    job = job_of(call, request, "chatcmpl-", [request.prompt()], limit)
    if request.stream:
        return Events(_chat_events(call, job))
    choices = await call.fake.engine.choices(job)
    return Json(
        {
            "id": job.id,
            "object": "chat.completion",
            "created": call.created,
            "model": call.fake.settings.model,
            "choices": [_chat_choice(choice, request) for choice in choices],
            **last(job, choices),
            "prompt_logprobs": None,
            "prompt_token_ids": job.prompts[0] if request.return_token_ids else None,
            "prompt_text": None,
            **transfer(call.fake.engine.minted(job)),
        }
    )


def _chat_choice(choice: Choice, request: requests.Chat) -> dict[str, Any]:
    message = dict.fromkeys(("refusal", "annotations", "audio", "function_call", "reasoning"))
    return {
        "index": choice.index,
        "message": {"role": "assistant", "content": choice.text, **message},
        "logprobs": None,
        "finish_reason": choice.finish,
        "stop_reason": None,
        "token_ids": choice.ids if request.return_token_ids else None,
        "routed_experts": None,
    }


async def _chat_events(call: Call, job: Job) -> AsyncGenerator[bytes, None]:
    head = {
        "id": job.id, "object": "chat.completion.chunk", "created": call.created, "model": call.fake.settings.model,
    }  # fmt: skip
    opened: set[int] = set()
    count = 0
    async with aclosing(call.fake.engine.steps(job)) as steps:
        async for step in steps:
            count += 1
            if step.choice not in opened:
                opened.add(step.choice)
                delta = {"role": "assistant", "content": ""}
                choice = {"index": step.choice, "delta": delta, "logprobs": None, "finish_reason": None}
                yield sse({**head, "choices": [choice], "prompt_token_ids": None, "prompt_text": None})
            choice = {
                "index": step.choice,
                "delta": {"content": step.text},
                "logprobs": None,
                "finish_reason": step.finish,
                **({"stop_reason": None} if step.finish else {}),
                "token_ids": [step.token] if job.request.return_token_ids else None,
            }
            ends = step.finish is not None and not _wants_usage(job)
            yield sse({**head, "choices": [choice], **({"system_fingerprint": FINGERPRINT} if ends else {})})
    for block in _closing(head, job, count):
        yield block


def _wants_usage(job: Job) -> bool:
    options = job.request.stream_options
    return options is not None and bool(options.include_usage)


def _closing(head: dict[str, Any], job: Job, count: int) -> list[bytes]:
    blocks = [sse("[DONE]")]
    if _wants_usage(job):
        counted = usage(job.prompt_tokens, count, details=False)
        blocks.insert(0, sse({**head, "choices": [], "usage": counted, "system_fingerprint": FINGERPRINT}))
    return blocks


async def completion(call: Call) -> Answer:
    request = requests.read(call.body, requests.Completion)
    limit = 16 if request.max_tokens is None else request.max_tokens
    job = job_of(call, request, "cmpl-", request.prompts(), limit)
    if request.stream:
        return Events(_completion_events(call, job))
    choices = await call.fake.engine.choices(job)
    return Json(
        {
            "id": job.id,
            "object": "text_completion",
            "created": call.created,
            "model": call.fake.settings.model,
            "choices": [_completion_choice(choice, request) for choice in choices],
            **last(job, choices),
            **transfer(call.fake.engine.minted(job)),
        }
    )


def _completion_choice(choice: Choice, request: requests.Completion) -> dict[str, Any]:
    return {
        "index": choice.index,
        "text": choice.text,
        "logprobs": None,
        "finish_reason": choice.finish,
        "stop_reason": None,
        "token_ids": choice.ids if request.return_token_ids else None,
        "prompt_logprobs": None,
        "prompt_token_ids": choice.prompt if request.return_token_ids else None,
        "routed_experts": None,
    }


async def _completion_events(call: Call, job: Job) -> AsyncGenerator[bytes, None]:
    head = {"id": job.id, "object": "text_completion", "created": call.created, "model": call.fake.settings.model}
    count = 0
    async with aclosing(call.fake.engine.steps(job)) as steps:
        async for step in steps:
            count += 1
            choice = {
                "index": step.choice, "text": step.text, "logprobs": None, "finish_reason": step.finish,
                "stop_reason": None, "prompt_token_ids": None,
                "token_ids": [step.token] if job.request.return_token_ids else None,
            }  # fmt: skip
            ends = step.finish is not None and not _wants_usage(job)
            yield sse({**head, "choices": [choice], **({"system_fingerprint": FINGERPRINT} if ends else {})})
    for block in _closing(head, job, count):
        yield block


class SamplingParams(requests.Sampled, kw_only=True):
    max_tokens: int | None = 16
    extra_args: dict[str, Any] | None = None


async def generate(call: Call) -> Answer:
    request = requests.read(call.body, requests.Generate)
    try:
        params = msgspec.convert(request.sampling_params, SamplingParams, strict=False)
    except msgspec.ValidationError as error:
        raise from_validation(error) from None
    params.model, params.stream, params.kv_transfer_params = request.model, request.stream, request.kv_transfer_params
    if params.extra_args:
        raise VllmError("sampling_params.extra_args is not for clients")
    job = job_of(call, params, "generate-tokens-", [request.token_ids], params.max_tokens)
    if request.stream:
        return Events(_generate_events(call, job))
    choices = await call.fake.engine.choices(job)
    nothing = ("prompt_logprobs", "prompt_token_id_logprobs", "prompt_token_ids", "mm_placeholders", "metrics")
    return Json(
        {
            "request_id": job.id,
            "model": call.fake.settings.model,
            "created": call.created,
            "usage": usage(job.prompt_tokens, sum(len(c.ids) for c in choices)),
            **dict.fromkeys(nothing),
            "kv_transfer_params": call.fake.engine.minted(job),
            "ec_transfer_params": None,
            "output_mode": "tokens",
            "choices": [_generated(c.index, c.ids, c.finish, len(c.ids)) for c in choices],
        }
    )


def _generated(index: int, ids: list[int], finish: str | None, total: int) -> dict[str, Any]:
    versions = [{"version": "default", "start": 0, "end": total}] if finish else None
    return {
        "index": index, "finish_reason": finish, "stop_reason": None, "token_ids": ids, "routed_experts": None,
        "sampling_mask": None, "weight_versions": versions, "logprobs": None,
    }  # fmt: skip


async def _generate_events(call: Call, job: Job) -> AsyncGenerator[bytes, None]:
    totals: dict[int, int] = {}
    async with aclosing(call.fake.engine.steps(job)) as steps:
        async for step in steps:
            total = totals[step.choice] = totals.get(step.choice, 0) + 1
            choice = _generated(step.choice, [step.token], step.finish, total)
            yield sse({"request_id": job.id, "usage": None, "output_mode": "tokens", "choices": [choice]})
    yield sse("[DONE]")
