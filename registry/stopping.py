"""Stopping jobs that run in threads of their own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import Protocol, TypeVar


class Stoppable(Protocol):
    """A job: it looks at ``stop`` now and then, and sets ``finished`` last."""

    stop: threading.Event
    finished: threading.Event


J = TypeVar("J", bound=Stoppable)


def stop_all(jobs: Iterable[J], timeout_s: float) -> list[J]:
    """Tell all jobs to stop and wait for them, ``timeout_s`` together; returns those that have not ended."""
    jobs = list(jobs)
    for job in jobs:
        job.stop.set()
    end = time.monotonic() + timeout_s
    return [job for job in jobs if not job.finished.wait(max(0.0, end - time.monotonic()))]
