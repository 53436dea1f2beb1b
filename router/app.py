"""The router put together: its parts, its routes, and what runs while it serves."""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from helios.config import RouterSettings
from helios.metrics import CONTENT_TYPE, RouterMetrics, WorkerState
from router import errors
from router.admission.admission import make
from router.admission.at_registry import AtRegistry
from router.admission.line_words import ToOwner
from router.admission.waking_elsewhere import WakingElsewhere
from router.answering import refusal
from router.catalog import Catalog
from router.demand.sayer import Say, Sayer
from router.disaggregation.splits import Splits
from router.drain import Drain
from router.entrance import Entrance
from router.errors import ApiError
from router.health import Health, State
from router.kv.asking import Lookups
from router.relay.course import UNKNOWN
from router.relay.relay import Relay
from router.resilience.resilience import Resilience
from router.routes import ROUTES
from router.scheduling.configured import Tools, build
from router.scraper import STALE
from router.shared import Shared
from router.worker import Worker
from router.workers import Workers

if TYPE_CHECKING:
    from router.batches.service import BatchService
    from router.disaggregation.warming import Warming
    from router.tracing.exporter import Exporter


class Router:
    """One process's router. Raises UsageError for settings that can't work. Serve ``app`` inside ``running``."""

    def __init__(
        self, settings: RouterSettings, tls: ssl.SSLContext, gather: Callable[[], Awaitable[bytes | None]],
        resolve: Callable[[str], None], want: Callable[[str], None], wake: Callable[[list[str]], None], shared: Shared,
        health: Callable[[str], Health], processes: int, demand: Say, index: str | bytes = "",
        say: Callable[[ToOwner], None] | None = None,
    ) -> None:  # fmt: skip
        """``tls``: how workers with https are met; ``gather``: the metrics of all processes, None when they can't be
        had; ``resolve``: has the registry asked what a name stands for; ``want``: has a model looked for that no worker
        serves; ``wake``: has models woken, all that are wanted now; ``health``: a worker's, given its URL; ``shared``:
        what the router's processes, of which there are ``processes``, have in common; ``demand``: tells what this
        process has counted; ``index``: address of the socket at which the index of KV events is asked; ``say``: tells
        the owner of the queue; None: it is this process's."""
        self.settings, self._gather = settings, gather
        self.metrics = RouterMetrics(self._measured)
        self.resilience = Resilience(settings, self.metrics, shared=shared)
        self.workers = Workers(
            settings.workers, time.monotonic, shared.load, settings.slow_start_s, self.resilience.guard, health,
            pins=settings.discovery.resolve,
        )  # fmt: skip
        self.workers.watch(self.resilience)
        rng = random.Random()  # noqa: S311 - nothing here is a secret
        tools = Tools(time.monotonic, rng, STALE * settings.scrape_interval_s, homes=shared.homes)
        self.scheduling = build(settings.policy, tools)
        self.catalog = Catalog(self.workers, settings.aliases)
        self.registry = None
        """What is known of models at the registry; None where that is not asked."""
        if settings.discovery.resolve:
            self.registry = AtRegistry(settings.discovery, self.workers, resolve, want, time.monotonic)
        self.waking = None
        """Who has models woken; None where nobody can."""
        if (
            settings.admission.wake_url
            or settings.admission.hold
            or (self.registry is not None and self.registry.holds)
        ):
            self.waking = WakingElsewhere(wake, time.monotonic)
        self.admission = make(
            settings, self.workers, self.metrics, self.waking, processes, shared.sums, self.registry, say
        )
        self.relay = Relay(
            settings, self.workers, self.scheduling.policy, self.metrics, self.resilience, self.admission, tls
        )
        self.demand = Sayer(self.relay, demand, time.monotonic)
        if self.scheduling.asks_index:
            self.relay.lookups = Lookups(index, settings.kv_events.wait_s, self.workers, self.metrics)
        self.splits = self.relay.splits = Splits(settings.disaggregation, self.relay)
        self._tracing: Exporter | None = None
        if settings.tracing.endpoint:
            from router.tracing.exporter import Exporter

            self._tracing = Exporter(settings.tracing, "https" if settings.tls_cert else "http", self.metrics)
            self.relay.tracing = self._tracing.recorder
        self.drain = Drain(settings.drain_s, self.relay.cut)
        if self.registry is not None:
            self.relay.missing = self.registry.missing
        self.batches: BatchService | None = None
        if settings.batches.store:
            from router.batches.service import BatchService

            self.batches = BatchService(settings, self.relay, self.metrics)
        self.app = self._make_app()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Connections to the workers, and what looks after them, while the context lasts."""
        async with asyncio.TaskGroup() as tasks, AsyncExitStack() as asking:
            if self.admission is not None:
                self.admission.begin(tasks)
                asking.callback(self.admission.end)
            if self._tracing is not None:
                await asking.enter_async_context(self._tracing.running())
            if self.relay.lookups is not None:
                await asking.enter_async_context(self.relay.lookups.running())
            relaying = tasks.create_task(self.relay.run())
            saying = tasks.create_task(self.demand.run())
            looking_after = tasks.create_task(self.resilience.run(self.workers, self.relay))
            warming = tasks.create_task(self._warming().run())
            async with self.batches.running() if self.batches is not None else nullcontext():
                yield
            relaying.cancel()
            saying.cancel()
            looking_after.cancel()
            warming.cancel()

    def _warming(self) -> Warming:
        from router.disaggregation.warming import Warming

        return Warming(
            self.splits.pairs, self.splits.peers, self.workers, self.splits.connector, self.relay.keys,
            self.relay.tls, self.metrics.warm_pairs.set,
        )  # fmt: skip

    def leave(self) -> None:
        """Asked to stop; see ``Drain.step``."""
        if self.batches is not None:
            self.batches.leave()
        self.drain.step()

    def _measured(self) -> Iterator[WorkerState]:
        for worker in self.workers.all:
            yield _state(worker, sorted(worker.names))
        for worker in self.workers.draining:
            yield _state(worker, ())

    def _make_app(self) -> ASGIApp:
        # The relay takes these before they come here, unless they are spelled another way: then they are unknown.
        routes = [Route(route.path, _Elsewhere(self._unknown), methods=["POST"]) for route in ROUTES]
        routes += [
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/v1/models/{model:path}", self._model, methods=["GET"]),
            Route("/healthz", self._healthz, methods=["GET"]),
            Route("/readyz", self._readyz, methods=["GET"]),
            Route("/metrics", self._metrics, methods=["GET"]),
        ]
        if self.batches is not None:
            routes += self.batches.routes
        handlers = {HTTPException: self._http_error, Exception: _internal_error}
        app = Starlette(routes=routes, exception_handlers=handlers)  # type: ignore[arg-type]
        app.router.redirect_slashes = False
        app.router.default = self._unknown
        return Entrance(app, routes, self.relay.tracing)

    async def _models(self, request: Request) -> Response:
        try:
            return JSONResponse(self.catalog.list(self.catalog.visible(request.scope["headers"], self.admission)))
        except ApiError as error:
            return refusal(request, error)

    async def _model(self, request: Request) -> Response:
        name = request.path_params["model"]
        try:
            visible = self.catalog.visible(request.scope["headers"], self.admission)
            if name not in visible:
                raise errors.unknown_model(name, list(visible))
            return JSONResponse(self.catalog.get(name))
        except ApiError as error:
            return refusal(request, error)

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
        text = await self._gather()
        if text is None:
            return refusal(request, errors.no_metrics())
        return Response(text, media_type=CONTENT_TYPE)

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
        return refusal(request, error)


class _Elsewhere:
    """An ASGI application as a class, which Starlette takes for one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


async def _internal_error(request: Request, exception: Exception) -> Response:
    return refusal(request, errors.internal())


def _state(worker: Worker, models: Sequence[str]) -> WorkerState:
    return WorkerState(worker.url, models, worker.up, worker.load.requests, worker.load.tokens)
