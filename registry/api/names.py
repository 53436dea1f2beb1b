"""Repositories, refs, commits: the mutable names."""

from __future__ import annotations

import asyncio
from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from helios.errors import InvalidInput
from helios.names import is_commit
from registry.api.support import Json, parameter, read_json, repository, services

MAX_HISTORY = 1000


class MoveRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where to move a ref, where it must be now (None: nowhere), and what a new one becomes."""

    commit: str
    expect: str | None
    author: str = ""
    kind: Literal["branch", "tag", "alias"] = "branch"


def routes() -> list[BaseRoute]:
    return [
        Route("/api/v1/repos", repos, methods=["GET"]),
        Route("/api/v1/repos", remove, methods=["DELETE"]),
        Route("/api/v1/refs", refs, methods=["GET"]),
        Route("/api/v1/refs", move, methods=["PUT"]),
        Route("/api/v1/refs/history", history, methods=["GET"]),
        Route("/api/v1/resolve", resolve, methods=["GET"]),
        Route("/api/v1/commits", commits, methods=["GET"]),
        Route("/api/v1/usage", usage, methods=["GET"]),
    ]


async def repos(request: Request) -> Response:
    found = await asyncio.to_thread(services(request).catalog.repos)
    listed = [{"repo": str(r.repo), "refs": r.refs, "bytes": r.bytes, "updated": r.updated} for r in found]
    return Json({"repos": listed})


async def remove(request: Request) -> Response:
    catalog, repo = services(request).catalog, repository(request)
    if "ref" in request.query_params:
        await asyncio.to_thread(catalog.delete_ref, repo, parameter(request, "ref"))
    else:
        await asyncio.to_thread(catalog.delete_repo, repo)
    return Json({})


async def refs(request: Request) -> Response:
    catalog, repo = services(request).catalog, repository(request)
    found = await asyncio.to_thread(catalog.refs, repo)
    return Json({"refs": found, "kinds": await asyncio.to_thread(catalog.ref_kinds, repo)})


async def history(request: Request) -> Response:
    """Who moved which ref when; also of a repository that is gone."""
    ref = request.query_params.get("ref")
    limit = _limit(request)
    moves = await asyncio.to_thread(services(request).catalog.ref_history, repository(request), ref, limit)
    return Json({"moves": moves})


async def move(request: Request) -> Response:
    catalog, repo, ref = services(request).catalog, repository(request), parameter(request, "ref")
    wanted = await read_json(request, MoveRef)
    if not is_commit(wanted.commit):
        raise InvalidInput(f"{wanted.commit[:80]!r} is not a commit: 40 lower-case hexadecimal digits")
    await asyncio.to_thread(
        catalog.set_ref, repo, ref, wanted.commit, wanted.expect, author=wanted.author, kind=wanted.kind
    )
    return Json({"commit": wanted.commit})


async def resolve(request: Request) -> Response:
    found = await asyncio.to_thread(services(request).catalog.resolve, repository(request), parameter(request, "rev"))
    return Json({"commit": found.commit, "manifest": found.manifest_digest})


async def commits(request: Request) -> Response:
    limit = _limit(request)
    catalog, repo, rev = services(request).catalog, repository(request), parameter(request, "rev")
    return Json({"commits": await asyncio.to_thread(catalog.history, repo, rev, limit)})


async def usage(request: Request) -> Response:
    catalog = services(request).catalog
    repo = repository(request) if "repo" in request.query_params else None
    total = await asyncio.to_thread(catalog.usage, repo)
    if request.query_params.get("all") != "true":
        return Json(total)
    shares, unheld = await asyncio.to_thread(catalog.shares)
    models = [
        {"repo": s.repo, "logical": s.logical, "unique": s.unique, "stored": round(s.stored)}
        for s in shares
        if repo is None or s.repo == str(repo)
    ]
    return Json({"total": total, "repos": models, "unheld": round(unheld)})


def _limit(request: Request) -> int:
    text = request.query_params.get("limit", "50")
    if not text.isascii() or not text.isdigit() or len(text) > 9 or not 0 < int(text) <= MAX_HISTORY:
        raise InvalidInput(f"limit={text[:40]!r} is not a number from 1 to {MAX_HISTORY}")
    return int(text)
