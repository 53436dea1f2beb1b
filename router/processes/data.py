"""A data process: relays, and has the control process say which workers are up."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

import uvloop

from helios.errors import UsageError
from helios.http.server import ServerConfig, make_config
from router import tls
from router.admission.line_there import There
from router.app import Router
from router.descriptors import most_connections
from router.health import Health, State
from router.processes.accepting import Accepting
from router.processes.channel import Channel
from router.processes.messages import (
    AnyMessage,
    Applied,
    Asked,
    Collect,
    Collected,
    Counted,
    Demands,
    Failed,
    FromLine,
    Known,
    Leaving,
    Membership,
    Owned,
    Progressed,
    Reading,
    Ready,
    Resolved,
    States,
    Stop,
    ToLine,
    Wakes,
    Wanted,
    Woken,
)
from router.processes.outbox import Outbox
from router.processes.questions import Questions
from router.processes.sharing import Sharing
from router.processes.supervisor import Inherited
from router.processes.tally import snapshot
from router.relay.places import Place, Places
from router.relay.protocol import relaying
from router.relay.turned_away import turning_away
from router.routes import RAW_ROUTES

if TYPE_CHECKING:
    from router.picker.server import PickerServer

log = logging.getLogger("helios.router")

ENDING_S: Final = 10
"""What uvicorn may take to end beyond the grace of the answers in flight."""


def main(inherited: Inherited) -> int:
    """Serve until told to stop; returns the exit status."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(Process(inherited).run())


class Process:
    """One data process: the router, its server and its channel to the others."""

    def __init__(self, inherited: Inherited) -> None:
        settings = inherited.settings
        self._inherited = inherited
        self._channel: Channel | None = None
        self._certificate = tls.certificate(settings)
        self._questions = Questions(self._send)
        self._left = False
        self._known = asyncio.Event()
        self._line = Outbox(lambda words: self._send(ToLine(words)))
        self.router = Router(
            settings, tls.to_workers(settings), self._questions.gather, self._resolve, self._want, self._wake,
            Sharing(inherited.board, inherited.limits, inherited.slot, inherited.homes), self._health,
            inherited.processes, lambda models: self._send(Demands(models)), inherited.index.getsockname(),
            self._line.append if inherited.processes > 1 else None,
        )  # fmt: skip
        context = None if self._certificate is None else self._certificate.context
        config = make_config(
            self.router.app, http=relaying(self.router.relay, RAW_ROUTES), loop="uvloop",
            tls=context, date_header=False, grace_s=int(settings.drain_s) + ENDING_S,
        )  # fmt: skip
        metrics, places = self.router.metrics, Places(most_connections(settings.max_connections))
        metrics.connections.set_function(lambda: places.taken)
        self._server = _Server(
            config, self._leave, inherited.sockets, partial(self._send, Ready()), places,
            turning_away(RAW_ROUTES, metrics.turned_away),
        )  # fmt: skip

        self._picker: PickerServer | None = None

    async def run(self) -> int:
        self._channel = channel = await Channel.over(self._inherited.channel, self._handle, self._stop)
        await self._known.wait()
        async with self.router.running(), asyncio.TaskGroup() as tasks, self._serving_gateways():
            looking = None if self._certificate is None else tasks.create_task(self._renew(self._certificate))
            await self._server.serve()
            if looking is not None:
                looking.cancel()
        channel.send(Counted(0, snapshot(self.router.metrics.registry)))  # else what came last would be missing
        await channel.close()
        return 0

    @contextlib.asynccontextmanager
    async def _serving_gateways(self) -> AsyncIterator[None]:
        """Answer gateways, too, where that is wanted."""
        if not self._inherited.picker:
            yield
            return
        from router.picker.picker import Picker
        from router.picker.server import PickerServer  # gRPC, which must not be there before this process is

        picker = Picker(self.router.relay, self.router.catalog)
        self._picker = PickerServer(picker, self._inherited.picker)
        async with self._picker.running():
            yield

    def _resolve(self, model: str) -> None:
        self._send(Asked(model))

    def _want(self, model: str) -> None:
        self._send(Wanted(model))

    def _wake(self, models: list[str]) -> None:
        self._send(Wakes(models))

    def _health(self, url: str) -> Health:
        return Health(time.monotonic, lambda reason: self._send(Failed(url, reason)))

    def _send(self, message: AnyMessage) -> None:
        if self._channel is not None:
            self._channel.send(message)

    def _leave(self) -> None:
        """Asked to stop, by whom and how often ever: a second time changes nothing, but for ``Stop(cut=True)``."""
        if not self._left:
            self._left = True
            self._send(Leaving())
            self.router.leave()
            if self._picker is not None:
                self._picker.leave()

    def _stop(self) -> None:
        self._server.stop()
        self._known.set()

    def _handle(self, message: AnyMessage) -> None:
        match message:
            case States():
                self._judged(message)
            case Membership():
                self._move(message)
            case Reading():
                if (worker := self.router.workers.at(message.url)) is not None:
                    worker.metrics = message.metrics
            case Progressed():
                if self.router.registry is not None:
                    self.router.registry.progressed(message.progress)
            case Resolved():
                if self.router.registry is not None:
                    self.router.registry.resolved(message.model, message.answer)
            case Woken():
                if self.router.waking is not None:
                    self.router.waking.told(message.model, message.progress, message.reason, message.failed_at)
            case Owned():
                self._owned(message.number != 0)
            case FromLine():
                if (line := self._elsewhere) is not None:
                    for word in message.words:
                        line.hear(word)
            case Known():
                self._known.set()
            case Collect():
                self._send(Counted(message.number, snapshot(self.router.metrics.registry)))
            case Collected():
                self._questions.answered(message)
            case Stop():
                self._stop()
                if message.cut:
                    self.router.relay.cut()

    @property
    def _elsewhere(self) -> There | None:
        """The queue, where it is the control process's."""
        return None if self.router.admission is None else self.router.admission.elsewhere

    def _owned(self, known: bool) -> None:
        """Another control process owns what all share, and knows nothing yet; or none does."""
        if known:
            self.router.demand.anew()
        if known and self.router.waking is not None:
            self.router.waking.say_again()
        if self._elsewhere is not None:
            self._line.clear()  # that was for the one before
            self._elsewhere.owned(known)

    def _judged(self, message: States) -> None:
        workers = self.router.workers
        for url, state in message.workers.items():
            worker, now = workers.at(url), State(state.state)
            if worker is None:
                continue
            before = worker.health.judged(now, state.reason)
            worker.cards, worker.home = state.cards, state.home or worker.home
            if now is State.UP and before is not State.UP:
                workers.came_up(worker, before is State.DOWN)
                if before is State.DOWN:  # a process that is new hears of all, of which nothing has come back
                    worker.guard.came_back()
            if worker.cordoned is not state.cordoned:
                (workers.cordon if state.cordoned else workers.uncordon)(url)

    def _move(self, message: Membership) -> None:
        """A source's workers are others now. It is answered whatever happens: else no row would ever be given up."""
        try:
            self.router.workers.apply(message.source, message.workers)
        except Exception:
            log.exception("what a source of workers says could not be taken in", extra={"source": message.source})
        self._send(Applied(message.version))

    async def _renew(self, certificate: tls.Certificate) -> None:
        """Show a new certificate when its files change."""
        while True:
            await asyncio.sleep(tls.LOOK_S)
            try:
                if await asyncio.to_thread(certificate.refresh):
                    log.info("the certificate was renewed")
            except UsageError as error:
                log.error("the new certificate can't be used; the old one stays", extra={"reason": error.message})


class _Server(Accepting):
    """...that says when it takes connections. ``turned_away``: makes protocols of those that have no place."""

    def __init__(
        self, config: ServerConfig, on_stop: Callable[[], None], sockets: Sequence[socket.socket],
        ready: Callable[[], None], places: Places, turned_away: Callable[..., asyncio.Protocol],
    ) -> None:  # fmt: skip
        def made(*about: object, place: Place) -> object:
            kind: Callable[..., object] = turned_away if place.refused else cast(Any, config.http_protocol_class)
            return kind(*about, place=place)

        super().__init__(config, [(sockets, places)], made, on_stop)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()
