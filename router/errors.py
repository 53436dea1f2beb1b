"""Errors as clients see them: one description, written in the dialect of the route.

- OpenAI (and whatever else vLLM serves): ``{"error": {"message", "type", "param", "code"}}``; inside a stream the same
  object as an event's data, which OpenAI's clients raise as APIError.
- Responses: inside a stream an ``error`` event (``type``, ``code``, ``message``, ``param``).
- Anthropic: ``{"type": "error", "error": {"type", "message"}, "request_id"}``, inside a stream an ``error`` event.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Protocol

import msgspec

_encode = msgspec.json.encode


@dataclass(eq=False)
class ApiError(Exception):
    """An answer the router gives itself. ``type`` is the class of error, ``code`` its stable name."""

    status: int
    code: str
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    retry_after_s: int | None = None
    allow: str | None = None
    """Methods that would be allowed, for 405."""

    def __str__(self) -> str:
        return self.message


class Dialect(Protocol):
    """How an error is written."""

    def body(self, error: ApiError, request_id: str) -> bytes:
        """A whole answer's body."""
        ...

    def event(self, error: ApiError, request_id: str) -> bytes:
        """A server-sent event, ended."""
        ...


class OpenAI:
    def body(self, error: ApiError, request_id: str) -> bytes:
        return _encode({"error": _openai(error)})

    def event(self, error: ApiError, request_id: str) -> bytes:
        return b"data: " + self.body(error, request_id) + b"\n\n"


class Responses(OpenAI):
    def event(self, error: ApiError, request_id: str) -> bytes:
        # OpenAI's clients look for the "error" object, whatever the event's type says.
        event = {**_openai(error), "type": "error", "error": _openai(error)}
        return b"event: error\ndata: " + _encode(event) + b"\n\n"


class Anthropic:
    def body(self, error: ApiError, request_id: str) -> bytes:
        kind = _ANTHROPIC_TYPES.get(error.status, "api_error")
        described = {"type": kind, "message": error.message}
        return _encode({"type": "error", "error": described, "request_id": request_id})

    def event(self, error: ApiError, request_id: str) -> bytes:
        return b"event: error\ndata: " + self.body(error, request_id) + b"\n\n"


_ANTHROPIC_TYPES: Final = {
    400: "invalid_request_error",
    404: "not_found_error",
    408: "invalid_request_error",
    413: "request_too_large",
    415: "invalid_request_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def _openai(error: ApiError) -> dict[str, Any]:
    return {"message": error.message, "type": error.type, "param": error.param, "code": error.code}


OPENAI = OpenAI()
RESPONSES = Responses()
ANTHROPIC = Anthropic()


def unknown_path(method: str, path: str) -> ApiError:
    return ApiError(
        404, "unknown_url", f"Unknown request URL: {method} {path}. The router passes inference routes only."
    )


def method_not_allowed(method: str, path: str, allow: str) -> ApiError:
    return ApiError(405, "method_not_allowed", f"{method} is not allowed for {path}; use {allow}.", allow=allow)


def unknown_model(name: str | None, known: list[str]) -> ApiError:
    """404 for a request that names no model, or one that is not served."""
    listed = ", ".join(known)
    if name is None:
        message = f"The request names no model. Available models: {listed}."
    else:
        message = f"The model {name[:200]!r} does not exist. Available models: {listed}."
    return ApiError(404, "model_not_found", message, param="model")


def invalid_body(message: str, code: str = "invalid_json", param: str | None = None) -> ApiError:
    return ApiError(400, code, message, param=param)


def forbidden_field(name: str) -> ApiError:
    return ApiError(
        400,
        "forbidden_parameter",
        f"{name} is set by the router, from what a prefill worker returned; clients must not send it.",
        param=name,
    )


def too_large(limit: int) -> ApiError:
    return ApiError(413, "request_too_large", f"The request body is larger than {limit // 2**20} MiB.")


def body_timeout(seconds: float) -> ApiError:
    return ApiError(408, "request_timeout", f"The request body stopped coming for {seconds:g} s.")


def content_encoding(value: str) -> ApiError:
    message = f"A request body with Content-Encoding {value} is not accepted; send it uncompressed."
    return ApiError(415, "unsupported_content_encoding", message)


def overloaded(limit: int) -> ApiError:
    message = f"The router holds {limit // 2**20} MiB of request bodies already; try again."
    return ApiError(503, "router_overloaded", message, type="service_unavailable_error", retry_after_s=1)


def no_space() -> ApiError:
    message = "The router has no disk space left to hold the upload."
    return ApiError(507, "insufficient_storage", message, type="server_error")


def no_worker(model: str, reason: str, retry_after_s: int) -> ApiError:
    message = f"No worker for the model {model!r} can be reached now: {reason}."
    return ApiError(
        503, "no_healthy_worker", message, type="service_unavailable_error", retry_after_s=retry_after_s
    )  # fmt: skip


def shutting_down() -> ApiError:
    message = "The router is shutting down."
    return ApiError(503, "router_shutdown", message, type="service_unavailable_error", retry_after_s=1)


def worker_lost(reason: str) -> ApiError:
    return ApiError(502, "worker_lost", f"The worker broke off: {reason}.", type="upstream_error")


def bad_answer(reason: str) -> ApiError:
    return ApiError(502, "bad_worker_answer", f"The worker did not answer in HTTP: {reason}.", type="upstream_error")


def first_byte_timeout(seconds: float) -> ApiError:
    message = f"The worker gave no first byte within {seconds:g} s."
    return ApiError(504, "first_byte_timeout", message, type="timeout_error")


def idle_timeout(seconds: float) -> ApiError:
    message = f"The worker was silent for {seconds:g} s inside its answer."
    return ApiError(504, "idle_timeout", message, type="timeout_error")


def internal() -> ApiError:
    return ApiError(500, "internal_error", "The router failed; its log says how.", type="server_error")
