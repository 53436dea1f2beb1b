"""Deprecating and retiring repositories and commits."""

from __future__ import annotations

import asyncio
from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from helios.errors import InvalidInput
from helios.names import RepoId, is_commit
from registry.api.support import Json, read_json, repository, services
from registry.metadata.notices import WHOLE, Notice

MAX_TEXT = 1000


class PutNotice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of a repository (``commit`` None) or a commit; ``replacement`` says what to use instead."""

    repo: str
    state: Literal["deprecated", "retired"]
    message: str
    commit: str | None = None
    replacement: str | None = None
    author: str = ""


def routes() -> list[BaseRoute]:
    return [
        Route("/api/v1/notices", listing, methods=["GET"]),
        Route("/api/v1/notices", put, methods=["PUT"]),
        Route("/api/v1/notices", remove, methods=["DELETE"]),
    ]


async def listing(request: Request) -> Response:
    return Json({"notices": await asyncio.to_thread(services(request).catalog.notices_on, repository(request))})


async def put(request: Request) -> Response:
    wanted = await read_json(request, PutNotice, 1 << 16)
    texts = (wanted.message, wanted.replacement or "", wanted.author)
    if not wanted.message.strip() or max(map(len, texts)) > MAX_TEXT or any("\n" in text for text in texts):
        raise InvalidInput(f"a notice has a message, and each text one line of at most {MAX_TEXT} characters")
    commit = _commit(wanted.commit)
    notice = Notice(commit, wanted.state, wanted.message.strip(), wanted.replacement, wanted.author, 0)
    await asyncio.to_thread(services(request).catalog.put_notice, RepoId.from_canonical(wanted.repo), notice)
    return Json({})


async def remove(request: Request) -> Response:
    commit = _commit(request.query_params.get("commit"))
    await asyncio.to_thread(services(request).catalog.remove_notice, repository(request), commit)
    return Json({})


def _commit(text: str | None) -> str:
    if text is None:
        return WHOLE
    if not is_commit(text):
        raise InvalidInput(f"{text[:80]!r} is not a commit: resolve a ref first")
    return text
