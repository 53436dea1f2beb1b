"""Starts, stops, wakes vLLM and puts it to sleep as clients ask for models (``demand`` decides), and tells the router
which there are.

The router asks over HTTP (``router.admission.wake_url``: ``WakeServer`` answers), workers are registered with its
administration under leases. A model that is to be taken out is drained first and then not registered any more, asleep
or stopped: the router checks nothing there, and asks for it when a request comes. Threads: one for the caller of
``step``, one for each model for which something is being done, those of the server; the lock is held for moments only.
"""

from __future__ import annotations

import contextlib
import json
import math
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Final, NamedTuple, Protocol

from helios.errors import HeliosError, NotFound
from helios.http.client import HttpClient
from helios.launch import sleep
from helios.launch.demand import Demand, Told
from helios.launch.engine_sums import Sums
from helios.launch.needs import Need
from helios.launch.resident import Act, Model, State
from helios.launch.room import Step
from helios.launch.vllm import Vllm
from helios.launch.wanted import Use

LEASE_S: Final = 30.0
RENEW_S: Final = 10.0
LOOK_S: Final = 1.0
"""How often workers are asked whether they are in use, in seconds."""
ANSWER_S: Final = 5.0
"""Longest wait for an answer of the router or of a worker, in seconds."""
DRAIN_S: Final = 60.0
"""What is under way at a worker that is to be taken out gets so long; if that is not enough, it stays."""
MAX_BYTES: Final = 65536
_USE: Final = Sums("request_success_total", "num_requests_running", "num_requests_waiting")


class Launches(Protocol):
    """Starts workers and ends them; threads share it."""

    def size(self, model: Model) -> tuple[Need, ...]:
        """Where the model may be on this machine and what it takes there. Raises HeliosError."""
        ...

    def launch(self, model: Model, need: Need) -> AbstractContextManager[Vllm]:
        """Start vLLM on a model, with what it gets, and don't wait for it; the context lasts until it is ready.
        Raises HeliosError."""
        ...

    def stop(self, worker: Vllm) -> None:
        """End what ``launch`` has started; once more is no harm."""
        ...


@dataclass(slots=True)
class _Running:
    model: Model
    worker: Vllm
    identity: str
    ended: int | None = None
    """Requests that had ended when it was asked last; None: it was not asked yet."""
    looked_at: float = 0.0
    renewed_at: float = 0.0
    told: set[str] = field(default_factory=set)
    """The names under which the router knows it."""
    cordoned: bool = False
    """Whether the router was told to send nothing there."""


class OnDemand:
    """Owns the workers that it starts; leaving the context ends them."""

    def __init__(
        self, demand: Demand, launches: Launches, start_timeout_s: float, note: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """``note`` tells people."""
        self._demand, self._launches, self._stop_worker = demand, launches, launches.stop
        self._start_timeout_s, self._note, self._clock = start_timeout_s, note, clock
        self._lock = threading.Lock()
        self._running: dict[str, _Running] = {}
        self._threads: list[threading.Thread] = []
        self._number = 0
        self._closed = False
        self.due = threading.Event()
        """Set when there may be something to do: somebody has asked, or something has been done."""

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
            told = self._demand.ask(name, commit, revision, self._clock())
        self.due.set()
        return told

    def behind(self, admin: HttpClient) -> None:
        """The administration of the router that is told of the workers; before the first ``step``."""
        self._admin = admin

    def step(self) -> None:
        """Do what is due; to be called several times a second, and when ``due`` is set."""
        now = self._clock()
        with self._lock:
            up = [one for one in self._running.values() if one.model.state is State.UP]
            asleep = [one for one in self._running.values() if one.model.state is State.ASLEEP]
        for one in up:
            self._look(one, now)
        for one in asleep:
            if one.worker.child.poll() is not None:
                self._take_out(one, f"{one.model.name} ended in its sleep; see {one.worker.child.log}")
        with self._lock:
            steps = self._demand.step(now)
        for step in steps:
            self._begin(step)
        self._threads = [thread for thread in self._threads if thread.is_alive()]

    def _begin(self, step: Step) -> None:
        what = {
            Act.SIZE: self._size, Act.START: self._bring, Act.LULL: self._lull, Act.WAKE: self._wake,
            Act.STOP: self._end,
        }[step.act]  # fmt: skip
        name = f"{step.act.value} {step.model.pinned}"
        thread = threading.Thread(target=self._do, args=(what, step.model), name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    # --- one model, in a thread of its own ---

    def _do(self, what: Callable[[Model], None], model: Model) -> None:
        try:
            what(model)
        finally:
            self.due.set()

    def _size(self, model: Model) -> None:
        try:
            needs = self._launches.size(model)
        except Exception as error:  # whatever it was: clients have to hear of it
            with self._lock:
                self._demand.failed(model, _said(error), self._clock())
            self._note(f"{model.name} can't be served: {error}")
        else:
            with self._lock:
                self._demand.sized(model, needs, self._clock())

    def _bring(self, model: Model) -> None:
        running: _Running | None = None
        assert model.need is not None

        def show(text: str) -> None:
            model.progress = text

        self._note(f"{model.name}@{model.commit[:12]} is asked for and is being started.")
        try:
            with self._launches.launch(model, model.need) as worker:
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
                self._demand.failed(model, _said(error), self._clock())
            if not closed:
                self._note(f"{model.name} could not be started: {error}")
        else:
            with self._lock:
                self._demand.up(model, self._clock())
            self._note(f"{model.name}@{model.commit[:12]} answers.")

    def _lull(self, model: Model) -> None:
        running, why = self._running[model.pinned], model.why
        if not self._drained(running):
            return
        try:
            sleep.lull(running.worker.url, model.level)
        except (HeliosError, ValueError) as error:
            self._break(running, f"{model.name} could not be put to sleep and is stopped: {error}")
            return
        with self._lock:
            self._demand.slept(model)
        self._note(f"{model.name}@{model.commit[:12]} sleeps: {why}.")

    def _wake(self, model: Model) -> None:
        running = self._running[model.pinned]
        try:
            sleep.wake(running.worker.url, model.level, self._start_timeout_s)
            self._register(running)
            self._uncordon(running)  # where its registration could not be taken back, it is the cordoned one still
        except (HeliosError, ValueError) as error:
            self._break(running, f"{model.name} could not be woken and is stopped: {error}")
            return
        with self._lock:
            self._demand.up(model, self._clock())
        self._note(f"{model.name}@{model.commit[:12]} is awake.")

    def _end(self, model: Model) -> None:
        running = self._running[model.pinned]
        if not running.told or self._drained(running):
            self._take_out(running, f"{model.name}@{model.commit[:12]} is stopped: {model.why}.")

    def _break(self, one: _Running, why: str) -> None:
        with self._lock:
            self._demand.broke(one.model, self._clock())
            closed = self._closed
        self._take_out(one, "" if closed else why)

    def _take_out(self, one: _Running, why: str) -> None:
        """End its worker; the router does not know of it any more."""
        self._stop_worker(one.worker)
        with self._lock:
            self._running.pop(one.model.pinned, None)
            self._demand.stopped(one.model, self._clock())
        if why:
            self._note(why)

    def _drained(self, one: _Running) -> bool:
        """Whether the router sends nothing there any more and all that it has sent is over. Else it goes on."""
        path = f"/workers/{one.identity}"
        one.cordoned = True
        try:
            wait = {"wait_s": str(DRAIN_S)}
            drained = self._admin.json("POST", f"{path}/drain", params=wait, timeout_s=DRAIN_S + ANSWER_S)["drained"]
        except NotFound:  # its lease has ended: nothing more is sent there
            counts = _counts(one.worker.url)
            drained = counts is not None and not counts.running
        except HeliosError as error:
            self._note(f"the router does not say whether {one.model.name} is in use: {error.message}")
            drained = False
        if not drained:
            with contextlib.suppress(HeliosError):  # tried again at the next look
                self._uncordon(one)
            with self._lock:
                self._demand.keeps(one.model, self._clock())
            return False
        with contextlib.suppress(HeliosError):  # it is cordoned until its lease ends
            self._admin.json("DELETE", path, timeout_s=ANSWER_S)
        one.told = set()
        return True

    def _uncordon(self, one: _Running) -> None:
        self._admin.json("POST", f"/workers/{one.identity}/uncordon", timeout_s=ANSWER_S)
        one.cordoned = False

    # --- those that are up ---

    def _look(self, one: _Running, now: float) -> None:
        if one.worker.child.poll() is not None:
            self._lost(one)
            return
        if now - one.renewed_at >= RENEW_S or one.model.names - one.told:
            with contextlib.suppress(HeliosError):  # tried again at the next look
                self._register(one)
        if one.cordoned:
            with contextlib.suppress(HeliosError):
                self._uncordon(one)
        if now - one.looked_at >= LOOK_S:
            one.looked_at = now
            use = _use(one, _counts(one.worker.url))
            with self._lock:
                self._demand.looked(one.model, use, now)

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


def _said(error: Exception) -> str:
    """What clients hear of it: no logs."""
    return str(error).partition("\n")[0]


class _Counts(NamedTuple):
    """What a worker counts: requests that it has, and that have ended since it was started."""

    running: int
    ended: int


def _counts(url: str) -> _Counts | None:
    """None where it does not say."""
    client = HttpClient(url, timeout_s=ANSWER_S, max_idle=0)
    try:
        counts = _USE.of(client.bytes("GET", "/metrics"))
        running = counts["num_requests_running"] + counts["num_requests_waiting"]
        return _Counts(math.ceil(running), int(counts.get("request_success_total", 0.0)))
    except (HeliosError, ValueError, KeyError, OverflowError):
        return None
    finally:
        client.close()


def _use(one: _Running, counts: _Counts | None) -> Use:
    """What that means beside the counts before."""
    if counts is None:
        return Use(None, None)
    before, one.ended = one.ended, counts.ended
    return Use(counts.running, None if before is None else abs(counts.ended - before))


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
