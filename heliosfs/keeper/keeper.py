"""The keeper's loop: one thread that waits for its worker, for guests at its socket and for signals.

A guest is whoever connects: a worker, or the keeper that takes over. It is answered when the place is free, so a new
worker never meets an old one on the same descriptor. Every wait has a deadline; ``_tick`` looks at all of them.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from heliosfs.keeper import kernel, policy, wire
from heliosfs.keeper.state import Held, Settings, log
from heliosfs.keeper.worker import Worker

TICK_S: Final = 0.5
"""How often signs of life are looked at."""

FROZEN_S: Final = 3.0
"""A tick that comes this late means that the machine stood still: signs of life count from then."""

GUEST_S: Final = 20.0
"""How long a guest may take to say who it is, and waits for its turn."""

GUESTS: Final = 8
TAKE_S: Final = 5.0
"""How long a successor may take to confirm."""


@dataclass(eq=False)
class Guest:
    """Somebody at the socket; ``hello`` is what it said."""

    sock: socket.socket
    until: float
    hello: object = None


@dataclass
class Keeper:
    settings: Settings
    held: Held
    signals: int
    """The end of a pipe that gets the number of every signal."""
    say: Callable[[str, object], None]
    """Tells whoever started us how it went; only the first call counts."""
    _guests: list[Guest] = field(default_factory=list)
    _restarts: policy.Restarts = field(default_factory=policy.Restarts)
    _status: int | None = None
    _handed_over: bool = False
    _refusing: bool = False
    _failure: object = None
    _spawn_at: float = 0.0
    _resumed: float = 0.0
    _ticked: float = field(default_factory=time.monotonic)
    _down_since: float = field(default_factory=time.monotonic)

    def run(self) -> int:
        """Keep the mount until it ends or a successor has it; returns the exit status."""
        if self.held.worker is not None:
            self._adopted(self.held.worker)
        while True:
            self._tick(time.monotonic())
            if self._handed_over:
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
        }
        sources |= {guest.sock.fileno(): partial(self._on_hello, guest) for guest in self._guests if not guest.hello}
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

    # --- signals -----------------------------------------------------------------------------------------------------

    def _on_signal(self) -> None:
        for number in os.read(self.signals, 64):
            if number == signal.SIGHUP:
                self._upgrade()
            elif self._status is not None:  # the second: at once
                if self.held.worker is not None:
                    self.held.worker.kill_at = 0.0
            else:
                log("info", "stopping", signal=signal.Signals(number).name)
                self._leave(0 if number == signal.SIGTERM else 128 + number)

    def _upgrade(self) -> None:
        worker = self.held.worker
        if worker is not None and not worker.leaving:
            log("info", "the worker is replaced by a fresh one, as was asked", worker=worker.pid)
            worker.stop(time.monotonic(), self.settings.grace_s)

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
        for guest in list(self._guests):
            self._dismiss(guest)
        held.listener.close()
        with contextlib.suppress(OSError):  # not made for the mount, or not empty: somebody uses it
            if settings.created:
                os.rmdir(held.mountpoint)
        lock = settings.lock_fd
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
                self.say("error", _error(f"no worker can be started: {error}"))
                self._leave(1)
            self._spawn_at = now + self._restarts.died(policy.Death.CRASH, None).delay_s

    def _adopted(self, worker: Worker) -> None:
        self.held.worker = worker
        if worker.ready_at is not None:
            self._down_since = math.inf
        if path := self.settings.pid_file:
            try:
                with open(f"{path}.new", "w") as file:
                    file.write(f"{worker.pid}\n")
                os.replace(f"{path}.new", path)
            except OSError as error:  # it is for people
                log("warning", "the worker's pid can't be written", reason=error.strerror)

    def _watch(self, worker: Worker, now: float) -> None:
        if now >= worker.give_up_at:
            log("error", "a killed worker is not gone; the next one does not wait for it", worker=worker.pid)
            self._bury(worker, None)
        elif now >= worker.kill_at:
            worker.kill(now)
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
                worker.kill(now)

    def _on_message(self, worker: Worker) -> None:
        try:
            while worker.sock is not None:
                message, fds = wire.receive(worker.sock)
                wire.close(fds)
                if message is None:
                    worker.hang_up()
                    worker.kill_at = min(worker.kill_at, time.monotonic() + self.settings.grace_s)
                elif message.get("ready"):
                    self._ready(worker, message.get("state"))
                else:
                    worker.ended = message.get("ended", worker.ended)
                    self._failure = message.get("failed", self._failure)
        except BlockingIOError:
            pass
        except wire.ProtocolError as error:
            log("error", "the worker is not understood", worker=worker.pid, reason=str(error))

    def _ready(self, worker: Worker, state: object) -> None:
        worker.ready_at = time.monotonic()
        self.held.state, self.held.served, self._down_since = state, True, math.inf
        log("info", "the worker is ready", worker=worker.pid, generation=self.held.board.generation)
        self.say("state", state)

    def _on_death(self, worker: Worker) -> None:
        self._on_message(worker)  # its last words
        self._bury(worker, worker.status())

    def _bury(self, worker: Worker, code: int | None) -> None:
        now = time.monotonic()
        served_s = None if worker.ready_at is None else now - worker.ready_at
        how = policy.death(code, worker.asked, worker.hung)
        verdict = self._restarts.died(how, served_s)
        self.held.board.crashes += verdict.counts
        self._spawn_at = now + verdict.delay_s
        self.held.worker = None
        worker.close()
        if served_s is not None:
            self._down_since = now
        if self._status is None:
            level = {policy.Death.CRASH: "error", policy.Death.KILLED: "warning"}.get(how, "info")
            if not self.held.served:
                level = "warning"  # whoever starts the mount is told
            log(level, "the worker ended", worker=worker.pid, status=code, how=how.name, served_s=served_s)
            if code == 0 and worker.ended == "unmounted":
                self._leave(0)
            elif self.settings.argv and not self.held.served and how is not policy.Death.ASKED:
                if self._failure is not None:
                    self.say("error", self._failure)  # else the log's last lines say more than we could
                self._leave(1)

    def _refuse(self) -> None:
        """Nobody serves the mount, and it has been too long: what waits for it fails."""
        held = self.held
        if not held.board.init:
            return  # nobody can wait yet
        if not self._refusing:
            self._refusing = True
            os.set_blocking(held.fuse_fd, False)
            try:
                kernel.resend(held.fuse_fd)
            except OSError as error:  # just unmounted, or a kernel before 6.9
                log("error", "what the last worker took can't be had again", reason=str(error))
            deliveries = held.board.deliveries()
            for unique, _ in deliveries:
                deliveries.remove(unique)
        if refused := kernel.refuse(held.fuse_fd, held.board):
            log("error", "requests failed because there is no worker", requests=refused)

    def _stop_refusing(self) -> None:
        if self._refusing:  # else the descriptor is a worker's, as it wants it
            self._refusing = False
            os.set_blocking(self.held.fuse_fd, True)

    # --- guests ------------------------------------------------------------------------------------------------------

    def _on_guest(self) -> None:
        try:
            sock, _ = self.held.listener.accept()
        except OSError:  # gone again
            return
        sock.setblocking(False)
        if wire.peer(sock)[1] != os.getuid() or len(self._guests) >= GUESTS:
            sock.close()
        else:
            self._guests.append(Guest(sock, time.monotonic() + GUEST_S))

    def _on_hello(self, guest: Guest) -> None:
        try:
            message, fds = wire.receive(guest.sock)
        except OSError:
            message, fds = None, []
        if message is None or fds:  # gone, or the worker of a mount that we don't have
            wire.close(fds)
            self._dismiss(guest)
        else:
            guest.hello = message.get("hello", "nothing")

    def _turn(self, guest: Guest, now: float) -> None:
        """Answer a guest whose turn it is."""
        worker, pid = self.held.worker, wire.peer(guest.sock)[0]
        if now >= guest.until or self._status is not None:
            self._dismiss(guest)
        elif guest.hello == "successor":
            if worker is None or not worker.leaving:
                self._hand_over(guest)
        elif guest.hello == 1 and not self.settings.argv:
            if worker is None:
                worker = Worker.of_peer(guest.sock, now)
                self._adopted(worker)
                self._attach(worker, guest)
        elif guest.hello == 1 and worker is not None and worker.pid == pid:
            if worker.sock is None and not worker.leaving:
                self._attach(worker, guest)
        elif guest.hello is not None:
            log("warning", "a stranger at the socket", pid=pid, hello=guest.hello)
            self._dismiss(guest)

    def _attach(self, worker: Worker, guest: Guest) -> None:
        self._stop_refusing()
        self._guests.remove(guest)
        worker.sock, board = guest.sock, self.held.board
        board.loop_ns = board.channel_ns = board.oldest_ns = board.limit_ns = 0
        board.generation += 1
        try:
            wire.send(worker.sock, self.welcome(), [self.held.fuse_fd, board.fd])
        except OSError as error:
            log("warning", "the worker left at once", worker=worker.pid, reason=str(error))

    def welcome(self) -> dict[str, object]:
        """The answer to a worker's hello."""
        held = self.held
        dev, generation = held.device, held.board.generation
        return {"mountpoint": held.mountpoint, "dev": dev, "generation": generation, "keeper": os.getpid()}

    def _hand_over(self, guest: Guest) -> None:
        """Give a successor everything; without its confirmation all stays as it is."""
        self._stop_refusing()
        held, worker = self.held, self.held.worker
        fds = {"fuse": held.fuse_fd, "board": held.board.fd, "listener": held.listener.fileno()}
        message = {"mountpoint": held.mountpoint, "dev": held.device, "state": held.state, "served": held.served}
        if worker is not None:
            message["worker"] = {"pid": worker.pid, "started": worker.started, "ready_at": worker.ready_at}
            fds |= {"pidfd": worker.pidfd} | ({"sock": worker.sock.fileno()} if worker.sock else {})
        if self.settings.lock_fd is not None:
            fds["lock"] = self.settings.lock_fd
        try:
            guest.sock.settimeout(TAKE_S)
            wire.send(guest.sock, {**message, "fds": list(fds)}, list(fds.values()))
            answer, unwanted = wire.receive(guest.sock)
            wire.close(unwanted)
            self._handed_over = bool(answer and answer.get("taken"))
        except OSError as error:
            log("error", "the successor did not take over", reason=str(error))
        else:
            log("info", "a successor has the mount" if self._handed_over else "the successor went away")
        self._dismiss(guest)

    def _dismiss(self, guest: Guest) -> None:
        guest.sock.close()
        self._guests.remove(guest)


def _error(message: str) -> dict[str, object]:
    """An error as helios.errors.from_code reads it."""
    return {"code": "Unavailable", "message": message, "hint": "The log says more."}
