"""``helios worker``: starts one vLLM on a directory that is there, says when it takes requests, and drains it.

The main thread looks after vLLM (``Fleet``) and decides (``Life``) several times a second; threads beside it answer
probes (``Front``), look at vLLM (``Looks``), show its log and register it (``Registrar``). They share a ``Board``.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Final

from helios.config import Config, ServedSettings
from helios.embedded import attach
from helios.errors import InvalidInput, UsageError
from helios.home import Home
from helios.http.hosts import WILDCARDS
from helios.http.server import listen_tcp, listen_unix, url_of
from helios.launch import roles, vllm
from helios.launch.compile_cache import Caches, CompileCaches, LocalCaches
from helios.launch.compile_commits import Commits, FetchedCommits, MountedCommits
from helios.launch.fleet import Fleet, Follows
from helios.launch.grace import LATE_S
from helios.launch.logs import Followers, prefixed, recorded
from helios.launch.model_info import Task
from helios.launch.plan import Placement, Wish
from helios.launch.processes import Children, repair
from helios.launch.worker.found import Found, find, readable
from helios.launch.worker.front import Board, Front
from helios.launch.worker.labels import Labels
from helios.launch.worker.life import Life, Limits, State
from helios.launch.worker.looks import Looks
from helios.launch.worker.phases import PhaseTimes
from helios.launch.worker.registering import Registrar, checked
from helios.launch.worker.warming import WarmStart, key_of, request
from helios.launch.workers import At, Served, Workers, require_nixl
from helios.metrics import WorkerMetrics
from helios.names import RepoId, is_commit
from helios.tokens import TokenFile, no_token

log = logging.getLogger("helios.worker")

WITHDRAW_S: Final = 10.0
"""Longest wait for routers to take the registration back, in seconds; after that its lease has to end by itself."""
SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
OURS: Final = {
    "--host": "--host",
    "--port": "--vllm-port",
    "--served-model-name": "--name",
    "--uds": "--host and --vllm-port",
    "--ssl-keyfile": "a mesh or a gateway for TLS",
    "--ssl-certfile": "a mesh or a gateway for TLS",
    "--headless": "no worker for it",
}
"""Arguments of vLLM that a worker can't have given to it, and what there is instead."""


@dataclass(frozen=True, slots=True)
class Ready:
    """What is announced when it takes requests for the first time: ``url`` is vLLM's, ``front`` the front's."""

    url: str
    front: str
    model: str
    revision: str
    role: str


def run(home: Home, config: Config, model: str, arguments: Sequence[str], announce: Callable[[Ready], None]) -> int:
    """Serve until a signal, or the end of a drain that one asks for; the exit status.

    Raises UsageError for settings that can't be, NotFound or InvalidInput for a model that is none, Unavailable where
    the machine does not suffice, a port is taken, or vLLM can't be started.
    """
    settings = config.worker
    vllm.require_vllm()
    _check(settings, arguments)
    found = find(model, settings.name, settings.revision, home)
    token = TokenFile(Path(settings.router_token_file)) if settings.router_token_file else no_token
    for name in repair(home):
        log.warning("an earlier run was killed and had left a process behind: ended", extra={"process": name})
    board = Board()
    with Signals(board) as signals, contextlib.ExitStack() as stack:
        front_socket = stack.enter_context(contextlib.closing(listen_tcp(settings.host, settings.port)))
        front_port: int = front_socket.getsockname()[1]
        path = home.socket(f"worker-{front_port}")
        stack.callback(path.unlink, missing_ok=True)
        drain_socket = stack.enter_context(contextlib.closing(listen_unix(path)))
        ports = _ports(settings, stack)
        with readable(found.path):
            served = Served.read(found.name, found.revision, found.path, arguments)
            (placement,) = served.placements(Wish(alone=settings.role))
        caches = _caches(home, config, found, stack)
        as_json = config.log.format == "json" or (config.log.format == "auto" and not sys.stderr.isatty())
        followers = stack.enter_context(Followers(sys.stderr, recorded if as_json else prefixed))
        children = stack.enter_context(Children(home))
        signals.at_once = children.kill
        at = At(settings.host, {placement.name: ports}, _arguments(), LATE_S + settings.stop_s)
        lease_s = config.router.disaggregation.lease_s
        workers = stack.enter_context(Workers(served, [placement], children, lease_s, followers, caches, at))
        metrics, engine = WorkerMetrics(), vllm.url_at(settings.host, ports.api)
        labels = Labels({"model": found.name, "revision": found.revision, "role": settings.role})
        stack.enter_context(
            Front(board, [front_socket, drain_socket], metrics, labels, engine, settings.drain_s, settings.remote_drain)
        )
        registrar = stack.enter_context(
            Registrar(
                settings.routers, token, settings.id or socket.gethostname(), said_of(found, settings, ports, served),
                settings.lease_s, metrics.registration_failures.inc,
            )
        )  # fmt: skip
        looks = stack.enter_context(Looks(engine))
        ready = Ready(engine, url_of(front_socket, settings.host), found.name, found.revision, settings.role)
        key = key_of(arguments)
        worker = Supervisor(settings, workers, placement, served.info.task, key, found.name, board, metrics)
        log.info(
            "starting vLLM",
            extra={"model": found.name, "revision": found.revision, "role": settings.role, "front": ready.front},
        )
        worker.stay(looks, registrar, signals, lambda: announce(ready))
    return signals.status(board.state)


def _check(settings: ServedSettings, arguments: Sequence[str]) -> None:
    """Raises UsageError for what can't be, before anything is looked at."""
    for argument in arguments:
        name = argument.partition("=")[0].replace("_", "-")
        if name in OURS:
            raise UsageError(f"vLLM's {name} is helios worker's own business", hint=f"Use {OURS[name]} instead.")
    checked(settings.routers)
    if (settings.advertise or settings.host) in WILDCARDS and (settings.role != "both" or settings.routers):
        raise UsageError(
            f"routers and other workers can't be told of {settings.advertise or settings.host} as an address",
            hint="Set HELIOS_WORKER__ADVERTISE to the pod's IP: valueFrom: {fieldRef: {fieldPath: status.podIP}}.",
        )
    if settings.role != "both":
        require_nixl()


def _ports(settings: ServedSettings, stack: contextlib.ExitStack) -> roles.Ports:
    api = settings.vllm_port
    if api:
        listen_tcp(settings.host, api, "--vllm-port").close()
    else:
        api = stack.enter_context(vllm.reserved_port())
    apart = settings.role != "both"
    return roles.Ports(
        api, settings.side_channel_port if apart else 0, settings.kv_events_port, settings.kv_replay_port,
        settings.advertise or settings.host,
    )  # fmt: skip


def _caches(home: Home, config: Config, found: Found, stack: contextlib.ExitStack) -> Caches:
    """Compiled kernels are shared through the registry where that is configured, or the model is in a mount of this
    home; else they stay below the home."""
    named = is_commit(found.revision) and bool(config.registry.urls)
    if config.compile_cache.mode == "off" or not (named or found.mountpoint):
        return LocalCaches(home)
    try:
        repo = RepoId.parse(found.name)
    except InvalidInput:  # it is served under a name of its own
        return LocalCaches(home)
    registry = stack.enter_context(attach(config, home))
    commits: Commits
    if found.mountpoint is not None:
        commits = MountedCommits(found.mountpoint)
    else:
        commits = stack.enter_context(FetchedCommits(home, found.path, repo, found.revision, registry.urls))
    return stack.enter_context(CompileCaches(home, config.compile_cache, registry.client(), commits, log.info))


def _arguments() -> list[str]:
    """What vLLM is told beside what ``helios serve`` tells it: to count requests to the end of their answers, to end
    those of the last moment, and not to log one line for each and for each probe."""
    return ["--enable-server-load-tracking", "--shutdown-timeout", str(LATE_S), "--disable-uvicorn-access-log"]


def said_of(found: Found, settings: ServedSettings, ports: roles.Ports, served: Served) -> dict[str, object]:
    """The worker as routers are told of it (docs/router-discovery.md)."""
    said: dict[str, object] = {
        "url": ports.at("http", ports.api),
        "models": [found.name],
        "role": settings.role,
        "revision": found.revision,
        "kv_events": "none",
    }
    if ports.events and served.info.task != "embedding":
        said["kv_events"] = ports.at("tcp", ports.events)
        said["kv_replay"] = ports.at("tcp", ports.replay) if ports.replay else "none"
        said["kv_ranks"] = max(1, roles.ranks(served.arguments))
    return said


class Signals:
    """A context: the first signal has the worker drain and end, another one ends it at once."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self.first: signal.Signals | None = None
        self.again: signal.Signals | None = None
        self.at_once: Callable[[], None] = lambda: None
        """What a second signal does, whatever the main thread waits for."""

    def __enter__(self) -> Signals:
        self._before = {sig: signal.signal(sig, self._come) for sig in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for sig, before in self._before.items():
            signal.signal(sig, before)

    def _come(self, number: int, frame: FrameType | None) -> None:
        if self.first is None:
            self.first = signal.Signals(number)
            self._board.ask_to_drain(self.first.name)
        else:
            self.again = signal.Signals(number)
            self.at_once()

    def status(self, state: State) -> int:
        """The exit status: being stopped is how it ends well, unless somebody was cut off."""
        if self.again is not None:
            return 128 + self.again
        if self.first is signal.SIGINT:
            return 128 + signal.SIGINT
        return 1 if state.cut else 0


class Supervisor:
    """The main thread's work: it starts vLLM, starts it again, and decides what the front says."""

    def __init__(
        self, settings: ServedSettings, workers: Workers, placement: Placement, task: Task, key: str, name: str,
        board: Board, metrics: WorkerMetrics, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """``task``, ``key``, ``name``: what a warm-up request needs."""
        self._settings, self._workers, self._placement = settings, workers, placement
        self._asked = request(name, task, key) if settings.warm_up == "on" else None
        self._board, self._metrics, self._clock = board, metrics, clock
        self._life = Life(Limits(settings.settle_s, settings.drain_s, settings.hang_s))
        self._starts = 0
        self._times = PhaseTimes(clock())
        self._drain_at: float | None = None

    def stay(self, looks: Looks, registrar: Registrar, signals: Signals, ready: Callable[[], None]) -> None:
        """Until it has drained and a signal has come, or two have; ``ready`` is called when it is for the first time.

        Raises Unavailable, with the end of its log, for a vLLM that can't be started, DeadlineExceeded for a first
        start that takes too long."""
        announced = False
        timeout_s = self._settings.start_timeout_s
        with Fleet(self._workers, [self._placement], timeout_s, log.warning, follow=self._follow) as fleet:
            while signals.again is None and not (signals.first and self._life.state.drained):
                self._step(fleet, looks, registrar)
                state = self._board.state
                if state.ready and not announced:
                    announced = True
                    ready()
                time.sleep(vllm.POLL_S)
            looks.want(False)
            state = self._life.state
            if state.cut:
                log.warning("requests are cut off: the deadline has passed", extra={"requests": state.cut})
            log.info("stopping vLLM")

    def _step(self, fleet: Fleet, looks: Looks, registrar: Registrar) -> None:
        """One turn: look at vLLM, say what follows."""
        if self._drain_at is None:
            fleet.step()
        up = fleet.up and fleet.workers[0].child.poll() is None
        now = self._clock()
        self._life.engine(now, up, fleet.doing or "it has ended")
        looks.want(up)
        for look in looks.take():
            self._life.looked(look)
        if (why := self._board.asked_to_drain) is not None:
            self._drain(now, why, registrar)
        registrar.want(self._life.state.ready)
        before, state = self._board.state, self._life.state
        self._board.say(state, up)
        self._metrics.ready.set(state.ready)
        self._metrics.live.set(state.live)
        self._metrics.draining.set(state.draining)
        self._metrics.registrations.set(registrar.held)
        if (before.ready, before.live) != (state.ready, state.live):
            log.log(logging.INFO if state.ready or state.draining else logging.WARNING,
                    "ready" if state.ready else "not ready", extra={"why": state.why, "live": state.live})  # fmt: skip

    def _drain(self, now: float, why: str, registrar: Registrar) -> None:
        if self._drain_at is None:
            self._drain_at = now
            log.info("draining", extra={"why": why})
            self._life.drain(now, why)
        registrar.want(False)
        if registrar.withdrawn or now - self._drain_at > WITHDRAW_S:
            self._life.withdrawn(now)

    def _follow(self, worker: vllm.Vllm) -> Follows:
        self._starts += 1
        if self._starts > 1:
            self._metrics.restarts.inc()
        times = self._times = PhaseTimes(self._clock())

        def entered(phase: str) -> None:
            times.entered(phase, self._clock())

        def done(answered: bool) -> None:
            self._metrics.warm_ups.labels("answered" if answered else "failed").inc()
            if answered:
                self._started(times)

        return WarmStart(
            vllm.Starting(worker), worker.url, self._asked, log.warning, entered=entered, done=done, clock=self._clock
        )

    def _started(self, times: PhaseTimes) -> None:
        now = self._clock()
        self._metrics.phase_seconds.clear()
        for phase, seconds in times.ended(now).items():
            self._metrics.phase_seconds.labels(phase).set(seconds)
        self._metrics.start_seconds.set(times.total(now))
