"""``POST /api/v1/pulls``: starts or joins a pull and streams what happens as NDJSON (docs/native-api.md)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from helios.names import RepoId, check_revision
from registry.api.support import read_json
from registry.pull.pulls import Pull, Pulls

HEARTBEAT_S: Final = 5.0
"""Longest silence on the stream, in seconds: readers take a longer one for a dead registry."""
COALESCE_S: Final = 0.1
"""Figures change with every block; they are sent this often."""


class PullRequest(msgspec.Struct, forbid_unknown_fields=True):
    """``repo`` in its canonical form, ``models/org/name``; ``rev`` a branch, tag or commit."""

    repo: str
    rev: str = "main"


def routes(pulls: Pulls) -> list[BaseRoute]:
    async def start(request: Request) -> Response:
        wanted = await read_json(request, PullRequest)
        repo, revision = RepoId.from_canonical(wanted.repo), check_revision(wanted.rev)
        pull = await asyncio.to_thread(pulls.start, repo, revision)
        return StreamingResponse(_lines(pull), media_type="application/x-ndjson", headers={"cache-control": "no-store"})

    return [Route("/api/v1/pulls", start, methods=["POST"])]


async def _lines(pull: Pull) -> AsyncIterator[bytes]:
    async for event in events(pull):
        yield msgspec.json.encode(event) + b"\n"


async def events(pull: Pull) -> AsyncIterator[dict[str, Any]]:
    """What happened so far and what happens until the end; the last event is ``done`` or ``error``."""
    loop = asyncio.get_running_loop()
    changed = asyncio.Event()

    def wake() -> None:
        with contextlib.suppress(RuntimeError):  # the loop has closed: the registry stops, and nobody watches any more
            loop.call_soon_threadsafe(changed.set)

    turn = 0
    stop = pull.progress.listen(wake)
    try:
        while True:
            changed.clear()
            finished = pull.finished.is_set()  # looked at before the events, so that none is missed
            news, turn = pull.progress.since(turn)
            for event in news:
                yield event
            if finished:
                yield _outcome(pull)
                return
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    await changed.wait()
            except TimeoutError:
                yield pull.progress.unfinished() or {"event": "log", "message": "waiting for the upstream"}
            else:
                await asyncio.sleep(COALESCE_S)
    finally:
        stop()


def _outcome(pull: Pull) -> dict[str, Any]:
    if pull.error is not None:
        error = {"code": pull.error.code, "message": pull.error.message, "hint": pull.error.hint}
        return {"event": "error", "error": error}
    return {"event": "done", "commit": pull.commit}
