"""Files that are kept back, and who signed what; see registry/admission."""

from __future__ import annotations

import asyncio
import re

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from helios.errors import InvalidInput
from helios.names import is_commit
from registry.api.support import Json, administration, listed, parameter, read_json, readable, repository, services

MAX_BY = 256
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")


class Release(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to let go, and who says so."""

    repo: str
    sha256: str
    by: str


def routes() -> list[Route]:
    return [
        Route("/api/v1/quarantine", listing, methods=["GET"]),
        Route("/api/v1/quarantine/release", release, methods=["POST"]),
        Route("/api/v1/signature", signature, methods=["GET"]),
    ]


async def listing(request: Request) -> Response:
    repo = await repository(request) if "repo" in request.query_params else None
    seen = await listed(request)
    released = request.query_params.get("released", "false")
    if released not in ("true", "false"):
        raise InvalidInput(f"released={released[:40]!r} is neither true nor false")
    found = await asyncio.to_thread(services(request).catalog.kept, repo, released=released == "true")
    return Json({"files": [file for file in found if repo is not None or seen.shows(file.repo)]})


async def release(request: Request) -> Response:
    administration(request, "releasing a file")
    wanted = await read_json(request, Release, 1 << 16)
    if not _SHA256.match(wanted.sha256):
        raise InvalidInput(f"{wanted.sha256[:80]!r} is not a sha256: 64 lower-case hexadecimal digits")
    if not 0 < len(wanted.by) <= MAX_BY:
        raise InvalidInput(f"by= says who lets the file go, in 1 to {MAX_BY} characters")
    repo = await readable(request, wanted.repo)
    await asyncio.to_thread(services(request).catalog.release, repo, wanted.sha256, wanted.by)
    return Json({})


async def signature(request: Request) -> Response:
    commit = parameter(request, "commit")
    if not is_commit(commit):
        raise InvalidInput(f"{commit[:80]!r} is not a commit: resolve a ref first")
    catalog, repo = services(request).catalog, await repository(request)
    await asyncio.to_thread(catalog.resolve, repo, commit)
    return Json({"signer": await asyncio.to_thread(catalog.signer, repo, commit)})
