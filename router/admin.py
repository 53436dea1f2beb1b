"""The router's administration: workers, their registration, and what is going on, on a port and a socket of its own.

| call | needs | |
|---|---|---|
| ``GET /workers`` | administrator | every worker |
| ``GET /workers/{id}`` | administrator | one |
| ``PUT /workers/{id}`` | registrar | a worker registers, or renews its lease |
| ``DELETE /workers/{id}`` | registrar | it takes that back, and is drained |
| ``POST /workers/{id}/cordon``, ``/uncordon`` | administrator | no new requests from now on; requests again |
| ``POST /workers/{id}/drain`` | administrator | cordoned, and waited for up to ``?wait_s=`` until it has no requests |
| ``GET /policies`` | administrator | the policy in force, and what others can be made of |
| ``GET /state`` | administrator | all of it at once, for ``helios router top`` |
| ``GET /demand`` | scaler | what there is to do for each model, and what is being done (``helios.demand``) |
| ``GET /demand/watch`` | scaler | who waits, a line of JSON each time that changes, and every two seconds |
| ``GET /openapi.json`` | | these calls in OpenAPI 3.1 |

Cordoning, draining and taking a registration back are answered when every process of the router has heard of it: from
then on no request begins there. ``everywhere`` is false where a process did not say so in time, and then nothing is
called drained; the same call again waits again.

A worker's id is the one it registered with, and otherwise its URL without the scheme. Errors are those of the
registry's native API: a status and ``{"error": {"code", "message", "hint"}}``.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from helios.decoding import from_json
from helios.demand import ALIVE_S, encode
from helios.errors import HeliosError, InvalidInput, NotFound, Unavailable
from router.admin_access import Access, Right
from router.admin_openapi import Operation, document
from router.demand.shown import Shown
from router.discovery.registration import Registration, RegistrationSource
from router.fleet import Fleet, Seen, described, identity_of
from router.scheduling.configured import known

MAX_BODY: Final = 256 << 10
"""Longest registration, in bytes."""
MAX_WAIT_S: Final = 600.0
"""Longest wait for a worker to be drained, in seconds."""
MOST_WATCHES: Final = 64
PAUSE_S: Final = 0.02
"""Between two lines of a watch, in seconds."""
LOOK_S: Final = 0.05
"""How often a worker that drains is looked at."""

Heard = Callable[[], Awaitable[bool]]
"""Waits until all processes have heard what was decided before; whether they have."""
Models = Callable[[], list[dict[str, Any]]]
"""What is known of models that no worker serves yet, or that the registry was asked for."""

Handler = Callable[[Request], Awaitable[Response]]


class Admin:
    """The application of one router."""

    def __init__(
        self, fleet: Fleet, registrations: RegistrationSource, access: Access, policy: dict[str, Any],
        demand: Shown, *,
        heard: Heard, models: Models = list, draining: Callable[[], bool] = lambda: False,
        index: Callable[[], dict[str, Any] | None] = lambda: None, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """``policy``: the one in force, ``explained``; ``demand``: what there is to do; ``heard``: by all processes
        that relay; ``models``: those that are awaited; ``draining``: whether the router shuts down; ``index``: what is
        known of the index of KV events, None where there is none; ``clock``: of health."""
        self._fleet, self._registrations, self._access = fleet, registrations, access
        self._heard, self._models, self._draining, self._index, self._clock = heard, models, draining, index, clock
        self._policy, self._demanded, self._watches = policy, demand, 0
        self._began = clock()
        handlers = {HeliosError: _failed, HTTPException: _refused, Exception: _broken}
        self.app = Starlette(
            routes=[self._route(one) for one in OPERATIONS],
            exception_handlers=handlers,  # type: ignore[arg-type]
        )
        self.app.router.redirect_slashes = False

    def _route(self, operation: Operation) -> Route:
        handler: Handler = getattr(self, f"_{operation.name}")
        needed = operation.needs

        async def guarded(request: Request) -> Response:
            self._access.demand(request.scope, needed)
            return await handler(request)

        path = operation.path.replace("{id}", "{id:path}")
        return Route(path, guarded, methods=[operation.method], name=operation.name)

    # --- looking ---

    async def _workers(self, request: Request) -> Response:
        return JSONResponse({"workers": self._described()})

    async def _worker(self, request: Request) -> Response:
        identity = request.path_params["id"]
        for one in self._described():
            if one["id"] == identity:
                return JSONResponse(one)
        raise _unknown(identity)

    async def _policies(self, request: Request) -> Response:
        return JSONResponse({"policy": self._policy, "known": known()})

    async def _state(self, request: Request) -> Response:
        """Everything that ``helios router top`` shows."""
        workers = self._described()
        models: dict[str, dict[str, Any]] = {}
        for worker in workers:
            for name in [] if worker["draining"] else [*worker["models"], *worker["adapters"]]:
                model = models.setdefault(name, {"model": name, "workers": 0, "up": 0, "cordoned": 0, "in_flight": 0})
                model["workers"] += 1
                model["up"] += worker["health"] == "up"
                model["cordoned"] += worker["cordoned"] or worker["unready"]
                model["in_flight"] += worker["in_flight"]  # of its workers, whichever of their models was meant
        state = {
            "status": "draining" if self._draining() else "ready",
            "uptime_s": round(self._clock() - self._began, 3),
            "policy": self._policy,
            "workers": workers,
            "models": [models[name] for name in sorted(models)],
            "awaited": self._models(),
            "index": self._index(),
        }
        return JSONResponse(state)

    # --- what there is to do ---

    async def _demand(self, request: Request) -> Response:
        return Response(encode(self._demanded.document()), media_type="application/json")

    async def _watch(self, request: Request) -> Response:
        if self._watches >= MOST_WATCHES:
            raise Unavailable(f"{MOST_WATCHES} watch the demand already", hint="GET /demand says it once.")
        self._watches += 1
        return _Stream(self._lines(request), self._watched)

    def _watched(self) -> None:
        self._watches -= 1

    async def _lines(self, request: Request) -> AsyncIterator[bytes]:
        """Who waits, until this process ends, or the token is valid no more."""
        book, sent_at = self._demanded.book, -math.inf
        while not self._demanded.over:
            version = book.pulse.version
            yield encode(book.line()) + b"\n"
            await asyncio.sleep(max(0.0, sent_at + PAUSE_S - self._clock()))  # what comes together is told together
            sent_at = self._clock()
            await book.pulse.after(version, ALIVE_S)
            try:
                self._access.demand(request.scope, Right.SCALE)
            except HeliosError:
                return

    def _described(self) -> list[dict[str, Any]]:
        now = self._clock()
        found = [self._one(worker, now, draining=False) for worker in self._fleet.all]
        found += [self._one(worker, now, draining=True) for worker in self._fleet.draining]
        return sorted(found, key=lambda one: (one["url"], one["draining"]))

    def _one(self, worker: Seen, now: float, *, draining: bool) -> dict[str, Any]:
        lease = None if draining else self._registrations.leases.of(worker.url)
        identity, left = (identity_of(worker.url), None) if lease is None else lease
        return described(worker, now, identity=identity, lease_s=left, draining=draining)

    # --- registering ---

    async def _register(self, request: Request) -> Response:
        body = b""
        async for piece in request.stream():
            body += piece
            if len(body) > MAX_BODY:
                raise InvalidInput(f"a registration has at most {MAX_BODY >> 10} KiB")
        try:
            said = from_json(body, Registration)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InvalidInput(f"the registration is wrong: {error}") from None
        identity = request.path_params["id"]
        lease = self._registrations.put(identity, said)
        return JSONResponse({"id": identity, "url": lease.url, "lease_s": said.lease_s})

    async def _deregister(self, request: Request) -> Response:
        self._registrations.remove(request.path_params["id"])
        return JSONResponse({"everywhere": await self._heard()})

    # --- cordoning ---

    async def _cordon(self, request: Request) -> Response:
        worker = self._find(request.path_params["id"])
        self._fleet.cordon(worker.url)
        return await self._settled(worker)

    async def _uncordon(self, request: Request) -> Response:
        worker = self._find(request.path_params["id"])
        self._fleet.uncordon(worker.url)
        return await self._settled(worker)

    async def _settled(self, worker: Seen) -> Response:
        everywhere = await self._heard()
        return JSONResponse({"in_flight": worker.in_flight, "everywhere": everywhere})

    async def _drain(self, request: Request) -> Response:
        text = request.query_params.get("wait_s", "0")
        try:
            wait_s = float(text)
        except ValueError:
            wait_s = math.nan
        if not 0 <= wait_s <= MAX_WAIT_S:
            raise InvalidInput(f"wait_s is {text[:50]!r}: it must be from 0 to {MAX_WAIT_S:g}")
        worker = self._find(request.path_params["id"])
        self._fleet.cordon(worker.url)
        end = self._clock() + wait_s
        everywhere = await self._heard()
        # Looked at again and again: other processes of the router count there too, and tell nobody.
        while (worker.in_flight or not everywhere) and self._clock() < end and not await request.is_disconnected():
            await asyncio.sleep(LOOK_S)
            everywhere = everywhere or await self._heard()
        in_flight = worker.in_flight
        return JSONResponse({"in_flight": in_flight, "drained": everywhere and not in_flight, "everywhere": everywhere})

    def _find(self, identity: str) -> Seen:
        url = self._registrations.leases.url_of(identity)
        for worker in (*self._fleet.all, *self._fleet.draining):
            if worker.url == url or (url is None and identity_of(worker.url) == identity):
                return worker
        raise _unknown(identity)

    async def _openapi(self, request: Request) -> Response:
        return JSONResponse(document(OPERATIONS))


OPERATIONS: Final = (
    Operation("workers", "GET", "/workers", Right.ADMINISTER, "Every worker."),
    Operation("cordon", "POST", "/workers/{id}/cordon", Right.ADMINISTER, "Give a worker no new requests."),
    Operation("uncordon", "POST", "/workers/{id}/uncordon", Right.ADMINISTER, "Give a worker requests again."),
    Operation("drain", "POST", "/workers/{id}/drain", Right.ADMINISTER, "Cordon a worker and wait for its requests."),
    Operation("worker", "GET", "/workers/{id}", Right.ADMINISTER, "One worker."),
    Operation("register", "PUT", "/workers/{id}", Right.REGISTER, "Register a worker, or renew its lease."),
    Operation("deregister", "DELETE", "/workers/{id}", Right.REGISTER, "Take a registration back."),
    Operation("policies", "GET", "/policies", Right.ADMINISTER, "The policy in force, and what others are made of."),
    Operation("state", "GET", "/state", Right.ADMINISTER, "Workers, models, and models that are awaited."),
    Operation("demand", "GET", "/demand", Right.SCALE, "What there is to do for each model, and what is being done."),
    Operation("watch", "GET", "/demand/watch", Right.SCALE, "Who waits: lines of JSON, whenever that changes."),
    Operation("openapi", "GET", "/openapi.json", Right.NONE, "This document."),
)  # fmt: skip


class _Stream(StreamingResponse):
    """Lines of JSON. ``over`` is called when they end, whichever way."""

    def __init__(self, lines: AsyncIterator[bytes], over: Callable[[], None]) -> None:
        super().__init__(lines, media_type="application/x-ndjson")
        self._over = over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._over()


def _unknown(identity: str) -> NotFound:
    return NotFound(f"no worker has the id {identity[:200]!r}", hint="GET /workers lists them.")


async def _failed(request: Request, error: HeliosError) -> Response:
    headers = {"www-authenticate": "Bearer"} if error.status == 401 else {}
    described = {"code": error.code, "message": error.message, "hint": error.hint}
    return JSONResponse({"error": described}, error.status, headers)


async def _refused(request: Request, error: HTTPException) -> Response:
    """Starlette's own errors: 404 and 405."""
    code = "MethodNotAllowed" if error.status_code == 405 else "NotFound"
    message = f"{request.method} {request.url.path[:200]}: {error.detail}"
    return JSONResponse({"error": {"code": code, "message": message, "hint": None}}, error.status_code, error.headers)


async def _broken(request: Request, error: Exception) -> Response:
    described = {"code": "Error", "message": "The router failed; its log says how.", "hint": None}
    return JSONResponse({"error": described}, 500)
