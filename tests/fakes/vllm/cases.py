"""Requests whose answers are compared, in shape, between the fake and real vLLM.

``{MODEL}`` stands for the served model. The answers of a real vLLM are kept in ``golden.json``; ``capture.py`` makes
that file anew, and ``contract.py`` holds a server to it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Final

MODEL: Final = "{MODEL}"
CHAT: Final = [{"role": "user", "content": "hello there"}]


@dataclass(frozen=True, slots=True)
class Case:
    """One request: ``body`` is sent as JSON, or ``raw`` as it stands; ``runner`` is vLLM's ``--runner``."""

    name: str
    path: str
    body: dict[str, Any] | None = None
    raw: bytes | None = None
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=dict)
    runner: str = "generate"

    def content(self, model: str) -> bytes | None:
        """The request body for the model."""
        if self.raw is not None:
            return self.raw
        return None if self.body is None else json.dumps(self.body).replace(MODEL, model).encode()


def _chat(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": CHAT, "max_tokens": 3, "temperature": 0, **more}


def _completion(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "hello there", "max_tokens": 3, "temperature": 0, **more}


RESPONSE: Final = {"model": MODEL, "input": "hello", "max_output_tokens": 3}
USAGE: Final = {"stream_options": {"include_usage": True}}

CASES: Final = (
    Case("chat", "/v1/chat/completions", _chat()),
    Case("chat with two choices", "/v1/chat/completions", _chat(n=2, temperature=1)),
    Case("chat stream", "/v1/chat/completions", _chat(stream=True)),
    Case("chat stream with usage", "/v1/chat/completions", _chat(stream=True, **USAGE)),
    Case("completion", "/v1/completions", _completion()),
    Case("completion of two prompts", "/v1/completions", _completion(prompt=["ab", "cd"], n=2, temperature=1)),
    Case("completion of token ids", "/v1/completions", _completion(prompt=[5, 6, 7], return_token_ids=True)),
    Case("completion stream with usage", "/v1/completions", _completion(stream=True, **USAGE)),
    Case("response", "/v1/responses", RESPONSE),
    Case("response stream", "/v1/responses", {**RESPONSE, "stream": True}),
    Case("message", "/v1/messages", _chat()),
    Case("message stream", "/v1/messages", _chat(stream=True)),
    Case("count tokens", "/v1/messages/count_tokens", {"model": MODEL, "messages": CHAT}),
    Case("tokenize", "/tokenize", {"model": MODEL, "prompt": "hello"}),
    Case("tokenize chat", "/tokenize", {"model": MODEL, "messages": CHAT}),
    Case("detokenize", "/detokenize", {"model": MODEL, "tokens": [105, 106]}),
    Case(
        "generate",
        "/inference/v1/generate",
        {"model": MODEL, "token_ids": [105, 106], "sampling_params": {"max_tokens": 3, "temperature": 0}},
    ),
    Case("models", "/v1/models", method="GET"),
    Case("version", "/version", method="GET"),
    Case("health", "/health", method="GET"),
    Case("load", "/load", method="GET"),
    Case("no such model", "/v1/chat/completions", {"model": "nope", "messages": CHAT}),
    Case("no such model for messages", "/v1/messages", {"model": "nope", "messages": CHAT, "max_tokens": 3}),
    Case("no model", "/v1/chat/completions", {"messages": CHAT, "max_tokens": 2}),
    Case("unknown field", "/v1/chat/completions", _chat(bogus_field=1)),
    Case("wrong type", "/v1/chat/completions", _chat(max_tokens="x")),
    Case("no tokens asked", "/v1/completions", _completion(max_tokens=0)),
    Case("negative max_tokens", "/v1/chat/completions", _chat(max_tokens=-1)),
    Case("prompt and answer too long", "/v1/chat/completions", _chat(max_tokens=4000)),
    Case("min_tokens above max_tokens", "/v1/chat/completions", _chat(min_tokens=5)),
    Case("stream_options without stream", "/v1/chat/completions", _chat(**USAGE)),
    Case("no messages", "/v1/chat/completions", {"model": MODEL}),
    Case("message without messages", "/v1/messages", {"model": MODEL, "max_tokens": 3}),
    Case("broken JSON", "/v1/chat/completions", raw=b'{"model":'),
    Case("JSON of another type", "/v1/chat/completions", raw=b"[]"),
    Case("not JSON by its type", "/v1/chat/completions", _chat(), headers={"content-type": "text/plain"}),
    Case("no such path", "/nonsense", {}),
    Case("embeddings of a model that generates", "/v1/embeddings", {"model": MODEL, "input": "x"}),
    Case("embedding", "/v1/embeddings", {"model": MODEL, "input": "hello"}, runner="pooling"),
    Case("embeddings", "/v1/embeddings", {"model": MODEL, "input": ["ab", "cd"]}, runner="pooling"),
    Case(
        "embedding in base64",
        "/v1/embeddings",
        {"model": MODEL, "input": "hello", "encoding_format": "base64"},
        runner="pooling",
    ),
    Case("pooling", "/pooling", {"model": MODEL, "input": "hello"}, runner="pooling"),
    Case("score", "/v1/score", {"model": MODEL, "text_1": "a", "text_2": ["b", "c"]}, runner="pooling"),
    Case("rerank", "/v1/rerank", {"model": MODEL, "query": "a", "documents": ["b", "c"]}, runner="pooling"),
    Case("chat with a model that embeds", "/v1/chat/completions", _chat(), runner="pooling"),
)
