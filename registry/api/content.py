"""Manifests, recipes, placements and objects: the immutable content."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from helios.errors import InvalidInput, NotFound
from helios.http.ranges import RangeError, parse_range
from helios.http.server import FileRangeResponse
from helios.names import RepoId, is_commit
from heliosfs.store.keys import check_key
from heliosfs.store.placement import PlacedBlob
from registry.api.support import access, parameter, repository, services
from registry.counted import Counted
from registry.healing import heal_chunk
from registry.seals import PARAMETER
from registry.services import Services
from registry.stored import StoredRangeResponse

OCTETS = "application/octet-stream"
CHUNK_KINDS = ("blobs", "packs")
"""Kinds of objects that hold chunks; only these are sent by their key."""
MEND_S = 5.0
"""How long a node that doubts a chunk waits for its repair, in seconds."""
FOREVER = "max-age=31536000, immutable"
PRIVATE = {"cache-control": "no-store"}
"""For answers with signed addresses."""


def routes() -> list[Route]:
    return [
        Route("/api/v1/manifest", manifest, methods=["GET"]),
        Route("/api/v1/recipe", recipe, methods=["GET"]),
        Route("/api/v1/placements", placements, methods=["GET"]),
        Route("/api/v1/content", content, methods=["GET"]),
        Route("/api/v1/objects/{key:path}", objects, methods=["GET"]),
    ]


async def manifest(request: Request) -> Response:
    commit = _commit(request)
    catalog, repo = services(request).catalog, await repository(request)
    data = await asyncio.to_thread(catalog.contents.manifest_bytes, repo, commit)
    digest = (await asyncio.to_thread(catalog.resolve, repo, commit)).manifest_digest
    kept = await asyncio.to_thread(_forever, services(request))
    return Response(data, media_type=OCTETS, headers={"x-helios-digest": digest, "cache-control": kept})


async def recipe(request: Request) -> Response:
    catalog, repo = services(request).catalog, await repository(request)
    data = await asyncio.to_thread(catalog.contents.recipe_bytes, repo, parameter(request, "blob"))
    kept = await asyncio.to_thread(_forever, services(request))
    return Response(data, media_type=OCTETS, headers={"cache-control": kept})


async def placements(request: Request) -> Response:
    parts, repo = services(request), await repository(request)
    placed = await asyncio.to_thread(parts.catalog.contents.placed, repo, parameter(request, "blob"))
    if "doubt" in request.query_params:
        number = _chunk(parameter(request, "doubt"), len(placed.recipe))
        if not await parts.long(heal_chunk, parts.store, placed, number):
            parts.metrics.verify_failures.inc()
            placed = await _mended(parts, repo, placed, number)
    placement = await asyncio.to_thread(parts.addresses.placement, placed.placement)
    return Response(placement.encode(), media_type="application/json", headers=PRIVATE)


async def content(request: Request) -> Response:
    """Recipes and placements of a commit's largest blobs."""
    parts, repo = services(request), await repository(request)
    found = await asyncio.to_thread(parts.catalog.contents.commit_content, repo, _commit(request))
    found = await asyncio.to_thread(parts.addresses.content, found)
    return Response(await asyncio.to_thread(found.encode), media_type="application/json", headers=PRIVATE)


async def _mended(parts: Services, repo: RepoId, placed: PlacedBlob, number: int) -> PlacedBlob:
    """Where the chunk lies once it was repaired, if that takes no longer than a node waits for such an answer."""
    mending = parts.mender.mend(placed, number)
    if mending is None:
        return placed
    await asyncio.wait([asyncio.wrap_future(mending.first)], timeout=MEND_S)
    return await asyncio.to_thread(parts.catalog.contents.placed, repo, placed.recipe.blob)


def _chunk(text: str, chunks: int) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9 or int(text) >= chunks:
        raise InvalidInput(f"doubt={text[:40]!r} is not a chunk of this blob, which has {chunks}")
    return int(text)


def _commit(request: Request) -> str:
    commit = parameter(request, "commit")
    if not is_commit(commit):
        raise InvalidInput(f"{commit[:80]!r} is not a commit: resolve a ref first")
    return commit


def _forever(parts: Services) -> str:
    """Immutable answers are kept by whoever asked and, where everybody may read everything, by caches between."""
    return f"{'private' if parts.seals.needed() else 'public'}, {FOREVER}"


def _look(parts: Services, key: str, seal: str | None) -> tuple[int, str]:
    """The size of an object that the caller may have (``seal`` None: without one), and how long it may be kept."""
    if seal is not None:
        parts.seals.check(key, seal)
    return parts.store.info(key).size, _forever(parts)


async def objects(request: Request) -> Response:
    """An object, or one range of it (RFC 9110, 14): several ranges are answered with the whole, as it allows."""
    parts, key = services(request), request.path_params["key"]
    if check_key(key).split("/")[1] not in CHUNK_KINDS:
        raise NotFound(f"{key} holds no chunks: ask for manifests and recipes by their names")
    seal = request.query_params.get(PARAMETER)
    if seal is None and not access(request).trusted:
        seal = ""
    size, kept = await asyncio.to_thread(_look, parts, key, seal)
    etag = f'"{key.rpartition("/")[2]}"'
    headers = [("content-type", OCTETS), ("accept-ranges", "bytes"), ("etag", etag), ("cache-control", kept)]
    wanted = request.headers.get("range")
    if request.headers.get("if-range") not in (None, etag):
        wanted = None
    try:
        span = parse_range(wanted, size)
    except RangeError:
        return Response(status_code=416, headers={"content-range": f"bytes */{size}"})
    status, span = (200, range(size)) if span is None else (206, span)
    if status == 206:
        headers.append(("content-range", f"bytes {span.start}-{span.stop - 1}/{size}"))
    file = await asyncio.to_thread(parts.store.open_local, key)
    if file is None:
        response = StoredRangeResponse(parts.pieces, parts.store, key, span.start, len(span), status, headers)
        return Counted(response, parts.metrics.sent_bytes)
    return Counted(FileRangeResponse(file, span.start, len(span), status, headers), parts.metrics.sent_bytes)
