"""One request from its first byte to the end of its answer: read, choose, send, relay, account.

Retries happen only before the answer's head and only where no worker can have begun the request (``upstream``).
Between the choice of a worker and its count there is no ``await``.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from dataclasses import dataclass

import aiohttp
from multidict import CIMultiDict
from starlette.types import ASGIApp, Receive, Scope, Send

from helios.config import RouterSettings
from helios.metrics import RouterMetrics
from router import errors
from router.drain import Drain
from router.errors import ApiError
from router.relay import headers
from router.relay.answer import Answer
from router.relay.intake import Body, ClientGone, Intake
from router.relay.interrupt import Interrupted, Interruptible, Reason
from router.relay.protocol import CUT
from router.relay.upstream import BadAnswer, Broken, NotSent, SendFailed, Stale, Upstream
from router.routes import InferenceRoute
from router.scheduling.policy import Policy
from router.workers import Worker, Workers

log = logging.getLogger("helios.router")

UNKNOWN = "unknown"
"""The metric label of models that are not configured: names from outside must not become labels."""
CLIENT_GONE = "499"
"""The metric label of the status when the client left before one was sent."""


@dataclass(slots=True)
class Exchange:
    """One request on its way."""

    route: InferenceRoute
    scope: Scope
    answer: Answer
    began: float
    model: str = UNKNOWN
    """The metrics' label."""
    first_byte_at: float | None = None


class Relay:
    """Handles inference requests."""

    def __init__(
        self,
        settings: RouterSettings,
        workers: Workers,
        policy: Policy,
        upstream: Upstream,
        intake: Intake,
        drain: Drain,
        metrics: RouterMetrics,
    ) -> None:
        self._settings, self._workers, self._policy, self._upstream = settings, workers, policy, upstream
        self._intake, self._drain, self._metrics = intake, drain, metrics

    async def handle(self, route: InferenceRoute, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request on an inference route."""
        answer = Answer(send, scope["extensions"][CUT], route.dialect, headers.request_id(scope["headers"]))
        exchange = Exchange(route, scope, answer, time.perf_counter())
        gone = False
        try:
            if not scope["query_string"].isascii():
                raise errors.invalid_body("The URL's query holds bytes that are not ASCII.", "invalid_url")
            async with Interruptible(self._drain) as block:
                with await self._intake.read(route, scope, receive) as body:
                    block.watch(receive)
                    await self._dispatch(exchange, body, block)
        except ClientGone:
            gone = True
        except Interrupted as interrupted:
            gone = interrupted.reason is Reason.CLIENT_GONE
            if not gone:
                await self._fail(exchange, errors.shutting_down())
        except ApiError as error:
            await self._fail(exchange, error)
        finally:
            self._account(exchange, gone)

    async def _dispatch(self, exchange: Exchange, body: Body, block: Interruptible) -> None:
        model = body.model
        if model is None or not self._workers.of(model):
            raise errors.unknown_model(model, self._workers.models)
        exchange.model = model
        forwarded = headers.to_worker(exchange.scope["headers"], exchange.answer.request_id)
        tried: set[Worker] = set()
        stale = False
        last: NotSent | None = None
        give_up_at = _now() + self._settings.connect_timeout_s
        while candidates := self._workers.candidates(model, tried):
            if len(tried) > 1 and _now() >= give_up_at:
                break
            worker = self._policy.choose(candidates)
            with self._workers.lease(worker):
                try:
                    await self._attempt(exchange, worker, forwarded, body, block)
                    return
                except NotSent as error:
                    tried.add(worker)
                    last = error
                    self._retry(exchange, worker, error, "not_sent")
                    if worker.health.failed(str(error)):
                        log.warning("a worker is down", extra={"worker": worker.url, "reason": str(error)})
                except Stale as error:
                    if stale:
                        raise errors.worker_lost(str(error)) from error
                    stale = True
                    self._retry(exchange, worker, error, "stale_connection")
                except Broken as error:
                    raise errors.worker_lost(str(error)) from error
                except BadAnswer as error:
                    raise errors.bad_answer(str(error)) from error
        raise errors.no_worker(model, self._why_none(model, last), max(1, math.ceil(self._settings.health_interval_s)))

    async def _attempt(
        self, exchange: Exchange, worker: Worker, forwarded: CIMultiDict[str], body: Body, block: Interruptible
    ) -> None:
        """Send the request to one worker and relay its answer to the end."""
        answer, scope = exchange.answer, exchange.scope
        settings = self._settings
        try:
            async with asyncio.timeout(settings.first_byte_timeout_s) as deadline:
                response = await self._upstream.send(
                    worker, exchange.route.path, scope["query_string"], forwarded, body
                )
                try:
                    body.forget()
                    if not 200 <= response.status < 600:
                        raise errors.bad_answer(f"status {response.status}")
                    await answer.start(response.status, response.raw_headers)
                    rearm_at = 0.0
                    while piece := await _next(response):
                        if exchange.first_byte_at is None:
                            exchange.first_byte_at = time.perf_counter()
                        rearm_at = _rearm(deadline, rearm_at, settings.idle_timeout_s)
                        await answer.body(piece)
                        rearm_at = _rearm(deadline, rearm_at, settings.idle_timeout_s)
                    block.disarm()
                    await answer.end()
                finally:
                    response.close()
        except TimeoutError:
            if answer.writing:
                log.warning("a client took nothing for too long", extra={"worker": worker.url})
                answer.abandon()
                return
            if exchange.first_byte_at is None:
                raise errors.first_byte_timeout(settings.first_byte_timeout_s) from None
            raise errors.idle_timeout(settings.idle_timeout_s) from None

    def _retry(self, exchange: Exchange, worker: Worker, error: SendFailed, reason: str) -> None:
        self._metrics.retries.labels(reason).inc()
        log.info(
            "a request goes to another connection",
            extra={"worker": worker.url, "reason": str(error), "request_id": exchange.answer.request_id},
        )

    def _why_none(self, model: str, last: NotSent | None) -> str:
        if last is not None:
            return str(last)
        reasons = sorted({w.health.reason for w in self._workers.of(model) if w.role != "prefill"})
        return "; ".join(reasons)

    async def _fail(self, exchange: Exchange, error: ApiError) -> None:
        answer = exchange.answer
        if error.status >= 500:
            log.warning(
                "a request failed",
                extra={"code": error.code, "reason": error.message, "request_id": answer.request_id},
            )
        if answer.status is not None:
            self._metrics.cut.labels(error.code).inc()
        await answer.fail(error)

    def _account(self, exchange: Exchange, gone: bool) -> None:
        metrics, answer = self._metrics, exchange.answer
        status = str(answer.status) if answer.status is not None else CLIENT_GONE if gone else "500"
        metrics.requests.labels(exchange.route.path, exchange.model, status).inc()
        if gone:
            metrics.disconnects.inc()
        if exchange.first_byte_at is not None:
            metrics.first_byte.labels(exchange.model).observe(exchange.first_byte_at - exchange.began)
        metrics.duration.labels(exchange.model).observe(time.perf_counter() - exchange.began)


async def _next(response: aiohttp.ClientResponse) -> bytes:
    """What has come of the answer since, at least one byte; empty at its end."""
    try:
        return await response.content.readany()
    except (aiohttp.ClientError, OSError) as error:
        raise errors.worker_lost("its connection ended inside the answer") from error


def _rearm(deadline: asyncio.Timeout, rearm_at: float, idle_s: float) -> float:
    """Move the deadline on to at least ``idle_s`` from now; returns when that is needed again.

    A timer for every piece would cost more than relaying it, so the deadline is set a little later than asked, and left
    alone for as long.
    """
    now = _now()
    if now < rearm_at:
        return rearm_at
    slack = idle_s / 64
    deadline.reschedule(now + idle_s + slack)
    return now + slack


def _now() -> float:
    """The event loop's time, in seconds: what its deadlines are measured by."""
    return asyncio.get_running_loop().time()


class Endpoint:
    """The ASGI application of one inference route; ``unknown`` is that of unknown paths."""

    def __init__(self, relay: Relay, route: InferenceRoute, unknown: ASGIApp) -> None:
        self._relay, self._route, self._raw, self._unknown = relay, route, route.path.encode(), unknown

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["raw_path"] == self._raw:
            await self._relay.handle(self._route, scope, receive, send)
        else:  # the same path only after percent-decoding
            await self._unknown(scope, receive, send)
