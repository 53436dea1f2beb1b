"""The supervisor: owns the listening sockets and the board, and has the processes that it should (``members``).

It is one thread that waits for signals, for the ends of processes and for messages, and starts a process by forking:
modules are loaded once, what they take is shared, and a dead process is replaced in some milliseconds. So nothing here
may start a thread or an event loop. A process inherits the sockets, the board and its end of a channel; when the
supervisor is gone the channel says so, and the process ends.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import mmap
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from types import FrameType
from typing import Final

from helios.config import Config, RouterSettings
from helios.errors import HeliosError
from router.admission import sums
from router.kv.dialogue import listen
from router.processes.board import LOADS, Board
from router.processes.channel import Line
from router.processes.hub import Hub
from router.processes.members import Kill, Member, Members, Role, Start, Tell
from router.processes.messages import AnyMessage, Draining, Stop
from router.processes.sharing import worker_row
from router.processes.vacating import Vacating
from router.resilience import cells
from router.scheduling import homes
from router.workers import check_url

log = logging.getLogger("helios.router")

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
BEYOND_S: Final = 15.0
"""What a process that was told to stop may take beyond ``drain_s``."""
LIMITS: Final = 1 << 16
"""Most buckets of limits that processes share, in all the time that the supervisor runs."""


@dataclass(frozen=True, slots=True)
class Inherited:
    """What a process gets: the configuration, its listening sockets, its channel, the boards of workers and of limits,
    the memory for who got which prompt, and its slot.

    ``processes``: how many data processes share the work; ``index``: where the control process is asked about the index
    of KV events.
    """

    config: Config
    sockets: Sequence[socket.socket]
    channel: socket.socket
    board: Board
    limits: Board
    homes: mmap.mmap
    slot: int
    processes: int
    index: socket.socket
    picker: str
    """Where gateways ask, HOST:PORT; empty: nowhere."""

    @property
    def settings(self) -> RouterSettings:
        return self.config.router


KEPT: Final = ("host", "port", "processes", "admin_host", "admin_port", "admin_socket", "picker.listen")
"""Settings that are those of the start until the end."""

Main = Callable[[Inherited], int]
"""What a process runs; returns its exit status."""


class Supervisor:
    """Runs the processes of one router. ``reload`` reads the configuration again, on SIGHUP."""

    def __init__(
        self, config: Config, sockets: Sequence[socket.socket], admin: Sequence[socket.socket],
        mains: Mapping[Role, Main], reload: Callable[[], Config], announce: Callable[[], None], processes: int,
        picker: str = "",
    ) -> None:  # fmt: skip
        """``sockets`` are the data processes', and closed here; ``admin`` are the control process's. At ``picker`` data
        processes serve gateways as well.

        ``announce`` is called once all processes serve for the first time.
        """
        settings = config.router
        self._config, self._sockets, self._admin, self._mains = config, list(sockets), list(admin), mains
        self._processes, self._picker = processes, picker
        self._index = listen()
        self._reload, self._announce, self._announced = reload, announce, False
        # As many again: those of a new configuration serve before the others are told to go.
        slots = 2 * processes
        self._board = Board.make(slots, LOADS + cells.COLUMNS)
        self._limits = Board.make(slots, sums.COLUMNS, LIMITS)
        self._homes = homes.shared()
        self._members = Members(processes, slots, settings.drain_s + BEYOND_S, time.monotonic)
        self._hub = Hub(self._members, self._send, time.monotonic)
        self._lines: dict[int, Line] = {}
        self._pids: dict[int, int] = {}
        """Members' numbers by pid."""
        configured = _urls_of(settings)
        self._hub.keep(configured)
        release = self._board.release
        self._vacating = Vacating(self._members, self._hub, lambda url: release(worker_row(url)), configured)
        self._selector = selectors.DefaultSelector()
        self._signals: list[signal.Signals] = []
        self._stopped_by: signal.Signals | None = None

    def run(self) -> int:
        """Until a signal stops it and the last process has ended; returns the exit status."""
        gc.collect()
        gc.freeze()  # what is there now stays shared with the processes
        reader, writer = socket.socketpair()
        with reader, writer, self._selector, self._handling(writer):
            reader.setblocking(False)
            self._wake = (reader, writer)
            self._selector.register(reader, selectors.EVENT_READ, None)
            while not self._members.over:
                self._act()
                self._wait(reader)
            self._close_sockets()
        return 130 if self._stopped_by == signal.SIGINT else 0

    # --- waiting ---

    @contextlib.contextmanager
    def _handling(self, writer: socket.socket) -> Iterator[None]:
        writer.setblocking(False)
        before = {sig: signal.signal(sig, self._note) for sig in SIGNALS}
        wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for sig, handler in before.items():
                signal.signal(sig, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(signal.Signals(number))

    def _wait(self, reader: socket.socket) -> None:
        now = time.monotonic()
        until = min(self._members.next_s(), self._hub.next_s())
        for key, events in self._selector.select(max(0.0, until - now)):
            number = key.data
            if number is None:
                with contextlib.suppress(BlockingIOError):
                    reader.recv(4096)
                continue
            if events & selectors.EVENT_WRITE and number in self._lines:
                self._lines[number].flush()
                self._watch(number)
            if events & selectors.EVENT_READ and number in self._lines:
                self._read(number)
        self._heed()
        self._reap()
        self._hub.tick()
        for member in self._hub.hanging():
            log.error("a process hangs and is killed", extra=_who(member))
            self._kill(member.number)

    def _heed(self) -> None:
        signals, self._signals = self._signals, []
        for sig in signals:
            if sig == signal.SIGHUP and not self._members.stopping:
                self._renew()
            elif sig in (signal.SIGTERM, signal.SIGINT):
                self._stopped_by = self._stopped_by or sig
                self._members.stop()
                self._close_sockets()
                if (control := self._members.control) is not None:
                    self._send(control.number, Draining())

    def _reap(self) -> None:
        for pid, number in list(self._pids.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del self._pids[pid]
                self._ended(number, os.waitstatus_to_exitcode(status))

    def _read(self, number: int) -> None:
        member = self._members.all.get(number)
        try:
            messages = self._lines[number].receive()
        except ValueError as error:
            log.error("a process sent what is no message", extra={"member": number, "reason": str(error)})
            self._kill(number)
            messages = None
        if messages is None:
            self._selector.unregister(self._lines[number].sock)
            self._lines.pop(number).sock.close()
            return
        for message in messages:
            if member is not None:
                self._hub.handle(member, message)

    # --- acting ---

    def _act(self) -> None:
        for action in self._members.plan():
            match action:
                case Start(member):
                    self._start(member)
                case Tell(member, cut):
                    self._send(member.number, Stop(cut))
                case Kill(member):
                    log.error("a process did not end in time", extra=_who(member))
                    self._kill(member.number)
        if not self._announced and self._members.complete:
            self._announced = True
            self._announce()
        self._vacating.step()

    def _start(self, member: Member) -> None:
        try:
            ours, theirs = socket.socketpair()
            pid = os.fork()
        except OSError as error:
            log.error("a process can't be started", extra={**_who(member), "reason": error.strerror})
            self._members.ended(member.number)
            return
        if not pid:
            self._become(member, ours, theirs)
        theirs.close()
        self._pids[pid] = member.number
        line = self._lines[member.number] = Line(ours)
        self._selector.register(line.sock, selectors.EVENT_READ, member.number)
        log.debug("a process was started", extra={**_who(member), "pid": pid})
        self._hub.started(member)

    def _become(self, member: Member, ours: socket.socket, theirs: socket.socket) -> None:
        """In the new process: let go of what is the supervisor's, run, and never return."""
        status = 1
        try:
            _name(f"router {member.role.value}")
            signal.set_wakeup_fd(-1)
            for sig in SIGNALS:
                signal.signal(sig, signal.SIG_IGN if sig == signal.SIGHUP else signal.SIG_DFL)
            self._selector.close()
            for sock in (ours, *self._wake, *(line.sock for line in self._lines.values())):
                sock.close()
            ours_to_listen, others = self._sockets, self._admin
            if member.role is Role.CONTROL:
                ours_to_listen, others = others, ours_to_listen
            for sock in others:
                sock.close()
            main = self._mains[member.role]
            inherited = Inherited(
                self._config,
                ours_to_listen,
                theirs,
                self._board,
                self._limits,
                self._homes,
                member.slot,
                self._processes,
                self._index,
                self._picker,
            )
            status = main(inherited)
        except BaseException:
            log.critical("a process failed", exc_info=True, extra=_who(member))
        finally:
            with contextlib.suppress(Exception):
                sys.stderr.flush()
            os._exit(status)

    def _ended(self, number: int, status: int) -> None:
        if number in self._lines:
            self._read(number)  # its last words
        if (line := self._lines.pop(number, None)) is not None:
            self._selector.unregister(line.sock)
            line.sock.close()
        member = self._members.all.get(number)
        if member is None:
            return
        if member.role is Role.DATA:
            self._board.clear(member.slot)
        self._members.ended(number)
        self._hub.ended(member)
        if not member.leaving and not self._members.stopping:
            why = f"signal {-status}" if status < 0 else f"status {status}"
            log.warning("a process ended and is replaced", extra={**_who(member), "reason": why})

    def _send(self, number: int, message: AnyMessage) -> None:
        line = self._lines.get(number)
        if line is None:
            return
        line.send(message)
        if line.hangs:
            log.error("a process reads nothing and is killed", extra={"member": number})
            self._kill(number)
        self._watch(number)

    def _watch(self, number: int) -> None:
        line = self._lines[number]
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if line.waiting else 0)
        if self._selector.get_key(line.sock).events != events:
            self._selector.modify(line.sock, events, number)

    def _kill(self, number: int) -> None:
        for pid, known in self._pids.items():
            if known == number:
                os.kill(pid, signal.SIGKILL)  # a child that was not waited for: the pid is still its own

    def _close_sockets(self) -> None:
        for sock in self._sockets:
            sock.close()

    # --- a new configuration ---

    def _renew(self) -> None:
        try:
            config = self._reload()
        except HeliosError as error:
            log.error("the new configuration can't be used; the old one stays", extra={"reason": str(error)})
            return
        before, settings = self._config.router, config.router
        if changed := [name for name in KEPT if attrgetter(name)(settings) != attrgetter(name)(before)]:
            log.warning("these settings change only when the router is started anew", extra={"settings": changed})
        self._config = config
        self._members.renew(settings.drain_s + BEYOND_S)
        configured = _urls_of(settings)
        self._hub.keep(configured)
        self._vacating.renew(configured)
        log.info("the processes are replaced by others with the new configuration")


def _urls_of(settings: RouterSettings) -> set[str]:
    return {check_url(worker.url) for worker in settings.workers}


def _name(name: str) -> None:
    """What ``ps`` and ``top`` show of this process; up to 15 characters."""
    with contextlib.suppress(OSError), open("/proc/self/comm", "w") as file:
        file.write(name)


def _who(member: Member) -> dict[str, object]:
    return {"member": member.number, "role": member.role.value}


def how_many(processes: int) -> int:
    """Data processes that are wanted; 0: one for each core that this process may use."""
    return processes or len(os.sched_getaffinity(0))
