"""What the endpoints of files and batches have in common: who asks, what a list looks like, which errors there are."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Final, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from helios.errors import HeliosError, NoSpace
from router import errors
from router.admission.admission import Admission
from router.admission.rights import ANYBODY, Principal
from router.answering import refusal
from router.batches.records import NOBODY
from router.errors import ApiError

T = TypeVar("T")

AT_ONCE: Final = 8
"""Records that are read at the same time."""
MIN_EXPIRY_S: Final = 3600
MAX_EXPIRY_S: Final = 30 * 86400
"""What may be asked for as the life of a file, in seconds: OpenAI's bounds."""

Endpoint = Callable[[Request], Awaitable[Response]]


class Access:
    """Who asks. Without ``admission`` everybody is nobody in particular."""

    def __init__(self, admission: Admission | None) -> None:
        self._admission = admission

    def principal(self, request: Request, route: str) -> Principal:
        """Raises ApiError: 401, 403, 503."""
        who = ANYBODY if self._admission is None else self._admission.identify(request.scope["headers"])
        if not who.may_use(route):
            raise errors.not_allowed(None, route)
        return who


def tenant_of(principal: Principal) -> str:
    """The tenant as in keys of the store."""
    return principal.tenant or NOBODY


def answering(endpoint: Callable[[Any, Request], Awaitable[Response]]) -> Any:
    """A method that answers a request, with what it raises as an answer, too."""

    @functools.wraps(endpoint)
    async def answered(self: Any, request: Request) -> Response:
        try:
            return await endpoint(self, request)
        except ApiError as error:
            return refusal(request, error)
        except NoSpace:
            return refusal(request, errors.no_space())
        except HeliosError as error:
            return refusal(request, errors.no_store(error.message))

    return answered


def number(request: Request, name: str, default: int, most: int) -> int:
    """A parameter of the query, from 1 to ``most``. Raises ApiError."""
    text = request.query_params.get(name)
    if text is None:
        return default
    if not text.isascii() or not text.isdigit() or len(text) > 9 or not 1 <= int(text) <= most:
        raise errors.invalid_body(f"{name} has to be a number from 1 to {most}.", "invalid_value", name)
    return int(text)


def expiry_s(anchor: object, seconds: object, name: str) -> int:
    """How long a file shall live that is to expire, in seconds. Raises ApiError naming the field."""
    if anchor != "created_at":
        raise errors.invalid_body(f"{name}.anchor has to be 'created_at'.", "invalid_value", f"{name}.anchor")
    if isinstance(seconds, str) and seconds.isascii() and seconds.isdigit() and len(seconds) < 10:
        seconds = int(seconds)
    if not isinstance(seconds, int) or isinstance(seconds, bool) or not MIN_EXPIRY_S <= seconds <= MAX_EXPIRY_S:
        message = f"{name}.seconds has to be a number from {MIN_EXPIRY_S} to {MAX_EXPIRY_S}."
        raise errors.invalid_body(message, "invalid_value", f"{name}.seconds")
    return seconds


async def page(
    ids: Sequence[str], limit: int, read: Callable[[str], Awaitable[dict[str, Any] | None]]
) -> dict[str, Any]:
    """A page of a list: the first ``limit`` of ``ids`` that ``read`` shows."""
    data: list[dict[str, Any]] = []
    async for shown in _each(ids, read):
        data.append(shown)
        if len(data) > limit:
            break
    more = len(data) > limit
    data = data[:limit]
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": more}


async def _each(ids: Sequence[str], read: Callable[[str], Awaitable[T | None]]) -> AsyncIterator[T]:
    for start in range(0, len(ids), AT_ONCE):
        for one in await asyncio.gather(*(read(identity) for identity in ids[start : start + AT_ONCE])):
            if one is not None:
                yield one
