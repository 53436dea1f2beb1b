"""Manifests, recipes, placements and objects: the immutable content."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from helios.errors import InvalidInput, NotFound
from helios.http.ranges import RangeError, parse_range
from helios.http.server import FileRangeResponse
from helios.names import is_commit
from heliosfs.store.keys import check_key
from registry.api.support import parameter, repository, services
from registry.counted import Counted

OCTETS = "application/octet-stream"
CHUNK_KINDS = ("blobs", "packs")
"""Kinds of objects that hold chunks; only these are sent by their key."""
FOREVER = "public, max-age=31536000, immutable"


def routes() -> list[BaseRoute]:
    return [
        Route("/api/v1/manifest", manifest, methods=["GET"]),
        Route("/api/v1/recipe", recipe, methods=["GET"]),
        Route("/api/v1/placements", placements, methods=["GET"]),
        Route("/api/v1/content", content, methods=["GET"]),
        Route("/api/v1/objects/{key:path}", objects, methods=["GET"]),
    ]


async def manifest(request: Request) -> Response:
    commit = _commit(request)
    catalog, repo = services(request).catalog, repository(request)
    data = await asyncio.to_thread(catalog.manifest_bytes, repo, commit)
    digest = (await asyncio.to_thread(catalog.resolve, repo, commit)).manifest_digest
    return Response(data, media_type=OCTETS, headers={"x-helios-digest": digest, "cache-control": FOREVER})


async def recipe(request: Request) -> Response:
    catalog, repo = services(request).catalog, repository(request)
    data = await asyncio.to_thread(catalog.recipe_bytes, repo, parameter(request, "blob"))
    return Response(data, media_type=OCTETS, headers={"cache-control": FOREVER})


async def placements(request: Request) -> Response:
    catalog, repo = services(request).catalog, repository(request)
    placement = await asyncio.to_thread(catalog.placement, repo, parameter(request, "blob"))
    return Response(placement.encode(), media_type="application/json")


async def content(request: Request) -> Response:
    """Recipes and placements of a commit's largest blobs."""
    catalog, repo = services(request).catalog, repository(request)
    found = await asyncio.to_thread(catalog.commit_content, repo, _commit(request))
    return Response(await asyncio.to_thread(found.encode), media_type="application/json")


def _commit(request: Request) -> str:
    commit = parameter(request, "commit")
    if not is_commit(commit):
        raise InvalidInput(f"{commit[:80]!r} is not a commit: resolve a ref first")
    return commit


async def objects(request: Request) -> Response:
    """An object, or one range of it (RFC 9110, 14): several ranges are answered with the whole, as it allows."""
    parts, key = services(request), request.path_params["key"]
    if check_key(key).split("/")[1] not in CHUNK_KINDS:
        raise NotFound(f"{key} holds no chunks: ask for manifests and recipes by their names")
    file = await asyncio.to_thread(parts.store.open_local, key)
    if file is None:
        raise NotFound(f"the object store ({parts.store.describe()}) has no local files; ask it directly")
    try:
        size = (await asyncio.to_thread(parts.store.info, key)).size
        etag = f'"{key.rpartition("/")[2]}"'
        headers = [
            ("content-type", OCTETS), ("accept-ranges", "bytes"), ("etag", etag), ("cache-control", FOREVER),
        ]  # fmt: skip
        wanted = request.headers.get("range")
        if request.headers.get("if-range") not in (None, etag):
            wanted = None
        try:
            span = parse_range(wanted, size)
        except RangeError:
            file.close()
            return Response(status_code=416, headers={"content-range": f"bytes */{size}"})
        if span is None:
            response = FileRangeResponse(file, 0, size, 200, headers)
        else:
            headers.append(("content-range", f"bytes {span.start}-{span.stop - 1}/{size}"))
            response = FileRangeResponse(file, span.start, len(span), 206, headers)
    except BaseException:
        file.close()
        raise
    return Counted(response, parts.metrics.sent_bytes)
