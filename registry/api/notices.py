"""Deprecating and retiring repositories and commits."""

from __future__ import annotations

import asyncio
from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from helios.errors import InvalidInput
from helios.names import is_commit
from registry.api.support import Json, governed, parameter, read_json, repository, services
from registry.metadata.notices import WHOLE, Notice, check


class PutNotice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of a repository (``commit`` None) or a commit; ``replacement`` says what to use instead."""

    repo: str
    state: Literal["deprecated", "retired"]
    message: str
    commit: str | None = None
    replacement: str | None = None
    author: str = ""


def routes() -> list[Route]:
    return [
        Route("/api/v1/notices", listing, methods=["GET"]),
        Route("/api/v1/notices", put, methods=["PUT"]),
        Route("/api/v1/notices", remove, methods=["DELETE"]),
    ]


async def listing(request: Request) -> Response:
    repo = await repository(request)
    return Json({"notices": await asyncio.to_thread(services(request).catalog.notices_on, repo)})


async def put(request: Request) -> Response:
    wanted = await read_json(request, PutNotice, 1 << 16)
    repo = governed(request, wanted.repo, "putting a notice up")
    commit = _commit(wanted.commit)
    notice = Notice(commit, wanted.state, wanted.message.strip(), wanted.replacement, wanted.author, 0)
    check(notice)
    await asyncio.to_thread(services(request).catalog.put_notice, repo, notice)
    return Json({})


async def remove(request: Request) -> Response:
    commit = _commit(request.query_params.get("commit"))
    repo = governed(request, parameter(request, "repo"), "taking a notice down")
    await asyncio.to_thread(services(request).catalog.remove_notice, repo, commit)
    return Json({})


def _commit(text: str | None) -> str:
    if text is None:
        return WHOLE
    if not is_commit(text):
        raise InvalidInput(f"{text[:80]!r} is not a commit: resolve a ref first")
    return text
