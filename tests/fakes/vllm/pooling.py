"""Embeddings, pooling, classification, scores and ranks."""

from __future__ import annotations

import base64
import struct
from typing import Any

from tests.fakes.vllm import requests, tokens
from tests.fakes.vllm.endpoint import Answer, Call, Json
from tests.fakes.vllm.errors import VllmError
from tests.fakes.vllm.generation import usage


def _read(call: Call) -> tuple[requests.Pooled, list[list[int]]]:
    request = requests.read(call.body, requests.Pooled)
    call.fake.check_model(request.model)
    return request, requests.prompts(request.input)


def _list(call: Call, prefix: str, data: list[Any], count: int) -> Json:
    return Json(
        {
            "id": f"{prefix}-{call.request_id}",
            "object": "list",
            "created": call.created,
            "model": call.fake.settings.model,
            "data": data,
            "usage": usage(count, 0),
        }
    )


def _vectors(request: requests.Pooled, prompts: list[list[int]]) -> list[Any]:
    vectors = [tokens.vector(prompt) for prompt in prompts]
    if request.encoding_format == "float":
        return vectors
    if request.encoding_format == "base64":
        return [base64.b64encode(struct.pack(f"<{len(v)}f", *v)).decode() for v in vectors]
    raise VllmError(f"encoding_format {request.encoding_format!r} is not float or base64", param="encoding_format")


async def embeddings(call: Call) -> Answer:
    request, prompts = _read(call)
    vectors = _vectors(request, prompts)
    data = [{"index": i, "object": "embedding", "embedding": vector} for i, vector in enumerate(vectors)]
    return _list(call, "embd", data, sum(map(len, prompts)))


async def pooling(call: Call) -> Answer:
    request, prompts = _read(call)
    vectors = _vectors(request, prompts)
    data = [{"index": i, "object": "pooling", "data": vector} for i, vector in enumerate(vectors)]
    return _list(call, "pooling", data, sum(map(len, prompts)))


async def classify(call: Call) -> Answer:
    _, prompts = _read(call)
    data = []
    for index, prompt in enumerate(prompts):
        yes = (tokens.vector(prompt)[0] + 1) / 2
        label = "yes" if yes >= 0.5 else "no"
        data.append({"index": index, "label": label, "probs": [1 - yes, yes], "num_classes": 2})
    return _list(call, "classify", data, sum(map(len, prompts)))


async def score(call: Call) -> Answer:
    request = requests.read(call.body, requests.Score)
    call.fake.check_model(request.model)
    left = [request.text_1] if isinstance(request.text_1, str) else request.text_1
    right = [request.text_2] if isinstance(request.text_2, str) else request.text_2
    if len(left) not in (1, len(right)):
        raise VllmError("Input lengths must be either 1:1, 1:N or N:N")
    pairs = list(zip(left * (len(right) if len(left) == 1 else 1), right, strict=True))
    data = [{"index": i, "object": "score", "score": _similar(a, b)} for i, (a, b) in enumerate(pairs)]
    return _list(call, "score", data, sum(len(a.encode()) + len(b.encode()) for a, b in pairs))


async def rerank(call: Call) -> Answer:
    request = requests.read(call.body, requests.Rerank)
    call.fake.check_model(request.model)
    results: list[dict[str, Any]] = [
        {"index": i, "document": {"text": d, "multi_modal": None}, "relevance_score": _similar(request.query, d)}
        for i, d in enumerate(request.documents)
    ]
    results.sort(key=lambda r: -r["relevance_score"])
    count = sum(len(request.query.encode()) + len(d.encode()) for d in request.documents)
    return Json(
        {
            "id": f"score-{call.request_id}",
            "model": call.fake.settings.model,
            "usage": {"prompt_tokens": count, "total_tokens": count},
            "results": results[: request.top_n or None],
        }
    )


def _similar(left: str, right: str) -> float:
    return tokens.similarity(tokens.vector(tokens.encode(left)), tokens.vector(tokens.encode(right)))
