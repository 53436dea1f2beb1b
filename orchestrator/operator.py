"""The operator: caches that follow the cluster, one leader that works, and what it says of its health.

Every process follows, so that one that begins to lead knows everything at once. Only the leader has turns.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from helios.cluster import cluster_client, require_client
from helios.config import OperatorSettings
from helios.errors import UsageError
from helios.kube.following import BACKOFF_S, Clients, Follower, Pace
from helios.kube.kinds import Kind
from helios.metrics import OperatorMetrics
from orchestrator.actions import Reconciler
from orchestrator.runtime.cache import Trim
from orchestrator.runtime.controller import Controller
from orchestrator.runtime.events import Recorder
from orchestrator.runtime.leading import Leadership
from orchestrator.runtime.lease import Election, Times
from orchestrator.runtime.performing import Performer
from orchestrator.runtime.queue import Limits
from orchestrator.runtime.refusals import NotLeading
from orchestrator.runtime.writes import Connection, Leases, Writer

log = logging.getLogger("helios.operator")

ABSENT_S: Final = 60.0
"""How often is looked whether a kind that was not installed is by now, in seconds."""
STOP_S: Final = 10.0
"""Longest time for what is under way at the end, in seconds."""


class Watched(msgspec.Struct, frozen=True):
    """What of a kind is wanted: a label selector where most of its objects are other people's; a part of large ones."""

    selector: str = ""
    trim: Trim | None = None


@dataclass(frozen=True)
class Work:
    """What an operator does. ``beside``: what runs as long as it does, in every process; none of it ends by itself.
    ``begin``: told each time when this process begins to lead."""

    reconcilers: Sequence[Reconciler[Any]]
    watched: Mapping[Kind, Watched] = field(default_factory=dict)
    beside: Callable[[Operator], Sequence[Coroutine[Any, Any, None]]] = lambda operator: ()
    begin: Callable[[], None] = lambda: None


class Operator:
    """One process of it. ``run`` runs until it is cancelled, and has given the lease back by then."""

    def __init__(
        self, settings: OperatorSettings, work: Work, clients: Clients, metrics: OperatorMetrics, *,
        clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time,
        limits: Limits | None = None, backoff_s: tuple[float, float] = BACKOFF_S,
    ) -> None:  # fmt: skip
        """Raises UsageError for settings that can't work."""
        self._work, self._watched = work, work.watched
        self.identity = f"{socket.gethostname()[:60]}_{secrets.token_hex(8)}"
        self._settings, self._metrics, self._clock = settings, metrics, clock
        self._pace = Pace(settings.silence_s, settings.watch_s, settings.relist_s, ABSENT_S, backoff_s)
        self._active: dict[Kind, float] = {}
        trims = {kind: one.trim for kind, one in self._watched.items() if one.trim is not None}
        self.controller = Controller(work.reconcilers, metrics, clock, wall, limits=limits, trims=trims)
        self._connection = Connection(clients)
        times = Times(settings.lease_s, settings.renew_s, settings.retry_s)
        leases = Leases(self._connection, settings.lease_namespace, settings.lease_name, settings.renew_s / 2)
        election = Election(self.identity, times, clock, wall)
        self.leadership = Leadership(election, leases, times, told=metrics.leading.set)
        self._writer = Writer(self._connection, self.leadership.remaining_s, metrics, call_s=settings.call_s)
        recorder = Recorder(self.identity, clock, wall)
        self._performer = Performer(self.controller.cache, self._writer, recorder, metrics, clock)

    # --- health ---

    @property
    def unlive(self) -> str:
        """Which kinds nobody follows any more; empty: none. While the API server is away it is tried again and again,
        and a restart would not help."""
        limit = 3 * (self._settings.silence_s + self._settings.watch_s)
        now = self._clock()
        dead = sorted(kind.resource for kind, active in self._active.items() if now - active > limit)
        return f"nothing was heard or tried for {limit:g} s of {', '.join(dead)}" if dead else ""

    @property
    def unready(self) -> str:
        """Which kinds have not been listed yet; empty: all have."""
        missing = sorted(kind.resource for kind in self.controller.cache.missing)
        return f"not listed yet: {', '.join(missing)}" if missing else ""

    # --- running ---

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                for kind, known in self.controller.cache.followed.items():
                    self._active[kind] = self._clock()
                    told = _Told(kind, self._active, self._metrics, self._clock)
                    follower = Follower(
                        kind, known, self._connection.client, told, self._pace, clock=self._clock,
                        everywhere=not self._settings.namespace, fresh=self.controller.wake,
                        selector=self._watched.get(kind, Watched()).selector,
                    )  # fmt: skip
                    tasks.create_task(follower.run())
                for one in self._work.beside(self):
                    tasks.create_task(one)
                tasks.create_task(self._resync())
                tasks.create_task(self.leadership.run(self._lead))
        finally:
            await self._connection.close()

    async def _lead(self) -> None:
        self._work.begin()
        self.controller.add_all()
        try:
            await self.controller.work(self._performer, workers=self._settings.workers)
        except NotLeading as error:
            log.warning("leadership is lost", extra={"why": error.message})

    async def _resync(self) -> None:
        """Everybody has a turn now and then, whatever was said and heard."""
        while True:
            await asyncio.sleep(self._settings.resync_s)
            self.controller.add_all(spread_s=self._settings.resync_s / 2)


@dataclass(slots=True)
class _Told:
    """Hears how following one kind goes."""

    kind: Kind
    active: dict[Kind, float]
    metrics: OperatorMetrics
    clock: Callable[[], float]

    def heard(self) -> None:
        self.active[self.kind] = self.clock()
        self.metrics.heard.labels(self.kind.resource).set_to_current_time()

    def failed(self, reason: str, why: str) -> None:
        self.active[self.kind] = self.clock()
        self.metrics.watch_failures.labels(self.kind.resource, reason).inc()
        # Quiet kinds of a server whose etcd seldom says how far it is are silent, too.
        level = logging.INFO if reason == "silent" else logging.WARNING
        log.log(level, "a kind can't be followed", extra={"kind": self.kind.resource, "reason": reason, "why": why})


def check(settings: OperatorSettings) -> None:
    """Raise UsageError for settings that can't work."""
    require_client("the operator needs")
    Times(settings.lease_s, settings.renew_s, settings.retry_s).check()
    for name in ("silence_s", "watch_s", "relist_s", "resync_s", "call_s"):
        if getattr(settings, name) <= 0:
            raise UsageError(f"operator.{name} must be more than 0, not {getattr(settings, name)}")
    if not 1 <= settings.workers <= 64:
        raise UsageError(f"operator.workers is {settings.workers}; 1 to 64 are possible")


def run(
    settings: OperatorSettings, work: Callable[[OperatorMetrics], contextlib.AbstractContextManager[Work]],
    ready: Callable[[str | None], None],
) -> int:  # fmt: skip
    """Run it until SIGTERM or SIGINT; ``ready`` is told its URL, if it has one. Returns the exit status."""
    check(settings)
    metrics = OperatorMetrics()
    with work(metrics) as whole:
        asyncio.run(_run(settings, whole, metrics, ready))
    return 0


async def _run(
    settings: OperatorSettings, work: Work, metrics: OperatorMetrics, ready: Callable[[str | None], None]
) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    operator = Operator(settings, work, lambda: client_of(settings), metrics)
    with _front(settings, operator, metrics) as (serve, url):
        tasks = [asyncio.create_task(operator.run())]
        if serve is not None:
            tasks.append(asyncio.create_task(serve()))
        for task in tasks:
            task.add_done_callback(lambda _: stop.set())  # none of them ends by itself
        log.info("the operator runs", extra={"identity": operator.identity, "http": url, "pid": os.getpid()})
        ready(url)
        try:
            await stop.wait()
        finally:
            for task in tasks:
                task.cancel()
            done, late = await asyncio.wait(tasks, timeout=STOP_S)
    for task in late:
        log.error("something did not end in time", extra={"task": task.get_name()})
    for task in done:
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error


def client_of(settings: OperatorSettings) -> contextlib.AbstractAsyncContextManager[tuple[Any, str]]:
    """A client with credentials as they are now, and the namespace that is meant."""
    return cluster_client(
        kubeconfig=settings.kubeconfig, context=settings.context, namespace=settings.namespace
    )  # fmt: skip


@contextlib.contextmanager
def _front(
    settings: OperatorSettings, operator: Operator, metrics: OperatorMetrics
) -> Iterator[tuple[Callable[[], Any] | None, str | None]]:
    """What answers over HTTP, listening already, if ``operator.listen`` says so. Raises UsageError, Unavailable."""
    if not settings.listen:
        yield None, None
        return
    from helios.http.front import Front
    from helios.http.hosts import split_listen
    from helios.http.server import listen_tcp, url_of

    host, port = split_listen(settings.listen, "operator.listen")
    with contextlib.closing(listen_tcp(host, port, "operator.listen")) as sock:
        front = Front(operator, metrics)
        yield lambda: front.serve(sock), url_of(sock, host)
