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
    challenge: str | None = None
    """WWW-Authenticate, for 401."""

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
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "invalid_request_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
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
        f"{name} is set by the router, which says where workers take memory from; clients must not send it.",
        param=name,
    )


def too_large(limit: int) -> ApiError:
    shown = f"{limit // 2**20} MiB" if limit >= 2**20 else f"{limit // 2**10} KiB"
    return ApiError(413, "request_too_large", f"The request body is larger than {shown}.")


def body_timeout(seconds: float) -> ApiError:
    return ApiError(408, "request_timeout", f"The request body stopped coming for {seconds:g} s.")


def content_encoding(value: str) -> ApiError:
    message = f"A request body with Content-Encoding {value} is not accepted; send it uncompressed."
    return ApiError(415, "unsupported_content_encoding", message)


def overloaded(limit: int) -> ApiError:
    message = f"The router holds {limit // 2**20} MiB of request bodies already; try again."
    return _unavailable("router_overloaded", message)


def too_many_connections() -> ApiError:
    message = "The router has as many connections of clients as it takes; try again."
    return _unavailable("too_many_connections", message)


def out_of_descriptors() -> ApiError:
    message = "The router has no file descriptor left for this request; try again."
    return _unavailable("router_overloaded", message)


def no_space() -> ApiError:
    message = "The router has no disk space left to hold the upload."
    return ApiError(507, "insufficient_storage", message, type="server_error")


def no_worker(model: str, reason: str, retry_after_s: int) -> ApiError:
    message = f"No worker for the model {model!r} can be reached now: {reason}."
    return _unavailable("no_healthy_worker", message, retry_after_s)


def no_prefill(model: str, why: str) -> ApiError:
    """503: its worker takes no prompt that another one has not computed."""
    message = f"No worker has computed the prompt for the model {model!r} ({why}), and its decode workers can't."
    return _unavailable("no_prefill_worker", message)


def no_credentials() -> ApiError:
    message = "An API key is needed: send it as Authorization: Bearer KEY, or as x-api-key."
    return ApiError(401, "missing_api_key", message, challenge="Bearer")


def bad_credentials(reason: str) -> ApiError:
    challenge = 'Bearer error="invalid_token"'
    return ApiError(401, "invalid_api_key", f"The credentials are not accepted: {reason}.", challenge=challenge)


def credentials_unknown_yet() -> ApiError:
    """503: the token names a key that its issuer may have published since it was last asked."""
    message = "The issuer's keys are being fetched; try again."
    return _unavailable("issuer_keys_pending", message)


def not_allowed(model: str | None, path: str) -> ApiError:
    """403; ``model`` is None where the path is not allowed for any."""
    if model is None:
        return ApiError(403, "route_not_allowed", f"These credentials may not use {path}.", type="permission_error")
    message = f"These credentials may not use the model {model!r} at {path}."
    return ApiError(403, "model_not_allowed", message, type="permission_error", param="model")


def limit_reached(what: str, unit: str, limit: float, retry_after_s: int) -> ApiError:
    """429: a rate limit; ``unit`` is requests or tokens, ``limit`` for each minute."""
    message = f"The limit of {limit:g} {unit} per minute of {what} is reached. Try again in {retry_after_s} s."
    return ApiError(429, "rate_limit_exceeded", message, type=unit, retry_after_s=retry_after_s)


def over_limit(what: str, asked: float, limit: float) -> ApiError:
    """400: more tokens than a limit ever gives at once, so that trying again would be in vain."""
    message = (
        f"The request may use {asked:.0f} tokens (prompt, estimated, and the most of output), more than the {limit:g} "
        f"per minute of {what} ever allow; lower max_tokens or send less."
    )
    return ApiError(400, "request_over_token_limit", message, param="max_tokens")


def limits_away() -> ApiError:
    message = "The store of rate limits can't be reached, and without it nothing is let through."
    return _unavailable("limits_unavailable", message)


def queue_full(model: str, waiting: int, retry_after_s: int) -> ApiError:
    """429: too many wait already."""
    message = f"All workers of {model!r} are busy and {waiting} requests wait already. Try again in {retry_after_s} s."
    return ApiError(429, "queue_full", message, type="rate_limit_error", retry_after_s=retry_after_s)


def pushed_out(model: str, retry_after_s: int) -> ApiError:
    """429: the queue is full and others have a better claim to the place."""
    message = f"All workers of {model!r} are busy, and the place in the queue went to somebody with a better claim."
    return ApiError(429, "queue_full", message, type="rate_limit_error", retry_after_s=retry_after_s)


def saturated(model: str, seconds: float, position: int, retry_after_s: int) -> ApiError:
    """429: waited in vain."""
    message = f"All workers of {model!r} were busy for {seconds:g} s; {position} requests were still ahead."
    return ApiError(429, "saturated", message, type="rate_limit_error", retry_after_s=retry_after_s)


def limit_of_model(model: str, most: int, seconds: float, position: int, retry_after_s: int) -> ApiError:
    """429: waited in vain for the model to have fewer requests than it may."""
    message = (
        f"The model {model!r} answers {most} requests at the same time, its limit, and did so for {seconds:g} s; "
        f"{position} requests were still ahead."
    )
    return ApiError(429, "model_limit_reached", message, type="rate_limit_error", retry_after_s=retry_after_s)


def queue_of_model_full(model: str, most: int, retry_after_s: int) -> ApiError:
    """429: so many wait for the model already as may."""
    message = (
        f"The model {model!r} has as many requests as it may: no more than {most} wait for it. "
        f"Try again in {retry_after_s} s."
    )
    return ApiError(429, "model_limit_reached", message, type="rate_limit_error", retry_after_s=retry_after_s)


def waking(model: str, seconds: float, progress: str, retry_after_s: int) -> ApiError:
    """503: the model did not come up in time."""
    told = f" ({progress})" if progress else ""
    message = f"The model {model!r} is being started{told} and was not up after {seconds:g} s."
    return _unavailable("model_waking", message, retry_after_s)


def alias_in_form(alias: str, model: str) -> ApiError:
    message = f"{alias!r} is an alias, which forms can't use; send the model {model!r}."
    return ApiError(400, "alias_not_supported", message, param="model")


def alias_unclear(alias: str) -> ApiError:
    message = (
        f'The body names the alias {alias!r} in a way that can\'t be replaced; write "model" once, without escapes.'
    )
    return ApiError(400, "alias_not_supported", message, param="model")


def no_stream(status: int, message: str) -> ApiError:
    """For a stream that was begun while it waited, and to which the worker answered otherwise."""
    return ApiError(status, "worker_refused", message, type="upstream_error")


def shutting_down() -> ApiError:
    message = "The router is shutting down."
    return _unavailable("router_shutdown", message)


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


def no_metrics() -> ApiError:
    message = "The router's processes do not say what they have counted."
    return _unavailable("no_metrics", message)


def gateway_mode(mode: str) -> ApiError:
    message = f"The gateway asks with request_body_mode {mode}; the picker takes FULL_DUPLEX_STREAMED."
    return ApiError(500, "gateway_mode", message, type="server_error")


def no_such(kind: str, identity: str, param: str) -> ApiError:
    """404: a file or a batch that there is not, or that is another tenant's."""
    return ApiError(404, f"{kind.lower()}_not_found", f"No such {kind} object: {identity[:100]}", param=param)


def file_too_large(limit_mib: int) -> ApiError:
    return ApiError(413, "file_too_large", f"The file is longer than {limit_mib} MiB.", param="file")


def too_many_files(limit: int) -> ApiError:
    message = f"There are {limit} files already; delete some first."
    return ApiError(400, "file_limit_reached", message, param="file")


def too_many_uploads(limit: int) -> ApiError:
    message = f"{limit} uploads are under way already; try again."
    return _unavailable("router_overloaded", message, 5)


def too_many_batches(limit: int) -> ApiError:
    message = f"{limit} batches are not over yet; try again when one is."
    return ApiError(429, "batch_limit_reached", message, type="rate_limit_error", retry_after_s=60)


def cannot_cancel(identity: str) -> ApiError:
    return ApiError(409, "batch_not_cancellable", f"The batch {identity} is over, or about to be.", param="batch_id")


def no_store(reason: str) -> ApiError:
    message = f"Files and batches can't be used now: {reason}."
    return _unavailable("store_unavailable", message, 5)


def internal() -> ApiError:
    return ApiError(500, "internal_error", "The router failed; its log says how.", type="server_error")


def _unavailable(code: str, message: str, retry_after_s: int = 1) -> ApiError:
    return ApiError(503, code, message, type="service_unavailable_error", retry_after_s=retry_after_s)
