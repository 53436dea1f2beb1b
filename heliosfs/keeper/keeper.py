"""The keeper's loop: one thread that waits for its worker, for guests at its socket and for signals.

A guest is whoever connects: a worker, or the keeper that takes over. It is answered when the place is free, so a new
worker never meets an old one on the same descriptor. ``_tick`` looks at every deadline there is.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from heliosfs.keeper import kernel, policy, wire
from heliosfs.keeper.held import Held, log
from heliosfs.keeper.policy import Death
from heliosfs.keeper.worker import Worker

TICK_S: Final = 0.5
"""How often signs of life are looked at."""

FROZEN_S: Final = 3.0
"""A tick that comes this late means that the machine stood still: signs of life count from then."""

HELLO_S: Final = 1.0
"""How long a guest may take to say who it is. Nothing else is done meanwhile: only allowed users are listened to."""

GUESTS: Final = 8
TAKE_S: Final = 5.0
"""How long a successor may take to confirm."""


@dataclass(frozen=True)
class Settings:
    """What the command line says; times in seconds. ``argv`` is empty where somebody else starts the workers."""

    socket: str
    argv: list[str]
    uids: list[int]
    pid_file: str | None
    created: bool
    stall_s: float
    patience_s: float
    grace_s: float
    start_s: float


@dataclass(frozen=True)
class Guest:
    """Somebody at the socket who has said hello: as a worker with a name, or as a successor."""

    sock: socket.socket
    hello: object
    name: str


@dataclass
class Keeper:
    settings: Settings
    held: Held
    signals: int
    """The end of a pipe that gets the number of every signal."""
    say: Callable[[str, object], None]
    """Tells whoever started us how it went; only the first call counts."""
    _guests: list[Guest] = field(default_factory=list)
    _dropped: list[int] = field(default_factory=list)
    _superseded: str = ""
    _restarts: policy.Restarts = field(default_factory=policy.Restarts)
    _status: int | None = None
    _gone: bool = False
    _refusing: bool = False
    _failure: object = None
    _spawn_at: float = 0.0
    _resumed: float = 0.0
    _ooms: deque[int] = field(default_factory=lambda: deque([kernel.oom_kills()], 20))
    _ticked: float = field(default_factory=time.monotonic)
    _down_since: float = field(default_factory=time.monotonic)

    def run(self) -> int:
        """Keep the mount until it ends or somebody else has it; returns the exit status."""
        if (worker := self.held.worker) is not None:
            self._adopted(worker)
            with contextlib.suppress(OSError):  # it is gone again: that is noticed as ever
                if worker.sock is not None:
                    wire.send(worker.sock, self._welcome())
        while True:
            self._tick(time.monotonic())
            if self._gone:
                return 0
            if self._status is not None and self.held.worker is None:
                self._clean_up()
                return self._status
            self._wait()

    # --- waiting -----------------------------------------------------------------------------------------------------

    def _wait(self) -> None:
        sources: dict[int, Callable[[], None]] = {
            self.signals: self._on_signal,
            self.held.listener.fileno(): self._on_guest,
            **{pidfd: partial(self._on_end_of_dropped, pidfd) for pidfd in self._dropped},
        }
        worker = self.held.worker
        deadlines = [self._ticked + TICK_S]
        if worker is not None:
            sources[worker.pidfd] = partial(self._on_death, worker)
            if worker.sock is not None:
                sources[worker.sock.fileno()] = partial(self._on_message, worker)
            deadlines += [worker.kill_at, worker.give_up_at]
        elif self.settings.argv:
            deadlines.append(self._spawn_at)
        if self._refusing:
            sources[self.held.fuse_fd] = self._refuse
        poller = select.poll()
        for fd in sources:
            poller.register(fd, select.POLLIN)
        for fd, _ in poller.poll(max(0.0, min(deadlines) - time.monotonic()) * 1000):
            sources[fd]()

    def _tick(self, now: float) -> None:
        if now - self._ticked > FROZEN_S:
            self._resumed = now
        self._ticked = now
        held = self.held
        if self._status is None and not kernel.connected(held.fuse_fd):
            there = kernel.device(held.mountpoint) == held.device
            log("error" if there else "info", "the connection was aborted" if there else "unmounted by somebody")
            self._leave(1 if there else 0)
        if held.worker is not None:
            self._watch(held.worker, now)
        elif self._status is None and self.settings.argv and now >= self._spawn_at:
            self._spawn(now)
        for guest in list(self._guests):
            self._turn(guest, now)
        attached = held.worker is not None and held.worker.sock is not None
        if self._status is None and not attached and now >= self._down_since + self.settings.patience_s:
            self._refuse()
        self._ooms.append(kernel.oom_kills())

    # --- signals, and the end ----------------------------------------------------------------------------------------

    def _on_signal(self) -> None:
        for number in os.read(self.signals, 64):
            worker = self.held.worker
            if number == signal.SIGHUP:
                if worker is not None and not worker.leaving:
                    log("info", "the worker is replaced by a fresh one, as was asked", worker=worker.pid)
                    worker.stop(time.monotonic(), self.settings.grace_s)
            elif self._status is not None:  # the second: at once
                if worker is not None:
                    worker.kill_at = 0.0
            elif number == signal.SIGTERM and not self.settings.argv and worker is not None and worker.ready_at:
                log("info", "the mount stays with its worker until another keeper comes", worker=worker.pid)
                self._gone = True
            else:
                log("info", "stopping", signal=signal.Signals(number).name)
                self._leave(0 if number == signal.SIGTERM else 128 + number)

    def _leave(self, status: int) -> None:
        """Unmount and end the worker; the loop ends with it."""
        self._status = status
        try:
            kernel.detach(self.held.mountpoint, self.held.device)
        except OSError as error:
            log("error", "the unmount failed", reason=str(error))
        if self.held.worker is not None:
            self.held.worker.stop(time.monotonic(), self.settings.grace_s)

    def _clean_up(self) -> None:
        held, settings = self.held, self.settings
        kernel.abort(held.device)
        os.close(held.fuse_fd)
        for sock in (held.listener, *(guest.sock for guest in self._guests)):
            sock.close()
        with contextlib.suppress(OSError):  # not made for the mount, or not empty: somebody uses it
            if settings.created:
                os.rmdir(held.mountpoint)
        lock = held.lock_fd
        for path in (settings.socket, settings.pid_file, lock and os.readlink(f"/proc/self/fd/{lock}")):
            with contextlib.suppress(FileNotFoundError):
                if path:
                    os.unlink(path)
        log("info", "unmounted", mountpoint=held.mountpoint)

    # --- the worker --------------------------------------------------------------------------------------------------

    def _spawn(self, now: float) -> None:
        try:
            self._adopted(Worker.spawn(self.settings.argv, self.settings.socket, now))
        except OSError as error:
            log("error", "no worker can be started", reason=str(error))
            if not self.held.served:
                message = f"no worker can be started: {error}"
                self.say("error", {"code": "Unavailable", "message": message, "hint": "The log says more."})
                self._leave(1)
            self._spawn_at = now + self._restarts.died(Death.CRASH, None)

    def _adopted(self, worker: Worker) -> None:
        self.held.worker = worker
        if worker.ready_at is not None:
            self._down_since = math.inf
        if (path := self.settings.pid_file) and worker.pid:
            try:
                with open(f"{path}.new", "w") as file:
                    file.write(f"{worker.pid}\n")
                os.replace(f"{path}.new", path)
            except OSError as error:  # it is for people
                log("warning", "the worker's pid can't be written", reason=error.strerror)

    def _watch(self, worker: Worker, now: float) -> None:
        if now >= worker.give_up_at:
            log("error", "a killed worker is not gone; the next one does not wait for it", worker=worker.pid)
            self._bury(worker, None, gone=False)
        elif now >= worker.kill_at:
            self._kill(worker, now)
        elif not worker.leaving:
            reason = None
            if worker.ready_at is not None:
                since = max(worker.ready_at, self._resumed)
                reason = policy.hang(self.held.board, now, since, self.settings.stall_s)
            elif now - worker.started > self.settings.start_s:
                reason = f"it was not ready after {self.settings.start_s:.0f} s"
            if reason is not None:
                log("error", "the worker hangs and is replaced", worker=worker.pid, reason=reason)
                worker.hung = True
                self._kill(worker, now)

    def _kill(self, worker: Worker, now: float) -> None:
        """End its process, or, where that is not ours to do, its say in the mount: it heeds the board as it wakes."""
        self.held.board.generation += 1
        if not worker.kill(now):
            log("warning", "the worker can't be killed from here; it is dropped", worker=worker.pid)
            worker.hang_up()

    def _on_message(self, worker: Worker) -> None:
        try:
            while worker.sock is not None:
                message, fds = wire.receive(worker.sock)
                wire.close(fds)
                if message is None:
                    worker.hang_up()
                    worker.kill_at = min(worker.kill_at, time.monotonic() + self.settings.grace_s)
                elif message.get("ready"):
                    worker.ready_at, self._down_since = time.monotonic(), math.inf
                    self.held.state, self.held.served = message.get("state"), True
                    log("info", "the worker is ready", worker=worker.pid, generation=self.held.board.generation)
                    self.say("state", self.held.state)
                else:
                    worker.ended = message.get("ended", "failed")
                    self._failure = message.get("failed", self._failure)
        except BlockingIOError:
            pass
        except wire.ProtocolError as error:
            log("error", "the worker is not understood", worker=worker.pid, reason=str(error))

    def _on_death(self, worker: Worker) -> None:
        self._on_message(worker)  # its last words
        self._bury(worker, worker.status(), gone=True)

    def _bury(self, worker: Worker, code: int | None, *, gone: bool) -> None:
        now, held = time.monotonic(), self.held
        served_s = None if worker.ready_at is None else now - worker.ready_at
        oom = kernel.oom_kills() > self._ooms[0]
        how = policy.death(code, asked=worker.asked, hung=worker.hung, ended=bool(worker.ended), oom=oom)
        held.board.crashes += how is Death.CRASH
        self._spawn_at = now + self._restarts.died(how, served_s)
        held.worker = None
        worker.hang_up()
        if gone:
            os.close(worker.pidfd)
        else:  # what it may still write reaches nobody
            self._dropped.append(worker.pidfd)
            last, held.board = held.board, held.board.copied()
            last.close()
        if served_s is not None:
            self._down_since = now
        if self._status is not None:
            return
        level = "warning" if how is Death.KILLED else "error" if how is Death.CRASH else "info"
        if how is Death.CRASH and (code is None or not held.served):  # nobody's fault for sure; whoever starts is told
            level = "warning"
        log(level, "the worker ended", worker=worker.pid, status=code, how=how.name, served_s=served_s)
        if worker.ended == "unmounted":
            self._leave(0)
        elif self.settings.argv and not held.served and how is not Death.ASKED:
            if self._failure is not None:
                self.say("error", self._failure)  # else the log's last lines say more than we could
            self._leave(1)

    def _on_end_of_dropped(self, pidfd: int) -> None:
        """What it took while it hung is nobody's now."""
        self._dropped.remove(pidfd)
        os.close(pidfd)
        self._resend()

    # --- nobody serves -----------------------------------------------------------------------------------------------

    def _refuse(self) -> None:
        """There has been no worker for too long: what waits for it fails."""
        held = self.held
        if not held.board.init:
            return  # nobody can wait yet
        if not self._refusing:
            self._refusing = True
            os.set_blocking(held.fuse_fd, False)
            self._resend()
            held.board.forgive()
        if refused := kernel.refuse(held.fuse_fd, held.board):
            log("error", "requests failed because there is no worker", requests=refused)

    def _resend(self) -> None:
        try:
            kernel.resend(self.held.fuse_fd)
        except OSError as error:  # just unmounted, or a kernel before 6.9
            log("error", "what the last worker took can't be had again", reason=str(error))

    def _stop_refusing(self) -> None:
        if self._refusing:  # else the descriptor is a worker's, as it wants it
            self._refusing = False
            os.set_blocking(self.held.fuse_fd, True)

    # --- guests ------------------------------------------------------------------------------------------------------

    def _on_guest(self) -> None:
        message: dict[str, object] | None = None
        fds: list[int] = []
        with contextlib.suppress(OSError):  # gone again, or it says nothing
            sock, _ = self.held.listener.accept()
            if wire.peer(sock)[1] in self.settings.uids and len(self._guests) < GUESTS:
                sock.settimeout(HELLO_S)
                message, fds = wire.receive(sock)
                sock.setblocking(False)
        if message is not None and not fds:  # with descriptors: the worker of a mount that we don't have any more
            self._guests.append(Guest(sock, message.get("hello"), str(message.get("name", ""))))
        wire.close(fds)

    def _turn(self, guest: Guest, now: float) -> None:
        """Answer a guest whose turn it is."""
        worker, (pid, _) = self.held.worker, wire.peer(guest.sock)
        if self._status is not None or wire.hung_up(guest.sock):
            self._dismiss(guest)
        elif guest.hello == "successor":
            if worker is None or not worker.leaving:
                self._hand_over(guest)
        elif guest.hello == 1 and not self.settings.argv:
            if worker is None:
                self._adopted(Worker.of_peer(guest.sock, now, guest.name))
                self._attach(guest)
            elif guest.name not in ("", worker.name, self._superseded) and not worker.leaving:
                log("info", "another worker comes", worker=worker.pid, name=worker.name, next=guest.name)
                self._superseded = worker.name
                worker.stop(now, self.settings.grace_s)
        elif guest.hello == 1 and worker is not None and worker.pid == pid:
            if worker.sock is None and not worker.leaving:
                self._attach(guest)
        else:
            log("warning", "a stranger at the socket", pid=pid, hello=guest.hello)
            self._dismiss(guest)

    def _attach(self, guest: Guest) -> None:
        self._stop_refusing()
        self._guests.remove(guest)
        worker, board = self.held.worker, self.held.board
        assert worker is not None
        worker.sock = guest.sock
        board.loop_ns = board.channel_ns = board.oldest_ns = board.limit_ns = 0
        board.generation += 1
        try:
            wire.send(worker.sock, self._welcome(), [self.held.fuse_fd, board.fd])
        except OSError as error:
            log("warning", "the worker left at once", worker=worker.pid, reason=str(error))

    def _welcome(self) -> dict[str, object]:
        """The answer to a worker's hello, and a new keeper's greeting."""
        held = self.held
        about = {"mountpoint": held.mountpoint, "dev": held.device, "generation": held.board.generation}
        return {**about, "keeper": os.getpid(), "external": not self.settings.argv}

    def _hand_over(self, guest: Guest) -> None:
        self._stop_refusing()
        try:
            guest.sock.settimeout(TAKE_S)
            self._gone = self.held.give(guest.sock)
            log("info", "a successor has the mount" if self._gone else "the successor went away")
        except OSError as error:
            log("error", "the successor did not take over", reason=str(error))
        self._dismiss(guest)

    def _dismiss(self, guest: Guest) -> None:
        guest.sock.close()
        self._guests.remove(guest)
