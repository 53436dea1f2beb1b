"""The place for the one worker: how it is taken, watched, and free again. The phases in between: worker.py.

Only the worker in the place reads what the kernel asks. It is free again once that one's process is gone, or it was
dropped; when it has been free for too long the keeper reads, to refuse.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Final, NamedTuple

from heliosfs.keeper import kernel, policy, wire
from heliosfs.keeper.guest import Guest
from heliosfs.keeper.held import Held
from heliosfs.keeper.log import log
from heliosfs.keeper.policy import Death
from heliosfs.keeper.refuse import refuse
from heliosfs.keeper.worker import Phase, Worker

FROZEN_S: Final = 3.0
"""A tick that comes this late means that the machine stood still: signs of life count from then."""


class Settings(NamedTuple):
    """What the command line says; times in seconds. ``argv`` is empty where somebody else starts the workers."""

    socket: str
    argv: list[str]
    uids: list[int]
    pid_file: str | None
    stall_s: float
    patience_s: float
    grace_s: float


class Place:
    """``say`` tells whoever started us how it went; ``leave`` ends the mount with an exit status, and says why."""

    def __init__(
        self, settings: Settings, held: Held, say: Callable[[str, Any], None], leave: Callable[[int, str], None]
    ) -> None:
        self.settings, self.held, self.say, self.leave = settings, held, say, leave
        self.board = held.board
        self.worker: Worker | None = None
        self._closed = self._served = False
        self._dropped: list[int] = []  # workers' pidfds
        self._restarts = policy.Restarts()
        self._spawn_at = 0.0 if settings.argv else math.inf
        self._ticked = self._down_since = time.monotonic()
        self._resumed = 0.0
        self._ooms = deque([kernel.oom_kills()], 20)  # at the last ticks

    # --- for the loop ------------------------------------------------------------------------------------------------

    def handlers(self) -> dict[int, Callable[[], None]]:
        """What to do when which descriptor is readable."""
        found: dict[int, Callable[[], None]] = {fd: partial(self._on_end_of_dropped, fd) for fd in self._dropped}
        if (worker := self.worker) is not None:
            found[worker.pidfd] = partial(self._on_end, worker)
            if worker.sock is not None:
                found[worker.sock.fileno()] = partial(self._on_message, worker)
        if self._unserved():
            found[self.held.fuse_fd] = lambda: None  # the next tick refuses it
        return found

    @property
    def deadline(self) -> float:
        """When the next tick must be, at the latest."""
        return self._spawn_at if self.worker is None else self.worker.deadline

    def tick(self, now: float) -> None:
        """Do what is due."""
        if now - self._ticked > FROZEN_S:
            self._resumed = now
        self._ticked = now
        self._ooms.append(kernel.oom_kills())
        if self.worker is not None:
            self._watch(self.worker, now)
        elif now >= self._spawn_at and not self._closed:
            self._spawn()
        if self._unserved() and (refused := refuse(self.held.fuse_fd, self.board)):
            log("error", "requests failed because there is no worker", requests=refused)

    def close(self) -> None:
        """The worker goes, and no other comes."""
        self._closed = True
        if self.worker is not None:
            self.worker.stop(self.settings.grace_s)

    # --- taken -------------------------------------------------------------------------------------------------------

    def _spawn(self) -> None:
        try:
            self.take(Worker.spawn(self.settings.argv, self.settings.socket))
        except OSError as error:
            message = f"no worker can be started: {error}"
            log("error", message)
            self._next(Death.CRASH, None, {"code": "Unavailable", "message": message, "hint": "The log says more."})

    def take(self, worker: Worker) -> None:
        """The place is this worker's, which may have come with the mount."""
        self.worker = worker
        self._served |= worker.ready_at is not None
        if (path := self.settings.pid_file) and worker.pid:
            try:
                with open(f"{path}.new", "w") as file:
                    file.write(f"{worker.pid}\n")
                os.replace(f"{path}.new", path)
            except OSError as error:  # it is for people
                log("warning", "the worker's pid can't be written", reason=error.strerror)

    def attach(self, sock: socket.socket) -> None:
        """Give the worker the mount: from now on the board, and what the kernel asks, are its own."""
        assert self.worker is not None
        board = self.board
        board.loop_ns = board.channel_ns = board.oldest = board.oldest_ns = board.limit_ns = 0
        board.generation += 1
        self.worker.attach(sock)
        self.worker.hurry(self._limit(time.monotonic()))
        self.welcome(self.held.fuse_fd, board.fd)

    def rejoin(self, guest: Guest) -> None:
        """Our worker comes back that was to bring the mount to another keeper; others bring one that is not ours."""
        worker, ours = self.worker, len(guest.fds) == 2 and os.path.sameopenfile(guest.fds[1], self.board.fd)
        if worker is None or worker.sock is not None or worker.phase is not Phase.SERVING or not ours:
            guest.dismiss()
            return
        wire.close(guest.fds)
        worker.attach(guest.sock)
        self.welcome()

    def welcome(self, *fds: int) -> None:
        """Answer a worker's hello, or say to one that came with the mount who keeps it now."""
        held = self.held
        about = {"mountpoint": held.mountpoint, "dev": held.device, "generation": self.board.generation}
        with contextlib.suppress(OSError):  # it is gone again: that is noticed as ever
            if self.worker is not None and self.worker.sock is not None:
                wire.send(self.worker.sock, {**about, "keeper": os.getpid(), "external": not self.settings.argv}, fds)

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
                    self._served = True
                    log("info", "the worker is ready", worker=worker.pid, generation=self.board.generation)
                    self.say("state", message.get("state"))
                else:
                    worker.said = message

    # --- watched -----------------------------------------------------------------------------------------------------

    def replace(self, why: str) -> None:
        """Have the worker go, unless it is going."""
        if (worker := self.worker) is not None and worker.phase < Phase.GOING:
            log("info", f"the worker is replaced, {why}", worker=worker.pid, name=worker.name)
            worker.stop(self.settings.grace_s)

    def _watch(self, worker: Worker, now: float) -> None:
        """End the worker's phase if it is over."""
        late, reason = now >= worker.deadline, None
        match worker.phase:
            case Phase.STARTING if late:
                reason = "it was not ready in time"
            case Phase.STARTING | Phase.SERVING if worker.ready_at or (worker.attached and self.board.loop_ns):
                since = max(worker.ready_at or 0.0, self._resumed)
                oldest = self.board.oldest
                reason = policy.hang(self.board, now, since, self.settings.stall_s)
                worker.late = oldest if policy.overdue(self.board, now, since) else 0
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
        self.board.generation += 1
        if not worker.kill():
            log("warning", "the worker can't be killed from here; it is dropped", worker=worker.pid)
            worker.hang_up()

    # --- free again --------------------------------------------------------------------------------------------------

    def _drop(self, worker: Worker) -> None:
        """Wait no more for a process that does not end: what it may still write reaches nobody."""
        log("error", "a killed worker is not gone; the next one does not wait for it", worker=worker.pid)
        self._free(worker, None)
        self._dropped.append(worker.pidfd)
        last, self.board = self.board, self.board.copied()
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
        now = time.monotonic()
        worker.hang_up()
        self.worker = None
        served_s = None if worker.ready_at is None else now - worker.ready_at
        oom = kernel.oom_kills() > self._ooms[0]
        how = policy.death(code, asked=worker.asked, hung=worker.hung, ended=bool(worker.said), oom=oom)
        self.board.crashes += how is Death.CRASH
        self.board.late = worker.late
        level = "info" if how in (Death.ASKED, Death.CLEAN) else "warning"
        if how is Death.CRASH and code is not None and self._served:  # else nobody's fault for sure, or the starter's
            level = "error"
        log(level, "the worker ended", worker=worker.pid, status=code, how=how.name, served_s=served_s)
        if served_s is not None:
            self._down_since = now
        if worker.said.get("ended") == "unmounted":
            self.leave(0, "unmounted by somebody")
        self._next(how, served_s, worker.said.get("failed"))

    def _next(self, how: Death, served_s: float | None, failure: object) -> None:
        """After a worker, or an attempt to start one: the next, or the end where there never was one that served."""
        if not self.settings.argv or self._closed:
            return
        if self._served or how is Death.ASKED:
            self._spawn_at = time.monotonic() + self._restarts.died(how, served_s)
            return
        if failure is not None:  # else the log's last lines say more than we could
            self.say("error", failure)
        self.leave(1, "no worker ever served this mount")

    def _unserved(self) -> bool:
        """Whether requests fail: nobody has served for too long, and no worker has the descriptor to read them from.

        Before the kernel's INIT was answered nobody can wait.
        """
        late = time.monotonic() >= self._down_since + self.settings.patience_s
        attached = self.worker is not None and self.worker.attached
        return late and not attached and not self._closed and bool(self.board.init_len)

    def _limit(self, now: float) -> float:
        """When a worker that attaches now must be ready, since what waits is to fail then, and only without a worker
        can it. Where that was over before, all that waited until now has failed."""
        if not self.board.init_len:
            return math.inf
        limit = self._down_since + self.settings.patience_s
        return limit if now < limit else now + self.settings.patience_s
