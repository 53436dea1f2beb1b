"""One call to the API server through the official client's asyncio half, without its generated models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec

from helios.decoding import from_json
from helios.http.bodies import at_most
from helios.kube.reflector import refusal
from helios.kube.wire import Status

if TYPE_CHECKING:
    import aiohttp
    from kubernetes.aio.client import ApiClient

    Answer: TypeAlias = aiohttp.ClientResponse
else:
    Answer = Any

MAX_STATUS: Final = 1 << 16
"""Longest refusal that is read, in bytes."""


async def request(
    client: ApiClient, method: str, path: str, *, timeout: aiohttp.ClientTimeout,
    query: Mapping[str, Any] | None = None, body: Any = None, content_type: str = "application/json",
) -> Answer:  # fmt: skip
    """The open answer to a request that went well. ``path`` is quoted already, if need be.

    Raises Gone, Refused, and what aiohttp raises: ClientError, TimeoutError, OSError.
    """
    answer: Answer = await client.call_api(
        path, method, query_params=list((query or {}).items()),
        header_params={"Accept": "application/json", "Content-Type": content_type}, body=body,
        auth_settings=["BearerToken"], _preload_content=False, _request_timeout=timeout,
    )  # fmt: skip
    if answer.status < 300:
        return answer
    async with answer:
        content = await at_most(answer.content, MAX_STATUS)
        retry_after = answer.headers.get("retry-after", "")
    try:
        status = from_json(content, Status)
    except (msgspec.DecodeError, UnicodeDecodeError):
        status = Status()
    error = refusal(Status(answer.status, status.reason, status.message or answer.reason or "", status.details))
    error.retry_after_s = _seconds(retry_after, status)
    raise error


def _seconds(text: str, status: Status) -> float | None:
    """How long the server asks to wait. Only whole seconds: API servers send no dates."""
    if text.isdigit():
        return float(text)
    asked = status.details.retry_after_seconds if status.details is not None else 0
    return float(asked) if asked > 0 else None
