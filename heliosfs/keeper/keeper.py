"""The keeper's loop: one thread and one poll(2), for the worker, for guests at the socket and for signals.

``_tick`` looks at all deadlines, ``_on_…`` take what came. There is one place for a worker, ``held.worker``; it is free
again once that one's process is gone, or it was dropped. Phases and their order: worker.py.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple

from heliosfs.keeper import kernel, policy, wire
from heliosfs.keeper.guest import Guest
from heliosfs.keeper.held import Held
from heliosfs.keeper.log import log
from heliosfs.keeper.policy import Death
from heliosfs.keeper.refuse import refuse
from heliosfs.keeper.worker import Phase, Worker

TICK_S: Final = 0.5
"""How often signs of life are looked at."""

FROZEN_S: Final = 3.0
"""A tick that comes this late means that the machine stood still: signs of life count from then."""

BRISK_S: Final = 2.0
"""A worker that is to keep the mount on its own must have lived that lately."""

GUESTS: Final = 8


class Settings(NamedTuple):
    """What the command line says; times in seconds. ``argv`` is empty where somebody else starts the workers."""

    socket: str
    argv: list[str]
    uids: list[int]
    pid_file: str | None
    created: bool
    stall_s: float
    patience_s: float
    grace_s: float


class Keeper:
    """``signals`` is the end of a pipe that gets the number of every signal; ``say`` tells whoever started us."""

    def __init__(self, settings: Settings, held: Held, signals: int, say: Callable[[str, object], None]) -> None:
        self.settings, self.held, self.signals, self.say = settings, held, signals, say
        self._status: int | None = None  # of our exit, once the mount is being let go
        self._gone = False  # somebody else has the mount
        self._guests: list[Guest] = []
        self._dropped: list[int] = []  # workers' pidfds
        self._superseded = ""  # the worker's name before this one's
        self._restarts = policy.Restarts()
        self._spawn_at = 0.0 if settings.argv else math.inf
        self._ticked = self._down_since = time.monotonic()
        self._resumed = 0.0
        self._ooms = deque([kernel.oom_kills()], 20)  # at the last ticks

    def run(self) -> int:
        """Keep the mount until it ends or somebody else has it; returns the exit status."""
        if (worker := self.held.worker) is not None:
            self._take_in(worker)
            self._welcome(worker)
        while True:
            self._tick(time.monotonic())
            if self._gone:
                return 0
            if self._status is not None and self.held.worker is None:
                self._clean_up()
                return self._status
            self._wait()

    def _wait(self) -> None:
        held, worker = self.held, self.held.worker
        handlers: dict[int, Callable[[], None]] = {
            self.signals: self._on_signal,
            held.listener.fileno(): self._on_guest,
        }
        handlers |= {pidfd: partial(self._on_end_of_dropped, pidfd) for pidfd in self._dropped}
        if worker is not None:
            handlers[worker.pidfd] = partial(self._on_end, worker)
            if worker.sock is not None:
                handlers[worker.sock.fileno()] = partial(self._on_message, worker)
        if self._unserved():
            handlers[held.fuse_fd] = self._refuse
        until = min(self._ticked + TICK_S, self._spawn_at if worker is None else worker.deadline)
        poller = select.poll()
        for fd in handlers:
            poller.register(fd, select.POLLIN)
        for fd, _ in poller.poll(max(0.0, until - time.monotonic()) * 1000):
            handlers[fd]()

    def _tick(self, now: float) -> None:
        if now - self._ticked > FROZEN_S:
            self._resumed = now
        self._ticked = now
        self._ooms.append(kernel.oom_kills())
        if self._status is None and not kernel.connected(self.held.fuse_fd):
            self._leave(0, "unmounted by somebody")
        if self.held.worker is not None:
            self._watch(self.held.worker, now)
        elif self._status is None and now >= self._spawn_at:
            self._spawn(now)
        for guest in list(self._guests):
            self._turn(guest)
        if self._unserved():
            self._refuse()

    # --- the end -----------------------------------------------------------------------------------------------------

    def _on_signal(self) -> None:
        for number in os.read(self.signals, 64):
            worker = self.held.worker
            if number == signal.SIGHUP:
                if worker is not None:
                    self._replace(worker, "as was asked")
            elif number == signal.SIGTERM and not self.settings.argv and worker is not None and worker.ready_at:
                self._part(worker)
            else:
                self._leave(0 if number == signal.SIGTERM else 128 + number, f"stopping: {signal.Signals(number).name}")

    def _part(self, worker: Worker) -> None:
        """End without the mount, which stays with its worker."""
        log("info", "the mount stays with its worker until another keeper comes", worker=worker.pid)
        self._gone = True

    def _leave(self, status: int, why: str) -> None:
        """Unmount and end the worker; the loop ends with it."""
        if self._status is not None:
            return
        self._status = status
        log("info", why, mountpoint=self.held.mountpoint)
        try:
            kernel.detach(self.held.mountpoint, self.held.device)
        except OSError as error:
            log("error", "the unmount failed", reason=str(error))
        if self.held.worker is not None:
            self.held.worker.stop(self.settings.grace_s)

    def _clean_up(self) -> None:
        """Leave nothing behind; the descriptors close with this process."""
        held, lock = self.held, self.held.lock_fd
        kernel.abort(held.device)
        with contextlib.suppress(OSError):  # not empty: somebody uses it
            if self.settings.created:
                os.rmdir(held.mountpoint)
        for path in (self.settings.socket, self.settings.pid_file, lock and os.readlink(f"/proc/self/fd/{lock}")):
            with contextlib.suppress(FileNotFoundError):
                if path:
                    os.unlink(path)
        log("info", "unmounted", mountpoint=held.mountpoint)

    # --- the worker --------------------------------------------------------------------------------------------------

    def _spawn(self, now: float) -> None:
        try:
            self._take_in(Worker.spawn(self.settings.argv, self.settings.socket))
        except OSError as error:
            message = f"no worker can be started: {error}"
            log("error", message)
            self._next(Death.CRASH, None, {"code": "Unavailable", "message": message, "hint": "The log says more."})

    def _take_in(self, worker: Worker) -> None:
        """The place is taken."""
        self.held.worker = worker
        if (path := self.settings.pid_file) and worker.pid:
            try:
                with open(f"{path}.new", "w") as file:
                    file.write(f"{worker.pid}\n")
                os.replace(f"{path}.new", path)
            except OSError as error:  # it is for people
                log("warning", "the worker's pid can't be written", reason=error.strerror)

    def _attach(self, worker: Worker, guest: Guest) -> None:
        """From now on the board, and what the kernel asks, are this worker's."""
        board = self.held.board
        self._guests.remove(guest)
        board.loop_ns = board.channel_ns = board.oldest_ns = board.limit_ns = 0
        board.generation += 1
        worker.attach(guest.sock)
        self._welcome(worker, self.held.fuse_fd, board.fd)

    def _welcome(self, worker: Worker, *fds: int) -> None:
        """The answer to a worker's hello, and a new keeper's greeting."""
        held = self.held
        about = {"mountpoint": held.mountpoint, "dev": held.device, "generation": held.board.generation}
        with contextlib.suppress(OSError):  # it is gone again: that is noticed as ever
            if worker.sock is not None:
                wire.send(worker.sock, {**about, "keeper": os.getpid(), "external": not self.settings.argv}, fds)

    def _on_message(self, worker: Worker) -> None:
        with contextlib.suppress(BlockingIOError):  # that was all
            while worker.sock is not None:
                message, fds = wire.receive(worker.sock)
                wire.close(fds)
                if message is None:
                    worker.hang_up()
                    worker.goes(self.settings.grace_s)
                elif message.get("ready"):
                    worker.ready()
                    self.held.state, self.held.served = message.get("state"), True
                    log("info", "the worker is ready", worker=worker.pid, generation=self.held.board.generation)
                    self.say("state", self.held.state)
                else:
                    worker.said = message

    def _replace(self, worker: Worker, why: str) -> None:
        if worker.phase < Phase.GOING:
            log("info", f"the worker is replaced, {why}", worker=worker.pid, name=worker.name)
            worker.stop(self.settings.grace_s)

    def _watch(self, worker: Worker, now: float) -> None:
        """End the worker's phase if it is over."""
        late, reason = now >= worker.deadline, None
        match worker.phase:
            case Phase.STARTING if late:
                reason = "it was not ready in time"
            case Phase.SERVING:
                since = max(worker.ready_at or 0.0, self._resumed)
                reason = policy.hang(self.held.board, now, since, self.settings.stall_s)
            case Phase.GOING if late:
                self._kill(worker)
            case Phase.KILLED if late:
                self._drop(worker)
        if reason is not None:
            log("error", "the worker hangs and is replaced", worker=worker.pid, reason=reason)
            worker.hung = True
            self._kill(worker)

    def _kill(self, worker: Worker) -> None:
        """End its process, or, where that is not ours to do, its say in the mount: it heeds the board as it wakes."""
        self.held.board.generation += 1
        if not worker.kill():
            log("warning", "the worker can't be killed from here; it is dropped", worker=worker.pid)
            worker.hang_up()

    def _drop(self, worker: Worker) -> None:
        """Wait no more for a process that does not end: what it may still write reaches nobody."""
        log("error", "a killed worker is not gone; the next one does not wait for it", worker=worker.pid)
        self._free(worker, None)
        self._dropped.append(worker.pidfd)
        last, self.held.board = self.held.board, self.held.board.copied()
        last.close()

    def _on_end_of_dropped(self, pidfd: int) -> None:
        """What it took while it hung is nobody's now."""
        self._dropped.remove(pidfd)
        os.close(pidfd)
        kernel.resend(self.held.fuse_fd)

    def _on_end(self, worker: Worker) -> None:
        self._on_message(worker)  # its last words
        self._free(worker, worker.status())
        os.close(worker.pidfd)

    def _free(self, worker: Worker, code: int | None) -> None:
        """The place is free: judge why, and see to the next worker."""
        now, held = time.monotonic(), self.held
        worker.hang_up()
        held.worker = None
        served_s = None if worker.ready_at is None else now - worker.ready_at
        oom = kernel.oom_kills() > self._ooms[0]
        how = policy.death(code, asked=worker.asked, hung=worker.hung, ended=bool(worker.said), oom=oom)
        held.board.crashes += how is Death.CRASH
        level = "info" if how in (Death.ASKED, Death.CLEAN) else "warning"
        if how is Death.CRASH and code is not None and held.served:  # else nobody's fault for sure, or the starter's
            level = "error"
        log(level, "the worker ended", worker=worker.pid, status=code, how=how.name, served_s=served_s)
        if served_s is not None:
            self._down_since = now
        if worker.said.get("ended") == "unmounted":
            self._leave(0, "unmounted by somebody")
        self._next(how, served_s, worker.said.get("failed"))

    def _next(self, how: Death, served_s: float | None, failure: object) -> None:
        """After a worker, or an attempt to start one: the next, or the end, where there never was one that served."""
        if not self.settings.argv or self._status is not None:
            return
        if self.held.served or how is Death.ASKED:
            self._spawn_at = time.monotonic() + self._restarts.died(how, served_s)
            return
        if failure is not None:  # else the log's last lines say more than we could
            self.say("error", failure)
        self._leave(1, "no worker ever served this mount")

    # --- nobody serves -----------------------------------------------------------------------------------------------

    def _unserved(self) -> bool:
        """Whether requests fail: nobody has served for too long, and no worker has the descriptor to read them from.

        Before the kernel's INIT was answered nobody can wait.
        """
        worker, late = self.held.worker, time.monotonic() >= self._down_since + self.settings.patience_s
        attached = worker is not None and worker.attached
        return late and not attached and self._status is None and bool(self.held.board.init_len)

    def _refuse(self) -> None:
        if refused := refuse(self.held.fuse_fd, self.held.board):
            log("error", "requests failed because there is no worker", requests=refused)

    # --- guests ------------------------------------------------------------------------------------------------------

    def _on_guest(self) -> None:
        guest = Guest.greet(self.held.listener, self.settings.uids)
        if guest is not None and not guest.fds and len(self._guests) < GUESTS:
            self._guests.append(guest)
        elif guest is not None:  # one too many, or the worker of a mount that we don't have any more
            guest.dismiss()

    def _turn(self, guest: Guest) -> None:
        """Answer a guest, or let it wait. While a worker is going everybody waits."""
        worker, spawns = self.held.worker, bool(self.settings.argv)
        if self._status is not None or not kernel.connected(guest.sock.fileno()):
            self._dismiss(guest)
        elif worker is not None and worker.phase >= Phase.GOING:
            return
        elif guest.hello == "successor":
            if worker is not None and policy.hang(self.held.board, self._ticked, 0.0, BRISK_S) is None:
                wire.send(guest.sock, {"yours": True})
                self._part(worker)
        elif guest.hello != "1" or (spawns and (worker is None or worker.pid != guest.pid)):
            log("warning", "a stranger at the socket", pid=guest.pid, hello=guest.hello)
            self._dismiss(guest)
        elif worker is None:
            with contextlib.suppress(OSError):  # it is gone, and dismissed at its next turn
                self._take_in(worker := Worker.of_peer(guest))
                self._attach(worker, guest)
        elif spawns and not worker.attached:
            self._attach(worker, guest)
        elif not spawns and guest.name not in ("", worker.name, self._superseded):
            self._superseded = worker.name
            self._replace(worker, f"{guest.name} comes")

    def _dismiss(self, guest: Guest) -> None:
        guest.dismiss()
        self._guests.remove(guest)
