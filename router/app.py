"""The router put together: its parts, its routes, and what runs while it serves."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from helios.config import RouterSettings
from helios.errors import UsageError
from helios.metrics import CONTENT_TYPE, RouterMetrics
from router import errors
from router.catalog import Catalog
from router.checks import Checks
from router.drain import Drain
from router.errors import OPENAI, ApiError
from router.health import State
from router.relay import headers
from router.relay.intake import Budget, Intake
from router.relay.relay import UNKNOWN, Endpoint, Relay
from router.relay.upstream import Upstream
from router.routes import ROUTES
from router.scheduling.least_loaded import LeastLoaded
from router.workers import Worker, Workers

Lifespan = Callable[[Starlette], AbstractAsyncContextManager[None]]


class Router:
    """One router. Raises UsageError for settings that can't work. Serve ``app`` inside ``running``."""

    def __init__(self, settings: RouterSettings, lifespan: Lifespan | None = None) -> None:
        _check(settings)
        self.settings = settings
        self.metrics = RouterMetrics()
        self.workers = Workers(settings.workers, time.monotonic)
        self.drain = Drain(settings.drain_s)
        self.catalog = Catalog(self.workers)
        self._upstream = Upstream(settings.connect_timeout_s)
        budget = Budget(settings.max_buffered_mib << 20)
        intake = Intake(settings.max_body_mib << 20, settings.idle_timeout_s, budget)
        self._relay = Relay(
            settings, self.workers, LeastLoaded(), self._upstream, intake, self.drain, self.metrics
        )  # fmt: skip
        self._measure()
        self.app = self._make_app(lifespan)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Connections to the workers and their health checks, while the context lasts."""
        settings = self.settings
        async with self._upstream:
            checks = Checks(
                self.workers, settings.health_interval_s, settings.health_timeout_s
            )  # fmt: skip
            async with checks.running():
                yield

    def _measure(self) -> None:
        """Gauges read the workers when they are asked, so they can't drift from them."""
        for worker in self.workers.all:
            self.metrics.in_flight.labels(worker.url).set_function(partial(_in_flight, worker))
            for model in worker.models:
                up = self.metrics.worker_up.labels(worker.url, model)
                up.set_function(partial(_up, worker))

    def _make_app(self, lifespan: Lifespan | None) -> Starlette:
        routes = [Route(route.path, Endpoint(self._relay, route, self._unknown), methods=["POST"]) for route in ROUTES]
        routes += [
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/v1/models/{model:path}", self._model, methods=["GET"]),
            Route("/healthz", self._healthz, methods=["GET"]),
            Route("/readyz", self._readyz, methods=["GET"]),
            Route("/metrics", self._metrics, methods=["GET"]),
        ]
        handlers = {HTTPException: self._http_error, Exception: _internal_error}
        app = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)  # type: ignore[arg-type]
        app.router.redirect_slashes = False
        app.router.default = self._unknown
        return app

    async def _models(self, request: Request) -> Response:
        return JSONResponse(self.catalog.list())

    async def _model(self, request: Request) -> Response:
        name = request.path_params["model"]
        card = self.catalog.get(name)
        if card is None:
            return _answer(request, errors.unknown_model(name, self.workers.models))
        return JSONResponse(card)

    async def _healthz(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _readyz(self, request: Request) -> Response:
        """Ready: requests are taken. A router whose workers are down is ready: it says so to its clients."""
        models = {}
        for model in self.workers.models:
            workers = self.workers.of(model)
            up = sum(worker.health.state is State.UP for worker in workers)
            models[model] = {"workers": len(workers), "up": up}
        draining = self.drain.draining
        status = {"status": "draining" if draining else "ready", "models": models}
        return JSONResponse(status, 503 if draining else 200)

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.render(), media_type=CONTENT_TYPE)

    async def _unknown(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._refuse(Request(scope))(scope, receive, send)

    async def _http_error(self, request: Request, exception: HTTPException) -> Response:
        """Starlette's own error, which is 405 here."""
        return self._refuse(request, (exception.headers or {}).get("Allow", ""))

    def _refuse(self, request: Request, allow: str | None = None) -> Response:
        """404, or 405 where other methods are allowed for the path as it was spelled."""
        raw = request.scope["raw_path"].decode("latin-1")
        error = errors.unknown_path(request.method, raw[:200])
        if allow is not None and raw == request.scope["path"]:
            error = errors.method_not_allowed(request.method, raw, allow)
        self.metrics.requests.labels("other", UNKNOWN, str(error.status)).inc()
        return _answer(request, error)


def _answer(request: Request, error: ApiError) -> Response:
    identity = headers.request_id(request.scope["headers"])
    extra = {"x-request-id": identity}
    if error.allow is not None:
        extra["allow"] = error.allow
    return Response(OPENAI.body(error, identity), error.status, extra, "application/json")


async def _internal_error(request: Request, exception: Exception) -> Response:
    return _answer(request, errors.internal())


def _in_flight(worker: Worker) -> float:
    return float(worker.in_flight)


def _up(worker: Worker) -> float:
    return float(worker.health.state is State.UP)


def _check(settings: RouterSettings) -> None:
    for name in (
        "connect_timeout_s", "first_byte_timeout_s", "idle_timeout_s", "health_interval_s", "health_timeout_s",
        "max_body_mib", "max_buffered_mib", "drain_s",
    ):  # fmt: skip
        if getattr(settings, name) <= 0:
            raise UsageError(f"router.{name} must be more than 0, not {getattr(settings, name)}")
