"""The control process: what one process does for all.

It discovers workers, checks them, reads their metrics, looks for models that nobody serves, has models woken, says
who of those who wait is next, and answers the administration; the data processes are told what comes of it. It is not
on the way of any request that need not wait. When it dies the others keep what it said last, and the one that replaces
it begins with that too.
"""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Final

import uvloop

from helios.config import WorkerSettings
from helios.errors import InvalidInput, UsageError
from helios.metrics import RouterMetrics
from router import tls
from router.admin import Admin
from router.admin_access import Access
from router.admin_server import serving
from router.admission.bringing import Bringing
from router.admission.line_owner import LineOwner
from router.admission.line_words import MOST, FromOwner
from router.admission.queue import Room
from router.admission.wake_hook import hook_of
from router.admission.wake_owner import WakeOwner
from router.admission.waking import Waking
from router.checks import Checks
from router.demand.book import Book
from router.demand.shown import Shown
from router.discovery.assembly import Discovery
from router.discovery.models import Name
from router.discovery.names import standing
from router.discovery.registration import Lease
from router.discovery.waking import waker
from router.health import State
from router.kv.owner import Owner
from router.picker.ledger import goes_by_metrics
from router.processes.channel import Channel
from router.processes.fleet import Fleet
from router.processes.messages import (
    AnyMessage,
    Asked,
    Collect,
    Collected,
    Counted,
    Demands,
    Deposed,
    Draining,
    Failed,
    FromLine,
    Gone,
    Known,
    Membership,
    Progressed,
    Reading,
    Ready,
    Registered,
    Resolved,
    States,
    Stop,
    ToLine,
    Wakes,
    Wanted,
    Woken,
    WorkerState,
)
from router.processes.questions import Questions
from router.processes.sharing import Sharing
from router.processes.supervisor import Inherited
from router.processes.tally import snapshot
from router.resilience.guard import Guard
from router.scheduling.configured import asks_index, explained, reads_metrics
from router.scraper import STALE, Scraper
from router.worker_keys import WorkerKeys
from router.workers import Worker, Workers

log = logging.getLogger("helios.router")

TICK_S: Final = 0.1
"""How often what is owned for all processes is looked at."""


def main(inherited: Inherited) -> int:
    """Check until told to stop; returns the exit status."""
    for sig in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sig, signal.SIG_IGN)  # the supervisor says when: the data processes need it until they end
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(Process(inherited).run())
    return 0


class Process:
    """The control process."""

    def __init__(self, inherited: Inherited) -> None:
        settings = inherited.settings
        self._inherited = inherited
        # What all processes have under way and have found; this one counts nothing itself.
        sharing = Sharing(inherited.board, inherited.limits, 0)
        self._workers = Workers(
            settings.workers, time.monotonic, sharing.watched, pins=settings.discovery.resolve,
            guard=lambda url: Guard(url, settings, cells=sharing.watched(url)),
        )  # fmt: skip
        self._metrics = RouterMetrics()
        self._discovery = Discovery(
            settings.discovery, inherited.config.registry, self.apply, self._serves, self._metrics,
            waker=waker(settings.admission), resumes=True,
        )  # fmt: skip
        self._discovery.registration.noted = self._registered
        if self._discovery.availability is not None:
            self._discovery.availability.changed = lambda progress: self._send(Progressed(progress))
        if self._discovery.models is not None:
            self._discovery.models.changed = lambda name, answer: self._send(Resolved(str(name), standing(answer)))
        self._tls, self._keys = tls.to_workers(settings), WorkerKeys(settings.worker_key_file)
        self._owner: Owner | None = None
        """The index of KV events, where the policy goes by it."""
        if asks_index(settings.policy):
            self._owner = Owner(settings.kv_events, self._workers, self._metrics, self._tls, self._keys)
        self._tasks: asyncio.TaskGroup | None = None
        waking = Waking(
            Bringing(self._discovery.availability, self._workers, hook_of(settings.admission)), self._spawn_wake,
            time.monotonic, settings.admission.queue.waking_s,
        )  # fmt: skip
        waking.ended = lambda model, result: self._metrics.wakes.labels(model, result).inc()
        self._waking, self._wakes = waking, WakeOwner(waking, self._takes, self._woken, time.monotonic)
        queue = settings.admission.queue
        room = Room(queue.max_requests, queue.max_mib << 20)
        self._line = LineOwner(room, self._places, self._workers.may_wait, self._tell_line, time.monotonic)
        self._draining = False
        self._book = Book(inherited.processes, time.monotonic)
        self._demand = Shown(
            self._book, self._workers, STALE * settings.scrape_interval_s, time.monotonic, lambda: self._draining
        )  # fmt: skip
        self._questions = Questions(self._send)
        self._admin = Admin(
            Fleet(self._workers, self._decided), self._discovery.registration, self._access(),
            explained(settings.policy), self._demand,
            models=self._discovery.awaited, heard=self._questions.heard, draining=lambda: self._draining,
            index=lambda: None if self._owner is None else self._owner.described(),
        )  # fmt: skip
        self._known, self._stopped = asyncio.Event(), asyncio.Event()
        self._before: set[str] = set()
        """Sources of the control process before this one."""
        self._channel: Channel | None = None

    async def run(self) -> None:
        settings = self._inherited.settings
        self._channel = channel = await Channel.over(self._inherited.channel, self._handle, self._stop)
        await self._known.wait()
        for source in self._before - self._discovery.names:
            self.apply(source, ())  # of a configuration before this one
        context, keys = self._tls, self._keys
        checks = Checks(
            self._workers, settings.health_interval_s, settings.health_timeout_s, context, keys, self._decided
        )  # fmt: skip
        async with AsyncExitStack() as parts:
            await parts.enter_async_context(checks.running())
            by_policy = reads_metrics(settings.policy) or goes_by_metrics(settings.picker)
            scraper = Scraper(
                self._workers, settings.scrape_interval_s, time.monotonic, context, keys,
                self._read if by_policy else lambda worker: None, lambda: by_policy or self._demand.wanted,
            )  # fmt: skip
            await parts.enter_async_context(scraper.running())
            if self._owner is not None:
                await parts.enter_async_context(self._owner.running(self._inherited.index))
            await parts.enter_async_context(self._discovery.running())
            self._tasks = await parts.enter_async_context(asyncio.TaskGroup())
            await parts.enter_async_context(serving(self._admin.app, self._inherited.sockets))
            looking_after = self._tasks.create_task(self._look_after())
            channel.send(Ready())
            await self._stopped.wait()
            self._demand.end()
            looking_after.cancel()
            self._tasks = None  # no call is begun any more
            self._deposed()
        await channel.close()

    def apply(self, source: str, workers: Sequence[WorkerSettings]) -> None:
        """A source knows these workers now and no others: so it is here, and all data processes are told."""
        self._workers.apply(source, workers)
        if self._owner is not None:
            self._owner.refresh()
        self._send(Membership(source, list(workers)))

    def _access(self) -> Access:
        """Who may use the administration. A file that was right at the start must not end the checks of workers."""
        settings = self._inherited.settings
        try:
            return Access(settings.admin_tokens, settings.discovery.registrars, settings.demand_tokens)
        except UsageError as error:
            log.error("no token is accepted until SIGHUP", extra={"reason": error.message})
            return Access("", "")

    def _serves(self, model: str) -> bool:
        return any(worker.health.state is State.UP for worker in self._workers.candidates(model, ()))

    def _takes(self, model: str) -> bool:
        """Whether a worker takes requests of the model: as in the processes that relay."""
        return bool(self._workers.candidates(model, ()))

    def _spawn_wake(self, model: str) -> asyncio.Task[None]:
        assert self._tasks is not None
        return self._tasks.create_task(self._waking.call(model))

    def _woken(self, model: str, progress: str, reason: str, failed_at: float | None) -> None:
        self._send(Woken(model, progress, reason, failed_at))

    def _places(self, model: str) -> float:
        """How many more requests the workers of the model may get now."""
        candidates, most = self._workers.candidates(model, ()), self._inherited.settings.admission.queue.per_worker
        if not candidates:
            return 0
        free = sum(max(0, most - worker.in_flight) for worker in candidates) if most else math.inf
        return min(free, self._workers.spare(model))

    def _tell_line(self, member: int, words: list[FromOwner]) -> None:
        for begin in range(0, len(words), MOST):
            self._send(FromLine(member, words[begin : begin + MOST]))

    def _deposed(self) -> None:
        """Another control process owns what all share, or this one ends."""
        self._wakes.deposed()
        self._line.deposed()

    async def _look_after(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._wakes.tick()
            if not self._line.idle:
                for worker in self._workers.all:
                    worker.guard.refresh()  # what other processes have found
                self._line.tick()

    # --- messages ---

    def _handle(self, message: AnyMessage) -> None:
        match message:
            case Failed():
                self._failed(message)
            case Wanted():
                self._wanted(message.model)
            case Asked():
                self._asked(message.model)
            case Wakes():
                if self._tasks is not None:
                    self._wakes.wanted(message.member, message.models)
            case Gone():
                self._wakes.gone(message.member)
                self._line.gone(message.member)
                self._book.gone(message.member)
            case Demands():
                self._book.counted(message.member, message.models)
            case ToLine():
                self._line.hear(message.member, message.words)
            case Deposed():
                self._deposed()
            case States():
                self._taken_over(message)
            case Membership():  # from the control process before this one
                if not self._known.is_set() or message.source not in self._discovery.names:
                    self._before.add(message.source)
                    self._workers.apply(message.source, message.workers)
                    if self._owner is not None:
                        self._owner.refresh()
            case Registered():
                self._discovery.registration.take_over(message.identity, message.lease)
            case Collect():
                self._send(Counted(message.number, snapshot(self._metrics.registry)))
            case Collected():
                self._questions.answered(message)
            case Known():
                self._known.set()
            case Draining():
                self._draining = True
            case Stop():
                self._stop()

    def _stop(self) -> None:
        self._stopped.set()
        self._known.set()

    def _failed(self, message: Failed) -> None:
        """A request found no connection: that counts like a check, and the judgement goes to all whatever it is."""
        worker = self._workers.at(message.url)
        if worker is not None:
            if worker.health.failed(message.reason):
                log.warning("a worker is down", extra={"worker": worker.url, "reason": message.reason})
            self._decided(worker)

    def _wanted(self, model: str) -> None:
        if self._discovery.availability is None:
            return
        try:
            self._send(Progressed(self._discovery.availability.want(model)))
        except InvalidInput as error:
            log.debug("what is no model's name was asked for", extra={"reason": error.message})

    def _asked(self, model: str) -> None:
        """What is known is told at once; what comes of a question is told by ``Models.changed``."""
        if self._discovery.models is None:
            return
        try:
            answer = self._discovery.models.known(Name.parse(model))
        except InvalidInput as error:
            log.debug("what is no model's name was asked about", extra={"reason": error.message})
            return
        if answer is not None:
            self._send(Resolved(model, standing(answer)))

    def _decided(self, worker: Worker) -> None:
        health = worker.health
        state = WorkerState(health.state.value, health.reason, worker.cards, worker.cordoned, worker.home)
        self._send(States({worker.url: state}))

    def _read(self, worker: Worker) -> None:
        if worker.metrics is not None:
            self._send(Reading(worker.url, worker.metrics))

    def _registered(self, identity: str, lease: Lease | None) -> None:
        self._send(Registered(identity, lease))

    def _taken_over(self, message: States) -> None:
        """What the control process before this one said."""
        for url, state in message.workers.items():
            worker = self._workers.at(url)
            if worker is None:
                continue
            if worker.health.state is State.UNKNOWN:
                worker.health.judged(State(state.state), state.reason)
                worker.cards, worker.home = state.cards, state.home or worker.home
            if worker.cordoned is not state.cordoned:
                (self._workers.cordon if state.cordoned else self._workers.uncordon)(url)

    def _send(self, message: AnyMessage) -> None:
        if self._channel is not None:
            self._channel.send(message)
