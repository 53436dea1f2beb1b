"""Xet's read calls as routes: access tokens, reconstructions, xorbs (docs/registry-xet.md)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Scope

from helios.errors import EntryNotFound, IntegrityError, InvalidInput, NotFound
from helios.http.ranges import RangeError, parse_range
from helios.http.server import FilePartsResponse
from helios.metrics import RegistryMetrics
from helios.names import RepoId
from heliosfs.store.placement import PlacedBlob
from registry.api.support import Json as JsonAnswer
from registry.counted import Counted
from registry.hub.answers import absolute
from registry.hub.verified import VerifiedReader, Wanted
from registry.usage.telling import Told, nobody
from registry.xet.frames import frames
from registry.xet.hashes import to_text
from registry.xet.layout import Layout
from registry.xet.layouts import Layouts, check_hash
from registry.xet.tokens import ReadGrant, Signer, XorbGrant

CAS: Final = "/xet"
"""Where the service is, below the prefix: clients put ``/v1/reconstructions/…`` behind it."""
TOKEN_S: Final = 3600
"""How long an access token, and the address of a xorb, are good for, in seconds."""
MAX_TERMS: Final = 1 << 18
"""Most terms in an answer, some 40 MB of JSON. Clients ask for 8 GB at most: 128 terms, or 61,000 of all zeros."""

Json = dict[str, Any]


class XetService:
    """What the routes and the Hub's answers need of Xet."""

    def __init__(
        self,
        layouts: Layouts,
        signer: Signer,
        reader: VerifiedReader,
        metrics: RegistryMetrics,
        told: Told = nobody,
    ) -> None:
        """``told`` hears of what clients are about to fetch."""
        self.layouts, self.signer, self._reader, self._metrics = layouts, signer, reader, metrics
        self._told = told

    def routes(self) -> list[Route]:
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

    def token(self, scope: Scope, repo: RepoId, commit: str) -> Response:
        """An access token for a repository's files; what is read with it counts as read of ``commit``."""
        ends = self._ends()
        text, url = self.signer.sign(ReadGrant(str(repo), ends, commit)), absolute(scope, CAS)
        headers = {
            "x-xet-cas-url": url,
            "x-xet-access-token": text,
            "x-xet-token-expiration": str(ends),
            "cache-control": "no-store",
        }
        return JsonAnswer({"casUrl": url, "accessToken": text, "exp": ends}, headers=headers)

    async def _reconstruction(self, request: Request) -> Response:
        """``fetch_info``: an address and a range of bytes for every range of chunks."""

        def entry(url: str, chunks: Json, bytes_: Json) -> Json:
            return {"range": chunks, "url": url, "url_range": bytes_}

        return await asyncio.to_thread(self._reconstruct, request, "fetch_info", entry)

    async def _reconstruction_2(self, request: Request) -> Response:
        """``xorbs``: the same. One address could have several ranges; here each is asked for on its own."""

        def entry(url: str, chunks: Json, bytes_: Json) -> Json:
            return {"url": url, "ranges": [{"chunks": chunks, "bytes": bytes_}]}

        return await asyncio.to_thread(self._reconstruct, request, "xorbs", entry)

    def _reconstruct(self, request: Request, name: str, entry: Callable[[str, Json, Json], Json]) -> Response:
        file = check_hash(request.path_params["file"])
        scheme, _, text = request.headers.get("authorization", "").partition(" ")
        grant = self.signer.check(text.strip() if scheme.lower() == "bearer" else None, ReadGrant)
        repo = RepoId.from_canonical(grant.repo)
        layout = self.layouts.find(repo, grant.commit, file)
        try:
            span = parse_range(request.headers.get("range"), layout.size) or range(layout.size)
        except RangeError:
            return Response(status_code=416, headers={"content-range": f"bytes */{layout.size}"})
        plan = layout.reconstruct(span.start, span.stop)
        if len(plan.parts) > MAX_TERMS:
            raise InvalidInput(
                f"{len(span)} bytes of {file} have {len(plan.parts)} terms, more than {MAX_TERMS}",
                hint="Ask for a smaller Range.",
            )
        names = {number: to_text(layout.xorbs[number].digest) for number in plan.fetch}
        fetch: dict[str, list[Json]] = {}
        for number, ranges in plan.fetch.items():
            url, xorb = self._url(request.scope, grant, layout, number), layout.xorbs[number]
            fetch[names[number]] = [
                # The last byte is included, as in the Range header that clients make of it.
                entry(url, _range(first, stop), _range(xorb.position(first), xorb.position(stop) - 1))
                for first, stop in ranges
            ]
        terms = [
            {"hash": names[part.xorb], "unpacked_length": part.length, "range": _range(part.first, part.stop)}
            for part in plan.parts
        ]
        self._told(request.scope, grant.repo, grant.commit, reads=int(span.start == 0), count=len(span))
        body = {"offset_into_first_range": plan.skip, "terms": terms, name: fetch}
        return JsonAnswer(body, headers={"cache-control": "no-store"})

    async def _xorb(self, request: Request) -> Response:
        """Bytes of a xorb; the address says whose, clients send no token."""
        name = check_hash(request.path_params["xorb"])
        grant = self.signer.check(request.query_params.get("grant"), XorbGrant)
        repo = RepoId.from_canonical(grant.repo)
        try:
            placed, layout = await asyncio.to_thread(self._find, repo, grant.commit, grant.blob)
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
        wanted = Wanted(grant.repo, grant.commit, f"xorb {name}")
        start, stop = (span.start, span.stop) if span is not None else (0, size)
        parts = frames(self._reader, placed, xorb, start, stop, wanted)
        response = FilePartsResponse(parts, stop - start, 200 if span is None else 206, headers)
        return Counted(response, self._metrics.sent_bytes, self._metrics.xorb_bytes)

    def _find(self, repo: RepoId, commit: str, blob: str) -> tuple[PlacedBlob, Layout]:
        placed = self.layouts.placed(repo, commit, blob)
        return placed, self.layouts.of(self.layouts.catalog.domain_of(repo), blob)

    async def _telemetry(self, _request: Request) -> Response:
        """What clients say of their transfers; nobody here wants it."""
        return Response(status_code=204)

    def _url(self, scope: Scope, read: ReadGrant, layout: Layout, number: int) -> str:
        grant = self.signer.sign(XorbGrant(read.repo, self._ends(), layout.blob, number, read.commit))
        return absolute(scope, f"{CAS}/v1/xorbs/{to_text(layout.xorbs[number].digest)}?grant={grant}")

    def _ends(self) -> int:
        return int(self.signer.clock()) + TOKEN_S


def _range(start: int, end: int) -> Json:
    return {"start": start, "end": end}
