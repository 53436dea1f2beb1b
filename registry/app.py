"""The registry's Starlette application: groups of routes, errors as JSON, metrics by route."""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from helios.errors import HeliosError
from helios.metrics import RegistryMetrics
from registry.api import admission, content, health, names, notices, pushes, quotas
from registry.api.openapi import route as openapi
from registry.api.support import Json
from registry.fresh import Fresh
from registry.services import Services
from registry.shown import shown

log = logging.getLogger("helios.registry")

_APART: Final = re.compile(r"(?:/t/[^/]+)?/(?:api/v1/objects/|healthz|metrics)")
_NAME: Final = re.compile(r"[A-Za-z0-9=;:._-]{1,128}\Z")

Lifespan = Callable[[Starlette], AbstractAsyncContextManager[None]]


def native_routes() -> list[Route]:
    """The routes of docs/native-api.md; the first that matches wins."""
    return [
        *health.routes(),
        *names.routes(),
        *notices.routes(),
        *content.routes(),
        *pushes.routes(),
        *admission.routes(),
        *quotas.routes(),
        *openapi.routes(),
    ]


def make_app(services: Services, lifespans: Sequence[Lifespan] = (), routes: Sequence[BaseRoute] = ()) -> Starlette:
    """The application. Each of ``lifespans`` is entered at start and left, in reverse, at shutdown.

    Of ``routes`` the first that matches wins.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            for each in lifespans:
                await stack.enter_async_context(each(app))
            yield

    app = Starlette(
        routes=routes,
        middleware=[Middleware(Boundary, metrics=services.metrics), Middleware(AsOfNow, fresh=services.fresh)],
        exception_handlers={HeliosError: answer_error, HTTPException: answer_http},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # there is one address of each thing, and Host says nothing
    app.state.services = services
    return app


async def answer_error(request: Request, error: Exception) -> Response:
    """An error of ours as docs/native-api.md says."""
    assert isinstance(error, HeliosError)
    if error.status >= 500:
        log.warning(
            "request failed",
            extra={"code": error.code, "error": shown(error.message), "request": request.scope.get("helios.request")},
        )
    return error_response(error.status, error.code, error.message, error.hint)


async def answer_http(request: Request, error: Exception) -> Response:
    """Starlette's own errors, such as an unknown path, in the same form.

    Each method of a path is a route of its own, and the error is that of the first: ``Allow`` names those of all.
    """
    assert isinstance(error, HTTPException)
    code = {404: "NotFound", 405: "MethodNotAllowed"}.get(error.status_code, "InvalidInput")
    message = f"{request.method} {request.url.path}: {error.detail}"
    response = error_response(error.status_code, code, message, None)
    response.headers.update(error.headers or {})
    if error.status_code == 405:
        found = [r for r in request.app.routes if isinstance(r, Route) and r.matches(request.scope)[0] != Match.NONE]
        response.headers["allow"] = ", ".join(sorted(method for route in found for method in route.methods or ()))
    return response


def error_response(status: int, code: str, message: str, hint: str | None) -> Response:
    return Json({"error": {"code": code, "message": message, "hint": hint}}, status_code=status)


def request_name(scope: Scope) -> str:
    """What the request is called in ``X-Request-Id`` and in log lines: as its sender calls it, else a new name."""
    sent: dict[bytes, bytes] = dict(scope["headers"])
    for header in (b"x-request-id", b"x-amzn-trace-id"):
        if _NAME.match(found := sent.get(header, b"").decode("latin-1")):
            return found
    return secrets.token_hex(8)


class AsOfNow:
    """Lets a request see every write that was acknowledged before it came (registry/fresh.py).

    Objects are immutable, and an orchestrator that asks whether we are alive must hear so while the database is away.
    """

    def __init__(self, app: ASGIApp, fresh: Fresh) -> None:
        self._app, self._fresh = app, fresh

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _APART.match(scope["path"]):
            try:
                await self._fresh()
            except HeliosError as error:
                response = await answer_error(Request(scope), error)
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


class Boundary:
    """Around everything: counts and times requests by route, and turns what nobody expected into a 500 and a log line.

    A client that leaves in the middle is neither.
    """

    def __init__(self, app: ASGIApp, metrics: RegistryMetrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 0
        name = scope["helios.request"] = request_name(scope)

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", []), (b"x-request-id", name.encode("ascii"))]
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except ClientDisconnect:
            status = status or 499
        except Exception as error:
            log.exception(
                "a request broke the registry",
                extra={"method": scope["method"], "path": shown(scope["path"]), "request": name},
            )
            if status:
                raise BrokenAnswer("the answer had begun") from error
            response = error_response(500, "Error", "the registry failed; its log says why", None)
            await response(scope, receive, noting)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.latency.labels(route).observe(time.perf_counter() - started)


class BrokenAnswer(Exception):
    """Makes the server close the connection: the answer can't be completed."""
