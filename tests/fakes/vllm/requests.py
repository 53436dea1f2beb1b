"""Request bodies: the fields the fake knows, checked as vLLM checks them. Unknown fields are ignored, as in vLLM."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from tests.fakes.vllm import tokens
from tests.fakes.vllm.errors import VllmError, from_validation

Params = dict[str, Any]


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Body(msgspec.Struct):
    """What all bodies have."""

    model: str | None = None
    kv_transfer_params: Params | None = None


class Sampled(Body):
    """What bodies of routes that generate have."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    n: int = 1
    min_tokens: int = 0
    ignore_eos: bool = False
    return_token_ids: bool | None = None
    cache_hit_threshold: float | None = None
    bootstrap_host: str | None = None
    bootstrap_port: int | None = None
    bootstrap_room: int | None = None


class Message(msgspec.Struct):
    role: str
    content: str | list[dict[str, Any]] | None = None

    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.get("text", "") for part in self.content)
        return self.content or ""


class Chat(Sampled, kw_only=True):
    messages: list[Message]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None

    def prompt(self) -> list[int]:
        return rendered(self.messages)


class Completion(Sampled, kw_only=True):
    prompt: str | list[str | int | list[int]]
    max_tokens: int | None = None

    def prompts(self) -> list[list[int]]:
        return prompts(self.prompt)


class Responses(Sampled, kw_only=True):
    input: str | list[Message]
    instructions: str | None = None
    max_output_tokens: int | None = None
    request_id: str | None = None

    def prompt(self) -> list[int]:
        said = [Message("user", self.input)] if isinstance(self.input, str) else self.input
        return rendered([*_system(self.instructions), *said])


class Messages(Sampled, kw_only=True):
    messages: list[Message]
    max_tokens: int
    system: str | list[dict[str, Any]] | None = None

    def prompt(self) -> list[int]:
        return rendered([*_system(self.system), *self.messages])


class CountTokens(Body, kw_only=True):
    messages: list[Message]
    system: str | list[dict[str, Any]] | None = None

    def prompt(self) -> list[int]:
        return rendered([*_system(self.system), *self.messages])


class Generate(Sampled, kw_only=True):
    token_ids: list[int]
    sampling_params: dict[str, Any]


class Tokenize(Body, kw_only=True):
    prompt: str | None = None
    messages: list[Message] | None = None

    def ids(self) -> list[int]:
        if self.messages is not None:
            return rendered(self.messages)
        if self.prompt is None:
            raise VllmError("1 validation error:\n  prompt", type="Bad Request", param="body.prompt")
        return tokens.encode(self.prompt)


class Detokenize(Body, kw_only=True):
    tokens: list[int]


class Pooled(Body, kw_only=True):
    """Embeddings, pooling and classification."""

    input: str | list[str | int | list[int]]
    encoding_format: str = "float"


class Score(Body, kw_only=True):
    text_1: str | list[str]
    text_2: str | list[str]


class Rerank(Body, kw_only=True):
    query: str
    documents: list[str]
    top_n: int = 0


T = TypeVar("T", bound=Body)


def read(body: bytes, kind: type[T]) -> T:
    """Decode a body; raises VllmError as FastAPI would answer."""
    try:
        return msgspec.json.decode(body, type=kind, strict=False)
    except msgspec.DecodeError as error:
        raise from_validation(error) from None


def _system(content: str | list[dict[str, Any]] | None) -> list[Message]:
    return [Message("system", content)] if content else []


def rendered(messages: list[Message]) -> list[int]:
    """Token ids of a conversation."""
    return tokens.encode("".join(f"<{message.role}>{message.text()}" for message in messages))


def prompts(value: str | list[str | int | list[int]]) -> list[list[int]]:
    """Token ids of each prompt in a ``prompt`` or ``input`` field."""
    if isinstance(value, str):
        return [tokens.encode(value)]
    if not value:
        raise VllmError("prompt must not be empty")
    ids = [item for item in value if isinstance(item, int)]
    if ids:
        return [ids]
    return [tokens.encode(item) if isinstance(item, str) else item for item in value if not isinstance(item, int)]


def check_sampling(request: Sampled, max_tokens: int | None, max_model_len: int) -> None:
    """vLLM's checks of the sampling parameters."""
    if request.stream_options is not None and not request.stream:
        raise VllmError("Stream options can only be defined when `stream=True`.", param="stream_options")
    if max_tokens is not None and max_tokens < 1:
        raise VllmError(f"max_tokens must be at least 1, got {max_tokens}.", param="max_tokens")
    if max_tokens is not None and max_tokens > max_model_len:
        raise VllmError(
            f"{max_tokens=} cannot be greater than {max_model_len=}. Please request fewer output tokens.",
            param="max_tokens",
        )
    if max_tokens is not None and request.min_tokens > max_tokens:
        raise VllmError(f"min_tokens must be less than or equal to {max_tokens=}, got {request.min_tokens}.")
    if request.n < 1:
        raise VllmError(f"n must be at least 1, got {request.n}.", param="n")
    if request.n > 1 and request.temperature == 0:
        raise VllmError(f"n must be 1 when using greedy sampling, got {request.n}.")
