"""Quotas and priority classes."""

from __future__ import annotations

import asyncio
from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from helios.errors import InvalidInput
from registry.api.support import Json, access, governed, listed, parameter, read_json, services
from registry.quotas.quotas import Quota

MAX_AUTHOR = 256
WHAT = "saying how much a model matters"


class PutPriority(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The class of a repository (``ref`` None), or of one of its refs."""

    repo: str
    priority: Literal["critical", "normal", "scratch"]
    ref: str | None = None
    author: str = ""


def routes() -> list[Route]:
    return [
        Route("/api/v1/quotas", quotas, methods=["GET"]),
        Route("/api/v1/priorities", priorities, methods=["GET"]),
        Route("/api/v1/priorities", put, methods=["PUT"]),
        Route("/api/v1/priorities", remove, methods=["DELETE"]),
    ]


async def quotas(request: Request) -> Response:
    """All; for who sees not everything, those of what he owns."""
    seen, who = await listed(request), access(request)

    def shown(quota: Quota) -> bool:
        return seen.all or (who.tenant is not None and set(quota.patterns) <= set(who.owns))

    return Json({"quotas": await asyncio.to_thread(services(request).catalog.quotas.states, shown)})


async def priorities(request: Request) -> Response:
    seen = await listed(request)
    found = await asyncio.to_thread(services(request).catalog.priorities.all)
    rows = [msgspec.to_builtins(given) | {"ref": given.ref or None} for given in found if seen.shows(given.repo)]
    return Json({"priorities": rows})


async def put(request: Request) -> Response:
    wanted = await read_json(request, PutPriority, 1 << 16)
    if len(wanted.author) > MAX_AUTHOR or not (wanted.author + "x").isprintable():
        raise InvalidInput(f"author= says who gives the class, in at most {MAX_AUTHOR} printable characters")
    repo = governed(request, wanted.repo, WHAT)
    author = access(request).label or wanted.author
    given = services(request).catalog.priorities
    await asyncio.to_thread(given.put, repo, wanted.ref, wanted.priority, author)
    return Json({})


async def remove(request: Request) -> Response:
    repo, ref = governed(request, parameter(request, "repo"), WHAT), request.query_params.get("ref")
    await asyncio.to_thread(services(request).catalog.priorities.remove, repo, ref)
    return Json({})
