"""Replication and bundles as routes (docs/native-api.md)."""

from __future__ import annotations

import asyncio

import msgspec
from starlette.concurrency import iterate_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from helios.errors import IntegrityError, InvalidInput
from helios.names import RepoId, check_revision
from registry.api.support import Json, administration, read_json, readable, services
from registry.api.watching import watching
from registry.ingest import Source
from registry.receiver import Receiver
from registry.transfer import bundle
from registry.transfer.replications import Replications

MAX_REVISIONS = 1000


class StartReplication(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """From which peer, and which repositories (patterns of ids; None: those of the configuration)."""

    peer: str
    repos: list[str] | None = None


def routes(replications: Replications, receiver: Receiver) -> list[Route]:
    """``receiver`` takes the bundles that are sent, and ends with the server."""

    async def replicate(request: Request) -> Response:
        administration(request, "replicating")
        wanted = await read_json(request, StartReplication)
        return watching(await asyncio.to_thread(replications.start, wanted.peer, wanted.repos))

    async def load(request: Request) -> Response:
        """Bring a bundle in: the body."""
        administration(request, "importing a bundle")
        length = request.headers.get("content-length", "")
        if not length.isascii() or not length.isdigit() or len(length) > 18:
            raise InvalidInput("a bundle is sent with its Content-Length")
        parts = services(request)

        def bring(source: Source) -> bundle.Imported:
            try:
                return bundle.load(parts.catalog, parts.sessions, _Body(source))
            except IntegrityError as error:  # not our store's fault, but that of who sent it
                raise InvalidInput(error.message, hint=error.hint) from None

        return Json(await receiver.receive(int(length), "the bundle", request.stream(), bring))

    return [
        Route("/api/v1/replications", replicate, methods=["POST"]),
        Route("/api/v1/bundles", export, methods=["GET"]),
        Route("/api/v1/bundles", load, methods=["POST"]),
    ]


async def export(request: Request) -> Response:
    """Revisions as one file; ``rev`` and ``have`` are ``models/org/name@revision``, as often as needed."""
    wanted, have = await _revisions(request, "rev"), await _revisions(request, "have")
    if not wanted and not have:
        raise InvalidInput("a bundle needs at least one rev=models/org/name@revision, or have= for notices alone")
    content = await services(request).long(bundle.export, services(request).catalog, wanted, have)
    headers = {"content-disposition": 'attachment; filename="helios-bundle.tar"', "cache-control": "no-store"}
    return StreamingResponse(iterate_in_threadpool(content), media_type="application/x-tar", headers=headers)


class _Body:
    """A body as what a bundle is read from."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def read(self, count: int, /) -> bytes:
        buffer = bytearray(min(count, 1 << 20))
        return bytes(buffer[: self._source.readinto(memoryview(buffer))]) if buffer else b""


async def _revisions(request: Request, name: str) -> list[tuple[RepoId, str]]:
    texts = request.query_params.getlist(name)
    if len(texts) > MAX_REVISIONS:
        raise InvalidInput(f"a bundle of {len(texts)} revisions is more than {MAX_REVISIONS}")
    out = []
    for text in texts:
        repo, at, rev = text.partition("@")
        if not at:
            raise InvalidInput(f"{name}={text[:200]!r} names no revision: write models/org/name@main")
        out.append((await readable(request, repo), check_revision(rev)))
    return out
