"""Sends spans to a collector over OTLP/HTTP, from one process.

One batch is under way at a time. It is encoded in the loop's thread, a few requests at a time, since a thread beside it
would hold the interpreter for longer; a thread sends it, and tries again what a collector could not take for now, for
``timeout_s`` in all. Meanwhile requests are noted as always; what the queue (``Recorder``) has no room for is dropped.
At the end what waits is sent, if that is done within seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from helios.config import TracingSettings
from helios.metrics import RouterMetrics
from router.tracing.collector import Collector
from router.tracing.recorder import Recorder, Served, Spans
from router.tracing.settings import endpoint_of
from router.tracing.spans import envelope, spans_of

log = logging.getLogger("helios.router")

BATCH: Final = 256
"""Requests whose spans are sent together..."""
SLICE: Final = 8
"""...and encoded before others have their turn."""
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
        self._envelope = envelope()
        self._collector = Collector(endpoint_of(settings), settings.timeout_s)
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
                self._collector.close()  # ends its pauses between tries
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
        spans = await self._encoded(self.recorder.take(BATCH))
        taken = await asyncio.to_thread(self._collector.send, self._envelope.of(spans))
        (self._sent if taken else self._failed).inc(len(spans))
        if self._away is taken:
            self._away = not taken
            say = log.info if taken else log.warning
            say("the collector takes spans again" if taken else "the collector takes no spans")

    async def _encoded(self, requests: list[Spans | Served]) -> list[bytes]:
        spans: list[bytes] = []
        for number, request in enumerate(requests):
            if number % SLICE == 0:
                await asyncio.sleep(0)
            spans += spans_of(request, self._scheme)
        return spans
