"""``POST /api/v1/pulls``: starts or joins a pull and streams what happens as NDJSON (docs/native-api.md)."""

from __future__ import annotations

import asyncio

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from helios.names import check_revision
from registry.api.support import administration, read_json, writable
from registry.api.watching import watching
from registry.pull.pulls import Pulls


class PullRequest(msgspec.Struct, forbid_unknown_fields=True):
    """``repo`` in its canonical form, ``models/org/name``; ``rev`` a branch, tag or commit."""

    repo: str
    rev: str = "main"


def routes(pulls: Pulls) -> list[Route]:
    async def start(request: Request) -> Response:
        # What is pulled is asked for with the registry's own token, and everybody may read it then.
        administration(request, "pulling with the registry's token")
        wanted = await read_json(request, PullRequest)
        repo, revision = writable(request, wanted.repo), check_revision(wanted.rev)
        pull = await asyncio.to_thread(pulls.start, repo, revision)
        return watching(pull)

    return [Route("/api/v1/pulls", start, methods=["POST"])]
