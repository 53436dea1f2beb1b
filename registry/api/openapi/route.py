"""``GET /openapi.json``."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route


def routes() -> list[Route]:
    made: list[bytes] = []
    lock = asyncio.Lock()

    async def document(request: Request) -> Response:
        async with lock:
            if not made:
                made.append(await asyncio.to_thread(_make, request.app.routes))
        return Response(made[0], media_type="application/json")

    return [Route("/openapi.json", document, methods=["GET"])]


def _make(served: Sequence[BaseRoute]) -> bytes:
    from registry.api.openapi.document import document

    return msgspec.json.format(msgspec.json.encode(document(served)), indent=1)
