"""OpenTelemetry's spans of what was recorded: attributes by its conventions for HTTP and generative AI.

What these have no name for is called ``helios.…``: the request's id, seconds that it waited for a worker, seconds until
the first byte of its answer, how often it was sent, and that an attempt was overtaken by the other one. Nothing of a
prompt, an answer or a credential is in a span.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from importlib import metadata
from typing import Final
from urllib.parse import urlsplit

from router.admission.usage import output_of, prompt_of
from router.admission.usage_said import Usage
from router.tracing.collector import pairs_of
from router.tracing.otlp import CLIENT, SERVER, Envelope, Value, span
from router.tracing.recorder import BROKEN_OFF, GONE, OTHER, Sending, Served, Spans

OPERATIONS: Final = {
    "/v1/chat/completions": "chat", "/v1/responses": "chat", "/v1/messages": "chat",
    "/v1/completions": "text_completion", "/inference/v1/generate": "text_completion", "/v1/embeddings": "embeddings",
}  # fmt: skip
METHODS: Final = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"})
"""Those that OpenTelemetry knows: others are ``_OTHER``, so that clients can't make names."""
VERSION: Final = metadata.version("helios-llm")
RECONNECTED: Final = "stale_connection"
"""An event: the worker had closed the kept connection, and the same attempt went on with a new one."""
_ERRORS: Final = 500
_REFUSALS: Final = 400

Attributes = dict[str, Value]


def envelope(environ: Mapping[str, str] = os.environ) -> Envelope:
    """This process. OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES count as everywhere."""
    said = pairs_of(environ.get("OTEL_RESOURCE_ATTRIBUTES", ""))
    instance = f"{socket.gethostname()}-{os.getpid()}"
    own = {"service.name": "helios-router", "service.version": VERSION, "service.instance.id": instance}
    name = environ.get("OTEL_SERVICE_NAME", "")
    return Envelope({**own, **said, **({"service.name": name} if name else {})}, "helios.router", VERSION)


def spans_of(request: Spans | Served, scheme: str) -> list[bytes]:
    """One for the request and one for each time that it was sent. ``scheme``: how clients speak to the router."""
    match request:
        case Spans():
            return _relayed(request, scheme)
        case Served():
            return [_served(request, scheme)]


def _served(request: Served, scheme: str) -> bytes:
    method = request.method if request.method in METHODS else OTHER
    attributes: Attributes = {"http.request.method": method, "url.scheme": scheme}
    once: Attributes = {"url.path": request.path, "helios.request.id": request.identity.decode()}
    if method == OTHER:
        once["http.request.method_original"] = request.method
    name = "HTTP" if method == OTHER else method
    if request.route:
        attributes["http.route"] = request.route
        name += f" {request.route}"
    return _server(name, request, request.trace.id, request.trace.caller, attributes, once)


def _relayed(request: Spans, scheme: str) -> list[bytes]:
    answer, attempts = request.answer, request.attempts
    about = _about(request)
    attributes: Attributes = {
        "http.request.method": "POST", "http.route": request.path, "url.path": request.path, "url.scheme": scheme,
        "helios.attempts": len(attempts), **about,
    }  # fmt: skip
    once: Attributes = {
        "helios.request.id": request.identity.decode(), **_used(None if answer is None else answer.usage)
    }  # fmt: skip
    if request.whole_at and attempts:
        once["helios.queue_wait"] = max(0.0, attempts[0].began - request.whole_at)
    if answer is not None and answer.first_byte_at:
        once["helios.time_to_first_byte"] = answer.first_byte_at - request.began
    out = [_server(f"POST {request.path}", request, request.trace, request.caller, attributes, once)]
    out.extend(_attempt(request, number, attempt, about) for number, attempt in enumerate(attempts))
    return out


def _server(
    name: str, request: Spans | Served, trace: bytes, caller: bytes, attributes: Attributes, once: Attributes
) -> bytes:
    """``caller``: the client's span; empty where the trace is the router's."""
    if request.status:
        attributes["http.response.status_code"] = request.status
    error = GONE if request.gone else BROKEN_OFF if request.broken else ""
    if not error and request.status >= _ERRORS:
        error = str(request.status)
    if error:
        attributes["error.type"] = error
    times = _ns(request, request.began), request.ended_ns
    return span(
        name, SERVER, trace, request.span, caller, times, attributes, once, failed=bool(error), remote=bool(caller)
    )


def _attempt(request: Spans, number: int, attempt: Sending, about: Attributes) -> bytes:
    url = urlsplit(attempt.url)
    attributes: Attributes = {
        "http.request.method": "POST", "url.full": attempt.url + request.path, "server.address": url.hostname or "",
        "server.port": url.port or (443 if url.scheme == "https" else 80), **about,
    }  # fmt: skip
    once: Attributes = _used(attempt.usage)
    if attempt.worker:
        attributes["gen_ai.provider.name"] = "vllm"
    if number:
        attributes["http.request.resend_count"] = number
    if attempt.overtaken:
        attributes["helios.overtaken"] = True
    error = attempt.error
    if attempt.head is not None:
        attributes["http.response.status_code"] = attempt.status
        if attempt.first_byte_at and attempt.head.events:
            once["gen_ai.response.time_to_first_chunk"] = attempt.first_byte_at - attempt.began
        if attempt.status >= _REFUSALS:
            error = str(attempt.status)
    if error:
        attributes["error.type"] = error
    events = []
    if attempt.reconnected_at:
        events.append((RECONNECTED, _ns(request, attempt.reconnected_at)))
    operation = about.get("gen_ai.operation.name")
    name = f"{operation} {request.model}" if operation else "POST"
    times = _ns(request, attempt.began), _ns(request, attempt.ended)
    return span(
        name, CLIENT, request.trace, attempt.span, request.span, times, attributes, once, failed=bool(error),
        remote=False, events=events,
    )  # fmt: skip


def _about(request: Spans) -> Attributes:
    found: Attributes = {"gen_ai.request.model": request.model}
    operation = OPERATIONS.get(request.path)
    if operation is not None:
        found["gen_ai.operation.name"] = operation
    head = None if request.answer is None else request.answer.head
    if head is not None and operation is not None:
        found["gen_ai.request.stream"] = head.events
    return found


def _used(usage: Usage | None) -> Attributes:
    if usage is None:
        return {}
    counts = {"gen_ai.usage.input_tokens": prompt_of(usage), "gen_ai.usage.output_tokens": output_of(usage)}
    return {name: count for name, count in counts.items() if count is not None}


def _ns(request: Spans | Served, moment: float) -> int:
    """A moment of the relay's clock on the wall's, in nanoseconds."""
    return request.ended_ns - round((request.ended - moment) * 1e9)
