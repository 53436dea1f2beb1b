"""The first request: one streamed answer, or one embedding, through the router with the OpenAI client."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from helios.errors import Unavailable
from helios.launch.model_info import Task

QUESTION: Final = "What does the sea look like in the morning?"
DEADLINE_S: Final = 300.0
"""Longest wait for the whole answer, in seconds: a CPU is slow."""


@dataclass(frozen=True, slots=True)
class Answer:
    """``first_s`` is the time to the first token (or the vector), ``seconds`` to the end; ``summary`` for people."""

    first_s: float
    seconds: float
    summary: str


def ask(url: str, model: str, task: Task, question: str, max_tokens: int, show: Callable[[str], None]) -> Answer:
    """Ask the model, handing every piece of the answer to ``show`` as it comes; raises Unavailable."""
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=DEADLINE_S, max_retries=0)
    try:
        with client:
            if task == "embedding":
                return _embed(client, model, question, show)
            return _stream(client, model, task, question, max_tokens, show)
    except openai.OpenAIError as error:
        raise Unavailable(f"the first request failed: {error}") from error


def _stream(client: Any, model: str, task: Task, question: str, max_tokens: int, show: Callable[[str], None]) -> Answer:
    common = {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    started = time.monotonic()
    if task == "chat":
        stream = client.chat.completions.create(messages=[{"role": "user", "content": question}], **common)
    else:
        stream = client.completions.create(prompt=question, **common)
    first, tokens, pieces = 0.0, 0, 0
    for chunk in stream:
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            text = choice.delta.content if task == "chat" else choice.text
            if text:
                first = first or time.monotonic() - started
                pieces += 1
                show(text)
    if not pieces:
        raise Unavailable("the model answered without a single token")
    seconds = time.monotonic() - started
    return Answer(first, seconds, f"{tokens} tokens, the first after {first * 1000:.0f} ms")


def _embed(client: Any, model: str, question: str, show: Callable[[str], None]) -> Answer:
    started = time.monotonic()
    (item,) = client.embeddings.create(model=model, input=question, encoding_format="float").data
    seconds = time.monotonic() - started
    show(f"[{', '.join(f'{value:.4f}' for value in item.embedding[:8])}, …]")
    return Answer(seconds, seconds, f"a vector of {len(item.embedding)} numbers")
