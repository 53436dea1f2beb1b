"""A start that counts only once a request has been answered: what compiles, or fails, at the first one does so before
anybody waits for it."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

from helios.errors import DeadlineExceeded, HeliosError, Unavailable
from helios.http.client import HttpClient
from helios.http.response import Watch
from helios.launch.fleet import Follows
from helios.launch.model_info import Task

ANSWER_S: Final = 300.0
"""Longest wait for the answer, in seconds: kernels are compiled meanwhile, and a CPU is slow."""
FIRST_S: Final = 1.0
MOST_S: Final = 15.0
"""Between one that failed and the next, in seconds; it doubles."""
TEXT: Final = "Hello"
ANSWER_MAX: Final = 4 << 20
SHOWN: Final = 500
"""How much of an answer that is an error is shown, in characters."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked: a path of the API, its body, and the key that vLLM wants, if any."""

    path: str
    body: Mapping[str, Any]
    key: str = ""


def request(model: str, task: Task, key: str = "") -> Request:
    """The smallest request for a model of this kind, through the API that clients use."""
    if task == "embedding":
        return Request("/v1/embeddings", {"model": model, "input": TEXT}, key)
    body = {"model": model, "max_tokens": 1, "temperature": 0}
    if task == "chat":
        return Request("/v1/chat/completions", {**body, "messages": [{"role": "user", "content": TEXT}]}, key)
    return Request("/v1/completions", {**body, "prompt": TEXT}, key)


def key_of(arguments: Sequence[str], environ: Mapping[str, str] = os.environ) -> str:
    """The first key that vLLM is given: its ``--api-key``, else VLLM_API_KEY; empty: it wants none."""
    for at, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == "--api-key":
            return value if equals else next(iter(arguments[at + 1 : at + 2]), "")
    return environ.get("VLLM_API_KEY", "")


def ask(url: str, asked: Request, watch: Watch) -> None:
    """Send the request; raises HeliosError, with what vLLM said, where it is not answered with a result."""
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {asked.key}"} if asked.key else {})
    client = HttpClient(url, timeout_s=ANSWER_S, max_idle=0)
    try:
        content = json.dumps(asked.body).encode()
        with client.request("POST", asked.path, headers=headers, body=content, watch=watch) as response:
            answer = response.read(ANSWER_MAX)
    finally:
        client.close()
    try:
        document = json.loads(answer)
        good = response.status == HTTPStatus.OK and bool(document.get("choices") or document.get("data"))
    except (ValueError, AttributeError):
        good = False
    if not good:
        raise Unavailable(f"{asked.path} answered {response.status}: {answer[:SHOWN].decode(errors='replace').strip()}")


class WarmStart:
    """A start (``inner``), and a request after it, in a thread of its own; it is sent again until it is answered."""

    def __init__(
        self, inner: Follows, url: str, asked: Request | None, note: Callable[[str], None], *,
        entered: Callable[[str], None] = lambda phase: None, done: Callable[[bool], None] = lambda answered: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """``asked``: None: no request; ``note`` tells people; ``entered`` hears of each phase, and ``done`` of each
        request whether it was answered."""
        self._inner, self._url, self._asked = inner, url, asked
        self._note, self._entered, self._done, self._clock = note, entered, done, clock
        self._healthy = self._warm = False
        self._watch, self._closing = Watch(), False
        self._thread: threading.Thread | None = None
        self._failure: HeliosError | None = None
        """Of the request that failed last; told, and shown until one is answered."""
        self._pause_s, self._again_at = FIRST_S, 0.0

    @property
    def doing(self) -> str:
        if not self._healthy:
            return self._inner.doing
        return "warming up" if self._failure is None else f"the warm-up request fails: {self._failure.message}"

    def look(self, show: Callable[[str], None]) -> bool:
        def tell(phase: str) -> None:
            self._entered(phase)
            show(phase)

        if not self._healthy:
            self._healthy = self._inner.look(tell)
            if self._healthy and self._asked is None:
                self._warm = True
            elif self._healthy:
                tell(self.doing)
        elif self._thread is None and self._clock() >= self._again_at:
            self._thread = threading.Thread(target=self._ask, name="warm-up", daemon=True)
            self._thread.start()
        elif self._thread is not None and not self._thread.is_alive():
            self._thread.join()
            self._thread = None
        return self._warm

    def _ask(self) -> None:
        assert self._asked is not None
        try:
            ask(self._url, self._asked, self._watch)
        except HeliosError as error:
            if self._closing:
                return
            now = self._clock()
            self._again_at, self._pause_s = now + self._pause_s, min(MOST_S, 2 * self._pause_s)
            if self._failure is None or self._failure.message != error.message:
                self._note(f"The warm-up request failed, and is sent again: {error.message}")
            self._failure = error
            self._done(False)
        else:
            self._done(True)
            self._failure, self._warm = None, True

    def ended(self, status: int) -> HeliosError:
        return self._inner.ended(status)

    def late(self, timeout_s: float) -> HeliosError:
        error = self._inner.late(timeout_s)
        if not self._healthy or self._failure is None:
            return error
        return DeadlineExceeded(
            f"vLLM answers /health, but no request after {timeout_s:g} s: {self._failure.message}",
            hint="A model that takes no text is not to be asked: HELIOS_WORKER__WARM_UP=off.",
        )

    def close(self) -> None:
        self._closing = True
        self._watch.cut()
        if self._thread is not None:
            self._thread.join(ANSWER_S)
        self._inner.close()
