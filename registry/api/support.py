"""What the native routes share: reading parameters and bodies, answering in JSON."""

from __future__ import annotations

from typing import Any, Final, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from helios.errors import InvalidInput
from helios.names import RepoId
from registry.services import Services

T = TypeVar("T")

MAX_JSON: Final = 32 << 20
"""Longest JSON body in bytes: a push of 100,000 files with long paths fits."""


def services(request: Request) -> Services:
    """The registry's parts."""
    found: Services = request.app.state.services
    return found


def parameter(request: Request, name: str) -> str:
    """A query parameter that must be there once."""
    values = request.query_params.getlist(name)
    if len(values) != 1 or not values[0]:
        raise InvalidInput(f"{request.url.path} needs the query parameter {name!r} once")
    return values[0]


def repository(request: Request) -> RepoId:
    """The repository in the query parameter ``repo``."""
    return RepoId.from_canonical(parameter(request, "repo"))


async def read_json(request: Request, kind: type[T], limit: int = MAX_JSON) -> T:
    """The JSON body as ``kind``; raises InvalidInput for anything else or more than ``limit`` bytes."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise InvalidInput(f"the body is longer than {limit} bytes")
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInput(f"the body of {request.method} {request.url.path} is wrong: {error}") from None


class Json(Response):
    """A JSON answer; takes structs, dataclasses and plain values."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)
