"""Liveness, readiness, metrics."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from helios.metrics import CONTENT_TYPE
from registry.api.support import services


def routes() -> list[Route]:
    return [Route("/healthz", healthz), Route("/readyz", readyz), Route("/metrics", metrics)]


async def healthz(_request: Request) -> Response:
    """The event loop answers."""
    return PlainTextResponse("ok\n")


async def readyz(request: Request) -> Response:
    """The metadata and the store answer."""
    parts = services(request)
    await asyncio.to_thread(parts.catalog.check)
    return PlainTextResponse("ok\n")


async def metrics(request: Request) -> Response:
    parts = services(request)
    parts.metrics.repositories.set(await asyncio.to_thread(parts.catalog.count))
    for quota in await asyncio.to_thread(parts.catalog.quotas.known):
        for state in ("limit", "used", "reserved"):
            for name in ("logical", "stored"):
                parts.metrics.quota_bytes.labels(quota.quota, name, state).set(getattr(getattr(quota, state), name))
    parts.metrics.store_problems.set(len(parts.store.problems()))
    return Response(parts.metrics.render(), media_type=CONTENT_TYPE)
