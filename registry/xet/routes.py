"""Xet's read calls as routes: access tokens, reconstructions, xorbs (docs/registry-xet.md)."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Final
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import Scope

from helios.errors import EntryNotFound, IntegrityError, NotFound
from helios.http.ranges import RangeError, parse_range
from helios.http.server import FilePartsResponse
from helios.metrics import RegistryMetrics
from helios.names import RepoId
from heliosfs.store.placement import PlacedBlob
from registry.counted import Counted
from registry.hub.answers import absolute
from registry.hub.verified import VerifiedReader, Wanted
from registry.xet.frames import frames
from registry.xet.hashes import to_text
from registry.xet.layout import Layout, Reconstruction
from registry.xet.layouts import Layouts, check_hash
from registry.xet.tokens import ReadGrant, Signer, XorbGrant

log = logging.getLogger("helios.registry.xet")

CAS: Final = "/xet"
"""Where the service is, below the prefix: clients put ``/v1/reconstructions/…`` behind it."""
TOKEN_S: Final = 3600
"""How long an access token, and the address of a xorb, are good for, in seconds."""

Json = dict[str, Any]


class XetService:
    """What the routes and the Hub's answers need of Xet."""

    def __init__(self, layouts: Layouts, signer: Signer, reader: VerifiedReader, metrics: RegistryMetrics) -> None:
        self.layouts, self._signer, self._reader, self._metrics = layouts, signer, reader, metrics

    def routes(self) -> list[BaseRoute]:
        """All but the token's route, which is one of the Hub's."""
        return [
            Route(CAS + "/v1/reconstructions/{file}", self._reconstruction, methods=["GET"]),
            Route(CAS + "/v2/reconstructions/{file}", self._reconstruction_2, methods=["GET"]),
            Route(CAS + "/v1/xorbs/{xorb}", self._xorb, methods=["GET"]),
            Route(CAS + "/v1/telemetry", self._telemetry, methods=["POST"]),
        ]

    def links(self, scope: Scope, repo: RepoId, revision: str, file: str) -> list[tuple[str, str]]:
        """Headers that tell a client to get a file over Xet, and where the token for it is."""
        path = f"/api/{repo.kind}/{quote(repo.id)}/xet-read-token/{quote(revision, safe='')}"
        return [("x-xet-hash", file), ("link", f'<{absolute(scope, path)}>; rel="xet-auth"')]

    def token(self, scope: Scope, repo: RepoId) -> Response:
        """An access token for a repository's files."""
        ends = self._ends()
        text, url = self._signer.sign(ReadGrant(str(repo), ends)), absolute(scope, CAS)
        headers = {
            "x-xet-cas-url": url,
            "x-xet-access-token": text,
            "x-xet-token-expiration": str(ends),
            "cache-control": "no-store",
        }
        return JSONResponse({"casUrl": url, "accessToken": text, "exp": ends}, headers=headers)

    async def _reconstruction(self, request: Request) -> Response:
        """``fetch_info``: an address and a range of bytes for every range of chunks."""
        found = await self._reconstruct(request)
        if isinstance(found, Response):
            return found
        repo, layout, plan = found

        def fetch(number: int) -> list[Json]:
            url = self._url(request.scope, repo, layout, number)
            return [
                {"range": _chunks(first, stop), "url": url, "url_range": _bytes(layout, number, first, stop)}
                for first, stop in plan.fetch[number]
            ]

        return _answer(layout, plan, "fetch_info", fetch)

    async def _reconstruction_2(self, request: Request) -> Response:
        """``xorbs``: the same, and each range is asked for on its own, although one address may have several."""
        found = await self._reconstruct(request)
        if isinstance(found, Response):
            return found
        repo, layout, plan = found

        def fetch(number: int) -> list[Json]:
            url = self._url(request.scope, repo, layout, number)
            return [
                {
                    "url": url,
                    "ranges": [{"chunks": _chunks(first, stop), "bytes": _bytes(layout, number, first, stop)}],
                }
                for first, stop in plan.fetch[number]
            ]

        return _answer(layout, plan, "xorbs", fetch)

    async def _reconstruct(self, request: Request) -> tuple[RepoId, Layout, Reconstruction] | Response:
        file = check_hash(request.path_params["file"])
        scheme, _, text = request.headers.get("authorization", "").partition(" ")
        grant = self._signer.check(text.strip() if scheme.lower() == "bearer" else None, ReadGrant)
        repo = RepoId.from_canonical(grant.repo)
        layout = await asyncio.to_thread(self.layouts.find, repo, file)
        try:
            span = parse_range(request.headers.get("range"), layout.size) or range(layout.size)
        except RangeError:
            return Response(status_code=416, headers={"content-range": f"bytes */{layout.size}"})
        return repo, layout, layout.reconstruct(span.start, span.stop)

    async def _xorb(self, request: Request) -> Response:
        """Bytes of a xorb; the address says whose, clients send no token."""
        name = check_hash(request.path_params["xorb"])
        grant = self._signer.check(request.query_params.get("grant"), XorbGrant)
        repo = RepoId.from_canonical(grant.repo)
        try:
            placed, layout = await asyncio.to_thread(self._find, repo, grant.blob)
        except NotFound as error:
            if type(error) is NotFound:  # not a repository or a blob, but an object that should be there
                raise IntegrityError(f"the registry's store has a gap: {error.message}") from None
            raise
        if grant.xorb >= len(layout.xorbs) or to_text(layout.xorbs[grant.xorb].digest) != name:
            raise EntryNotFound(f"blob {grant.blob} has no xorb {name}")
        xorb = layout.xorbs[grant.xorb]
        size = xorb.position(len(xorb))
        headers = [("content-type", "application/octet-stream"), ("accept-ranges", "bytes")]
        try:
            span = parse_range(request.headers.get("range"), size)
        except RangeError:
            return Response(status_code=416, headers={"content-range": f"bytes */{size}"})
        if span is not None:
            headers.append(("content-range", f"bytes {span.start}-{span.stop - 1}/{size}"))
        wanted = Wanted(str(repo), "", f"xorb {name}")
        start, stop = (span.start, span.stop) if span is not None else (0, size)
        parts = frames(self._reader, placed, xorb, start, stop, wanted)
        response = FilePartsResponse(parts, stop - start, 200 if span is None else 206, headers)
        return Counted(response, self._metrics.sent_bytes, self._metrics.xorb_bytes)

    def _find(self, repo: RepoId, blob: str) -> tuple[PlacedBlob, Layout]:
        return self.layouts.catalog.placed(repo, blob), self.layouts.of(blob)

    async def _telemetry(self, _request: Request) -> Response:
        """What clients say of their transfers; nobody here wants it."""
        return Response(status_code=204)

    def _url(self, scope: Scope, repo: RepoId, layout: Layout, number: int) -> str:
        grant = self._signer.sign(XorbGrant(str(repo), self._ends(), layout.blob, number))
        return absolute(scope, f"{CAS}/v1/xorbs/{to_text(layout.xorbs[number].digest)}?grant={grant}")

    def _ends(self) -> int:
        return int(self._signer.clock()) + TOKEN_S


def _answer(layout: Layout, plan: Reconstruction, name: str, fetch: Any) -> Response:
    names = {number: to_text(layout.xorbs[number].digest) for number in plan.fetch}
    terms = [
        {"hash": names[part.xorb], "unpacked_length": part.length, "range": _chunks(part.first, part.stop)}
        for part in plan.parts
    ]
    body = {
        "offset_into_first_range": plan.skip,
        "terms": terms,
        name: {names[number]: fetch(number) for number in plan.fetch},
    }
    return JSONResponse(body, headers={"cache-control": "no-store"})


def _chunks(first: int, stop: int) -> Json:
    return {"start": first, "end": stop}


def _bytes(layout: Layout, number: int, first: int, stop: int) -> Json:
    """The bytes of a range of chunks, the last one included, as clients put it into a Range header."""
    xorb = layout.xorbs[number]
    return {"start": xorb.position(first), "end": xorb.position(stop) - 1}
