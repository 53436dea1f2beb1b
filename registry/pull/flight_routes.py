"""``GET /api/v1/flights``: what this process has of a content that it brings, for the registry's other processes.

Without a Range how far it is; with one the bytes, as they come. The request must be signed with the key that processes
share. Clients have no use for it: they get the same bytes under their names.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from helios.errors import Conflict, IntegrityError, InvalidInput, NotFound
from helios.http.ranges import RangeError, parse_range
from helios.http.server import FilePart, FilePartsResponse
from registry.api.support import Json, parameter
from registry.mirror.stream import parts
from registry.pull.flight import Flight
from registry.pull.flights import Flights
from registry.pull.following import PATH
from registry.pull.sharing import FlightGrant
from registry.pull.upstream import Upstream
from registry.xet.tokens import Signer


def routes(flights: Flights, client: Upstream, signer: Signer) -> list[BaseRoute]:
    async def give(request: Request) -> Response:
        content = parameter(request, "content")
        scheme, _, text = request.headers.get("authorization", "").partition(" ")
        grant = signer.check(text.strip() if scheme.lower() == "bearer" else None, FlightGrant)
        if grant.content != content:
            raise InvalidInput("the access token is for another content")
        flight = flights.find(content)
        if flight is None:
            raise NotFound("this process does not bring that content")
        if "range" not in request.headers:
            here, attempt = flight.progress()
            return Json({"here": here, "attempt": attempt})
        try:
            span = parse_range(request.headers["range"], flight.file.size)
        except RangeError:
            span = None
        if span is None:
            raise InvalidInput(f"the Range is none of a file of {flight.file.size} bytes")
        wanted = parameter(request, "attempt")
        if wanted != str(flight.attempt):
            raise Conflict(f"this process is at attempt {flight.attempt}")
        headers = [("content-range", f"bytes {span.start}-{span.stop - 1}/{flight.file.size}")]
        body = _of_attempt(flight, flight.attempt, parts(flight, client, span.start, span.stop, _landed))
        return FilePartsResponse(body, span.stop - span.start, 206, headers)  # type: ignore[return-value]

    return [Route(PATH, give, methods=["GET"])]


async def _landed() -> AsyncGenerator[FilePart, None]:
    for _ in ():
        yield _  # what makes this a generator
    raise NotFound("the content has landed")


async def _of_attempt(
    flight: Flight, attempt: int, body: AsyncGenerator[FilePart, None]
) -> AsyncGenerator[FilePart, None]:
    """The parts, as long as they are of this attempt; the reader itself sees to that from its first part on."""
    first = True
    try:
        async for part in body:
            if first and flight.attempt != attempt:
                raise IntegrityError("the upstream sent wrong bytes; ask again")
            first = False
            yield part
    finally:
        await body.aclose()
