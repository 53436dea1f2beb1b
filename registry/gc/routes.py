"""Garbage collection, leases, verification and compression as routes (docs/native-api.md)."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from helios.errors import InvalidInput
from helios.names import RepoId, is_commit
from heliosfs.store.keys import check_domain
from registry.api.support import Json, access, administration, listed, read_json, readable
from registry.api.watching import watching
from registry.gc.jobs import Jobs
from registry.gc.leases import Leases
from registry.hub.paths import TENANTS


class Collect(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whether only to say what would go."""

    dry_run: bool = False


class Lease(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who uses which commit, and for how long from now on (0: no longer)."""

    holder: str
    repo: str
    commit: str
    seconds: float


class RemoveDomain(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The domain that goes."""

    domain: str


class Verify(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to look at (None: everything), which share of it, and whether to repair what is found."""

    repo: str | None = None
    sample: float = 1.0
    repair: bool = False


class Compress(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to compress (None: all models'), that nobody has read for so long (None: as is set); or only say so."""

    repo: str | None = None
    unread_s: float | None = None
    dry_run: bool = False


def routes(jobs: Jobs, leases: Leases) -> list[Route]:
    async def collect(request: Request) -> Response:
        administration(request, "collecting garbage")
        wanted = await read_json(request, Collect)
        return watching(jobs.collect(dry_run=wanted.dry_run))

    async def verify(request: Request) -> Response:
        administration(request, "verifying the store")
        wanted = await read_json(request, Verify)
        repo = None if wanted.repo is None else RepoId.from_canonical(wanted.repo)
        return watching(jobs.verify(repo, wanted.sample, repair=wanted.repair))

    async def domains(request: Request) -> Response:
        administration(request, "listing domains")
        found = await asyncio.to_thread(jobs.domains)
        return Json({"domains": [asdict(usage) | {"tenants": tenants} for usage, tenants in found]})

    async def remove_domain(request: Request) -> Response:
        administration(request, "removing a domain")
        wanted = await read_json(request, RemoveDomain)
        return watching(jobs.remove_domain(check_domain(wanted.domain)))

    async def compress(request: Request) -> Response:
        administration(request, "compressing")
        wanted = await read_json(request, Compress)
        repo = None if wanted.repo is None else RepoId.from_canonical(wanted.repo)
        return watching(jobs.compress(repo, wanted.unread_s, dry_run=wanted.dry_run))

    async def pin(request: Request) -> Response:
        wanted = await read_json(request, Lease)
        if not is_commit(wanted.commit):
            raise InvalidInput(f"{wanted.commit[:80]!r} is not a commit: 40 lower-case hexadecimal digits")
        repo, tenant = await readable(request, wanted.repo), access(request).tenant
        # What one tenant calls itself is no other's lease.
        holder = wanted.holder if tenant is None else f"{TENANTS}/{tenant}/{wanted.holder}"
        until = await asyncio.to_thread(leases.pin, holder, repo, wanted.commit, wanted.seconds)
        return Json({"expires": until})

    async def pinned(request: Request) -> Response:
        seen = await listed(request)
        found = await asyncio.to_thread(leases.all)
        return Json({"leases": [lease for lease in found if seen.shows(lease.repo)]})

    return [
        Route("/api/v1/gc", collect, methods=["POST"]),
        Route("/api/v1/verify", verify, methods=["POST"]),
        Route("/api/v1/domains", domains, methods=["GET"]),
        Route("/api/v1/domains/remove", remove_domain, methods=["POST"]),
        Route("/api/v1/compress", compress, methods=["POST"]),
        Route("/api/v1/leases", pin, methods=["PUT"]),
        Route("/api/v1/leases", pinned, methods=["GET"]),
    ]
