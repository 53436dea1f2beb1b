"""Garbage collection, leases and verification as routes (docs/native-api.md)."""

from __future__ import annotations

import asyncio

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from helios.errors import InvalidInput
from helios.names import RepoId, is_commit
from registry.api.support import Json, read_json
from registry.api.watching import watching
from registry.gc.jobs import Jobs
from registry.gc.leases import Leases


class Collect(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whether only to say what would go."""

    dry_run: bool = False


class Lease(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who uses which commit, and for how long from now on (0: no longer)."""

    holder: str
    repo: str
    commit: str
    seconds: float


class Verify(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to look at (None: everything), which share of it, and whether to repair what is found."""

    repo: str | None = None
    sample: float = 1.0
    repair: bool = False


def routes(jobs: Jobs, leases: Leases) -> list[BaseRoute]:
    async def collect(request: Request) -> Response:
        wanted = await read_json(request, Collect)
        return watching(jobs.collect(dry_run=wanted.dry_run))

    async def verify(request: Request) -> Response:
        wanted = await read_json(request, Verify)
        repo = None if wanted.repo is None else RepoId.from_canonical(wanted.repo)
        return watching(jobs.verify(repo, wanted.sample, repair=wanted.repair))

    async def pin(request: Request) -> Response:
        wanted = await read_json(request, Lease)
        if not is_commit(wanted.commit):
            raise InvalidInput(f"{wanted.commit[:80]!r} is not a commit: 40 lower-case hexadecimal digits")
        repo = RepoId.from_canonical(wanted.repo)
        until = await asyncio.to_thread(leases.pin, wanted.holder, repo, wanted.commit, wanted.seconds)
        return Json({"expires": until})

    async def pinned(_request: Request) -> Response:
        return Json({"leases": await asyncio.to_thread(leases.all)})

    return [
        Route("/api/v1/gc", collect, methods=["POST"]),
        Route("/api/v1/verify", verify, methods=["POST"]),
        Route("/api/v1/leases", pin, methods=["PUT"]),
        Route("/api/v1/leases", pinned, methods=["GET"]),
    ]
