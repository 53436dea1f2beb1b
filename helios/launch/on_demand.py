"""Starts and stops vLLM as clients ask for models (``demand`` decides), and tells the router which there are.

The router asks over HTTP (``router.admission.wake_url``: ``WakeServer`` answers), workers are registered with its
administration under leases. A model that is to be stopped is drained first. Threads: one for the caller of ``step``,
one for each model that is being started or stopped, those of the server; the lock is held for moments only.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Final

from helios.errors import HeliosError
from helios.http.client import HttpClient
from helios.launch.demand import Demand, Model, State, Told
from helios.launch.vllm import Vllm

LEASE_S: Final = 30.0
RENEW_S: Final = 10.0
LOOK_S: Final = 1.0
"""How often workers are asked whether they are in use, in seconds."""
ANSWER_S: Final = 5.0
"""Longest wait for an answer of the router or of a worker, in seconds."""
DRAIN_S: Final = 60.0
"""What is under way at a worker that is to be stopped gets so long; if that is not enough, it keeps its place."""
MAX_BYTES: Final = 65536
_USE: Final = re.compile(
    rb"^vllm:(request_success_total|num_requests_running|num_requests_waiting)(?:\{[^\n]*\})?[ \t]+(\S+)", re.MULTILINE
)

Launch = Callable[[Model], AbstractContextManager[Vllm]]
"""Starts vLLM on a model without waiting for it; the context lasts until it is ready. Raises HeliosError."""


@dataclass(slots=True)
class _Running:
    model: Model
    worker: Vllm
    identity: str
    uses: float = -1.0
    """What its counters said last."""
    looked_at: float = 0.0
    renewed_at: float = 0.0
    told: set[str] = field(default_factory=set)
    """The names under which the router knows it."""


class OnDemand:
    """Owns the workers that it starts; leaving the context ends them."""

    def __init__(
        self, demand: Demand, launch: Launch, stop: Callable[[Vllm], None], start_timeout_s: float,
        note: Callable[[str], None], clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """``stop`` ends what ``launch`` has started; ``note`` tells people."""
        self._demand, self._launch, self._stop_worker = demand, launch, stop
        self._start_timeout_s, self._note, self._clock = start_timeout_s, note, clock
        self._lock = threading.Lock()
        self._running: dict[str, _Running] = {}
        self._threads: list[threading.Thread] = []
        self._number = 0
        self._closed = False

    def __enter__(self) -> OnDemand:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with self._lock:
            self._closed = True
            running = list(self._running.values())
        for one in running:
            self._stop_worker(one.worker)
        for thread in self._threads:  # what each waits for has a deadline, or has just been ended
            thread.join(DRAIN_S + 2 * ANSWER_S)

    def ask(self, name: str, commit: str, revision: str) -> Told:
        """Somebody wants a model; any thread may say so."""
        with self._lock:
            return self._demand.ask(name, commit, revision, self._clock())

    def behind(self, admin: HttpClient) -> None:
        """The administration of the router that is told of the workers; before the first ``step``."""
        self._admin = admin

    def step(self) -> None:
        """Do what is due; to be called several times a second."""
        now = self._clock()
        with self._lock:
            up = [one for one in self._running.values() if one.model.state is State.UP]
        for one in up:
            self._look(one, now)
        with self._lock:
            starting, stopping = self._demand.to_start(now), self._demand.to_stop(now)
        for model in starting:
            self._begin(self._bring, model)
        for model in stopping:
            self._begin(self._end, model)
        self._threads = [thread for thread in self._threads if thread.is_alive()]

    def _begin(self, what: Callable[[Model], None], model: Model) -> None:
        thread = threading.Thread(target=what, args=(model,), name=f"{what.__name__} {model.pinned}", daemon=True)
        self._threads.append(thread)
        thread.start()

    # --- one model, in a thread of its own ---

    def _bring(self, model: Model) -> None:
        running: _Running | None = None

        def show(text: str) -> None:
            model.progress = text

        self._note(f"{model.name}@{model.commit[:12]} is asked for and is being started.")
        try:
            with self._launch(model) as worker:
                with self._lock:
                    self._number += 1
                    running = self._running[model.pinned] = _Running(model, worker, f"on-demand-{self._number}")
                    closed = self._closed
                if closed:
                    self._stop_worker(worker)
                    return
                worker.wait_ready(self._start_timeout_s, show)
            self._register(running)
        except Exception as error:  # whatever it was: the model must not stay half started
            if running is not None:
                self._stop_worker(running.worker)
            with self._lock:
                self._running.pop(model.pinned, None)
                closed = self._closed
                self._demand.failed(model, str(error).partition("\n")[0], self._clock())
            if not closed:
                self._note(f"{model.name} could not be started: {error}")
        else:
            with self._lock:
                self._demand.up(model, self._clock())
            self._note(f"{model.name}@{model.commit[:12]} answers.")

    def _end(self, model: Model) -> None:
        running = self._running[model.pinned]
        try:
            path = f"/workers/{running.identity}"
            drained = self._admin.json(
                "POST", f"{path}/drain", params={"wait_s": str(DRAIN_S)}, timeout_s=DRAIN_S + ANSWER_S
            )
            if not drained["drained"]:
                self._admin.json("POST", f"{path}/uncordon", timeout_s=ANSWER_S)
                with self._lock:
                    self._demand.keeps(model, self._clock())
                return
            self._admin.json("DELETE", path, timeout_s=ANSWER_S)
        except HeliosError as error:  # its lease ends
            self._note(f"the router was not told that {model.name} is stopped: {error.message}")
        self._stop_worker(running.worker)
        with self._lock:
            del self._running[model.pinned]
            self._demand.stopped(model, self._clock())
        self._note(f"{model.name}@{model.commit[:12]} was not used and is stopped.")

    # --- those that are up ---

    def _look(self, one: _Running, now: float) -> None:
        if one.worker.child.poll() is not None:
            self._lost(one)
            return
        if now - one.renewed_at >= RENEW_S or one.model.names - one.told:
            with contextlib.suppress(HeliosError):  # tried again at the next look
                self._register(one)
        if now - one.looked_at >= LOOK_S:
            one.looked_at = now
            uses = _uses(one.worker.url)
            if uses is None or uses != one.uses:
                one.uses = one.uses if uses is None else uses
                with self._lock:
                    self._demand.used(one.model, now)

    def _lost(self, one: _Running) -> None:
        with contextlib.suppress(HeliosError):  # its lease ends
            self._admin.json("DELETE", f"/workers/{one.identity}", timeout_s=ANSWER_S)
        self._stop_worker(one.worker)
        status = one.worker.child.poll()
        with self._lock:
            self._running.pop(one.model.pinned, None)
            self._demand.failed(one.model, f"its vLLM ended with status {status}", self._clock())
        self._note(f"{one.model.name}: vLLM ended with status {status}; see {one.worker.child.log}")

    def _register(self, one: _Running) -> None:
        names = set(one.model.names)
        body = {"url": one.worker.url, "models": sorted(names), "revision": one.model.commit, "lease_s": LEASE_S}
        self._admin.json("PUT", f"/workers/{one.identity}", body=body, timeout_s=ANSWER_S)
        one.renewed_at, one.told = self._clock(), names


def _uses(url: str) -> float | None:
    """A number that changes whenever a worker is used; None where it does not say, or is in use now."""
    client = HttpClient(url, timeout_s=ANSWER_S, max_idle=0)
    try:
        found = _USE.findall(client.bytes("GET", "/metrics"))
        counts = {name: 0.0 for name, _ in found}
        for name, value in found:
            counts[name] += float(value)
    except (HeliosError, ValueError):
        return None
    finally:
        client.close()
    if not counts or counts.get(b"num_requests_running", 0.0) or counts.get(b"num_requests_waiting", 0.0):
        return None
    return counts.get(b"request_success_total", 0.0)


class WakeServer:
    """What the router asks (docs/router-discovery.md, "Waking"): on loopback, at a path that nobody else knows."""

    def __init__(self, ask: Callable[[str, str, str], Told]) -> None:
        path = f"/{secrets.token_urlsafe(24)}"

        class Handler(BaseHTTPRequestHandler):
            timeout = ANSWER_S

            def do_POST(self) -> None:
                status, document = answered(self.rfile.read(self._length())) if self.path == path else (404, {})
                content = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def _length(self) -> int:
                text = self.headers.get("content-length", "0")
                return min(MAX_BYTES, int(text)) if text.isdecimal() else 0

            def log_message(self, *_: object) -> None: ...

        def answered(body: bytes) -> tuple[int, dict[str, Any]]:
            try:
                said = json.loads(body)
                name, commit, revision = (str(said.get(key, "")) for key in ("model", "commit", "revision"))
            except (ValueError, AttributeError):
                return 400, {"message": "the body is a JSON object"}
            told = ask(name, commit, revision)
            return (202, {"progress": told.text}) if told.comes else (409, {"message": told.text})

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="wakes", daemon=True
        )
        self.url = f"http://127.0.0.1:{self._server.server_port}{path}"

    def __enter__(self) -> WakeServer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
