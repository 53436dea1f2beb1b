"""Looks at a vLLM that is up, again every second, in a thread of its own: whoever waits for the answers is not who
starts, stops and hears signals."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from types import TracebackType
from typing import Final

from helios.errors import HeliosError, Unavailable
from helios.http.client import HttpClient
from helios.launch.engine_sums import Sums
from helios.launch.worker.life import Look

EVERY_S: Final = 1.0
ANSWER_S: Final = 5.0
"""Longest wait for one answer, in seconds."""
METRICS_MAX: Final = 16 << 20
"""Longest exposition that is read, in bytes: vLLM's is about 100 KB."""
LOAD_MAX: Final = 1 << 16
TEXT: Final = {"accept": "text/plain;version=0.0.4"}
"""The format that is asked for; OpenMetrics could not be joined with another exposition."""
_SAMPLES: Final = re.compile(rb"^vllm:(?!lora_requests_info)[^\n]*", re.MULTILINE)
_REQUESTS: Final = Sums("num_requests_running", "num_requests_waiting")


def exposition(client: HttpClient) -> bytes:
    """vLLM's metrics; raises HeliosError where they can't be had in time, or are too long."""
    with client.request("GET", "/metrics", headers=TEXT) as response:
        text = response.read(METRICS_MAX)
    if response.status != HTTPStatus.OK:
        raise Unavailable(f"/metrics answers {response.status}")
    return text


def read(client: HttpClient, now: Callable[[], float] = time.monotonic) -> Look:
    """One look; raises nothing: what can't be asked is told as a failure, or as not known."""
    at = now()
    try:
        with client.request("GET", "/health") as response:
            response.read(LOAD_MAX)
            failure = "" if response.status == HTTPStatus.OK else f"/health answers {response.status}"
    except HeliosError as error:
        return Look(at, error.message)
    try:
        text = exposition(client)
        counts = _REQUESTS.of(text)
        counted = _counted(client)
    except (HeliosError, ValueError):
        return Look(at, failure)
    if not counts:
        return Look(at, failure, computing=counted, counted=counted)
    running = int(counts.get("num_requests_running", 0.0))
    waiting = int(counts.get("num_requests_waiting", 0.0))
    mark = hashlib.blake2b(b"\n".join(_SAMPLES.findall(text)), digest_size=16).digest()
    return Look(at, failure, running + waiting, running, counted, mark)


def _counted(client: HttpClient) -> int | None:
    """What vLLM counts with ``--enable-server-load-tracking``; it says 0 without."""
    try:
        return int(json.loads(client.bytes("GET", "/load", limit=LOAD_MAX))["server_load"])
    except (HeliosError, ValueError, KeyError, TypeError):
        return None


class Looks:
    """A context: looks at ``url`` while it is told to; ``take`` gives what was seen."""

    def __init__(self, url: str) -> None:
        self._client = HttpClient(url, timeout_s=ANSWER_S, max_idle=1)
        self._lock = threading.Lock()
        self._seen: list[Look] = []
        self._wanted = threading.Event()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="looks at vLLM", daemon=True)

    def __enter__(self) -> Looks:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._ending.set()
        self._wanted.set()
        self._thread.join(3 * ANSWER_S)
        self._client.close()

    def want(self, wanted: bool) -> None:
        """Whether there is something to look at."""
        if wanted:
            self._wanted.set()
        else:
            self._wanted.clear()

    def take(self) -> list[Look]:
        """What was seen since the last call, oldest first."""
        with self._lock:
            seen, self._seen = self._seen, []
        return seen

    def _run(self) -> None:
        while self._wanted.wait() and not self._ending.is_set():
            look = read(self._client)
            with self._lock:
                self._seen = [*self._seen[-8:], look]
            self._ending.wait(EVERY_S)
