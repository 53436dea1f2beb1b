"""What the native routes share: who asks and what he may do, reading parameters and bodies, answering in JSON."""

from __future__ import annotations

import asyncio
from typing import Any, Final, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from helios.decoding import from_json
from helios.errors import InvalidInput
from helios.names import RepoId
from registry.access import Access, Lister
from registry.body import collect
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


def access(request: Request) -> Access:
    """What the caller may do. Raises RepoNotFound or Unauthorized, see ``Tenants.access``."""
    return services(request).tenants.caller(request.scope, request.path_params.get("tenant"))


def administration(request: Request, what: str) -> Access:
    """The caller, who administers the registry; Forbidden to all others. ``what`` begins the message."""
    found = access(request)
    found.check_admin(what)
    return found


async def repository(request: Request) -> RepoId:
    """The repository in the query parameter ``repo``, which the caller may read."""
    return await readable(request, parameter(request, "repo"))


async def readable(request: Request, name: str) -> RepoId:
    """A repository by its canonical name, which the caller may read; raises RepoNotFound, or what its upstream says."""
    repo, who = RepoId.from_canonical(name), access(request)
    who.check_visible(repo)
    if not who.trusted:
        await services(request).let_in(repo, _for_upstream(request, who))
    return repo


def writable(request: Request, name: str) -> RepoId:
    """A repository by its canonical name, which the caller may change; raises RepoNotFound or Forbidden."""
    repo = RepoId.from_canonical(name)
    access(request).check_writable(repo)
    return repo


async def pushable(request: Request, name: str, ref: str) -> RepoId:
    """A repository by its canonical name, whose ref the caller may move; raises RepoNotFound, Forbidden, or Conflict
    for a ref that follows an upstream."""
    repo, who = writable(request, name), access(request)
    await services(request).check_own(repo, ref, _for_upstream(request, who), trusted=who.trusted)
    return repo


def governed(request: Request, name: str, what: str) -> RepoId:
    """A repository by its canonical name, which the caller may remove or retire. ``what`` begins the message."""
    repo = RepoId.from_canonical(name)
    access(request).check_governs(repo, what)
    return repo


def _for_upstream(request: Request, who: Access) -> str | None:
    """The caller's credentials: a token of ours is nobody else's business."""
    return None if who.label is not None else request.headers.get("authorization")


async def listed(request: Request) -> Lister:
    """Which repositories the caller may be told of."""
    who = access(request)
    hidden = set() if who.trusted else await asyncio.to_thread(services(request).restricted)
    return Lister(who, hidden)


async def read_json(request: Request, kind: type[T], limit: int = MAX_JSON) -> T:
    """The JSON body as ``kind``; raises InvalidInput for anything else or more than ``limit`` bytes."""
    body = await collect(request.stream(), limit)
    try:
        return from_json(body, kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInput(f"the body of {request.method} {request.url.path} is wrong: {error}") from None


class Json(Response):
    """A JSON answer; takes structs, dataclasses and plain values."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)
