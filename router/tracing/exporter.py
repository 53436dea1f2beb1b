"""Sends spans to a collector over OTLP/HTTP, from one process.

One batch is under way at a time, in a thread, since OpenTelemetry's exporter blocks: it tries again what a collector
could not take for now, for ``timeout_s`` in all. Meanwhile requests are noted as always; what the queue (``Recorder``)
has no room for is dropped. At the end what waits is sent, if that is done within seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from helios.config import TracingSettings
from helios.metrics import RouterMetrics
from router.tracing.recorder import Recorder, Served, Spans
from router.tracing.settings import endpoint_of
from router.tracing.spans import resource, spans_of

log = logging.getLogger("helios.router")

BATCH: Final = 256
"""Requests whose spans are sent together."""
END_S: Final = 3.0
"""Longest wait for the collector at the end, in seconds."""


class Exporter:
    """``scheme``: how clients speak to the router. Made in the process that relays."""

    def __init__(self, settings: TracingSettings, scheme: str, metrics: RouterMetrics) -> None:
        self._settings, self._scheme = settings, scheme
        counted = metrics.spans.labels
        self._sent, self._failed = counted("sent"), counted("failed")
        bits = random.Random().getrandbits  # noqa: S311 - ids of spans are no secrets
        self.recorder = Recorder(settings.ratio, settings.queue, bits, counted("dropped").inc)
        self._resource = resource()
        # What it says of each failure goes into our own log, once.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL + 1)
        self._collector: SpanExporter = OTLPSpanExporter(endpoint_of(settings), timeout=settings.timeout_s)
        self._away = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Send what is recorded while the context lasts, and what still waits at its end, if that takes ``END_S``."""
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(self._run(stop))
            try:
                yield
            finally:
                stop.set()
                await asyncio.wait((task,), timeout=END_S)
                self._collector.shutdown()  # ends its pauses between tries
                if not task.done():
                    log.warning("spans were not sent before the end", extra={"requests": len(self.recorder)})
                    task.cancel()

    async def _run(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.interval_s):
                    await stop.wait()
            while self.recorder:
                await self._send()

    async def _send(self) -> None:
        requests = self.recorder.take(BATCH)
        count, taken = await asyncio.to_thread(self._export, requests)
        (self._sent if taken else self._failed).inc(count)
        if self._away is taken:
            self._away = not taken
            say = log.info if taken else log.warning
            say("the collector takes spans again" if taken else "the collector takes no spans")

    def _export(self, requests: list[Spans | Served]) -> tuple[int, bool]:
        """In a thread: how many spans these were, and whether they were taken."""
        spans = [span for request in requests for span in spans_of(request, self._resource, self._scheme)]
        return len(spans), self._collector.export(spans) is SpanExportResult.SUCCESS
