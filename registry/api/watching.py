"""What a job in the background does, as a stream of NDJSON events: pulls, replications."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from typing import Any, Final, Protocol

import msgspec
from starlette.responses import Response, StreamingResponse

from helios.errors import HeliosError
from registry.pull.progress import Progress

HEARTBEAT_S: Final = 5.0
"""Longest silence on the stream, in seconds: readers take a longer one for a dead registry."""
COALESCE_S: Final = 0.1
"""Figures change with every block; they are sent this often."""


class Watched(Protocol):
    """A job in a thread of its own; ``error`` or its result is set once ``finished`` is."""

    progress: Progress
    finished: threading.Event
    error: HeliosError | None

    def result(self) -> dict[str, Any]:
        """What the last event says when it went well."""


def watching(job: Watched) -> Response:
    """The answer that shows a job until its end. Who stops watching doesn't stop it."""
    return StreamingResponse(_lines(job), media_type="application/x-ndjson", headers={"cache-control": "no-store"})


async def _lines(job: Watched) -> AsyncIterator[bytes]:
    async for event in events(job):
        yield msgspec.json.encode(event) + b"\n"


async def events(job: Watched) -> AsyncIterator[dict[str, Any]]:
    """What happened so far and what happens until the end; the last event is ``done`` or ``error``."""
    loop = asyncio.get_running_loop()
    changed = asyncio.Event()

    def wake() -> None:
        with contextlib.suppress(RuntimeError):  # the loop has closed: the registry stops, and nobody watches any more
            loop.call_soon_threadsafe(changed.set)

    turn = 0
    stop = job.progress.listen(wake)
    try:
        while True:
            changed.clear()
            finished = job.finished.is_set()  # looked at before the events, so that none is missed
            news, turn = job.progress.since(turn)
            for event in news:
                yield event
            if finished:
                yield _outcome(job)
                return
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    await changed.wait()
            except TimeoutError:
                yield job.progress.unfinished() or {"event": "log", "message": "waiting for the other side"}
            else:
                await asyncio.sleep(COALESCE_S)
    finally:
        stop()


def _outcome(job: Watched) -> dict[str, Any]:
    if job.error is not None:
        error = {"code": job.error.code, "message": job.error.message, "hint": job.error.hint}
        return {"event": "error", "error": error}
    return {"event": "done", **job.result()}
