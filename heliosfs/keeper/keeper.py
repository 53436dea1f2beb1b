"""The keeper's loop: one thread and one poll(2), for signals, for guests at the socket and for the worker's place."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from typing import Any, Final

from heliosfs.keeper import kernel, policy, wire
from heliosfs.keeper.guest import Guest
from heliosfs.keeper.held import Held
from heliosfs.keeper.log import log
from heliosfs.keeper.place import Place, Settings
from heliosfs.keeper.worker import Phase, Worker

TICK_S: Final = 0.5
"""How often signs of life are looked at."""

BRISK_S: Final = 2.0
"""A worker that is to keep the mount on its own must have lived that lately."""

HANDING_S: Final = 5.0
"""How long our worker may take to bring the mount to a successor."""

PART_S: Final = 20.0
"""How long a keeper that is told to end waits for a worker that is coming or going."""

GUESTS: Final = 8


class Keeper:
    """``signals`` is the end of a pipe that gets the number of every signal; ``say`` tells whoever started us."""

    def __init__(self, settings: Settings, held: Held, signals: int, say: Callable[[str, Any], None]) -> None:
        self.settings, self.held, self.signals = settings, held, signals
        self._place = Place(settings, held, say, self._leave)
        self._guests: list[Guest] = []
        self._superseded = ""  # the name of the worker that one with another name replaced
        self._heir: Guest | None = None  # the successor that our worker is to bring the mount to
        self._until = 0.0
        self._part_by: float | None = None  # we are to end, and until then to find a worker that holds the mount
        self._gone = False  # the mount stays, and we go
        self._status: int | None = None  # of our exit, once the mount ends

    def run(self) -> int | None:
        """Keep the mount. Returns the exit status when it has ended; None when it goes on with its worker alone."""
        if self.held.worker is not None:
            self._place.take(self.held.worker)
            self._place.welcome()
        while True:
            now = time.monotonic()
            self._tick(now)
            if self._gone:
                return None
            if self._status is not None and self._place.worker is None:
                return self._status
            self._wait(now + TICK_S)

    def _tick(self, now: float) -> None:
        """Look at all deadlines."""
        if self._status is None and not kernel.connected(self.held.fuse_fd):
            self._leave(0, "unmounted by somebody")
        for guest in list(self._guests):
            self._turn(guest, now)
        self._place.tick(now)
        if self._part_by is not None and self._status is None:
            self._part(now >= self._part_by)

    def _wait(self, until: float) -> None:
        """Wait for what comes, and take it."""
        handlers = {self.signals: self._on_signal, self.held.listener.fileno(): self._on_guest}
        handlers |= self._place.handlers()
        poller = select.poll()
        for fd in handlers:
            poller.register(fd, select.POLLIN)
        for fd, _ in poller.poll(max(0.0, min(until, self._place.deadline) - time.monotonic()) * 1000):
            handlers[fd]()

    # --- the end -----------------------------------------------------------------------------------------------------

    def _on_signal(self) -> None:
        for number in os.read(self.signals, 64):
            if number == signal.SIGHUP:
                self._place.replace("as was asked")
            elif number == signal.SIGTERM and not self.settings.argv:
                self._part_by = self._part_by or time.monotonic() + PART_S
            else:
                self._leave(0 if number == signal.SIGTERM else 128 + number, f"stopping: {signal.Signals(number).name}")

    def _part(self, late: bool) -> None:
        """Leave the mount with the worker that serves. One that starts or goes is waited for, as is one that waits for
        its place; without any, or when it is late, the mount ends."""
        worker = self._place.worker
        if worker is not None and worker.phase is Phase.SERVING:
            log("info", "the mount stays with its worker until another keeper comes", worker=worker.pid)
            self._gone = True
        elif late or (worker is None and not any(guest.hello == "1" for guest in self._guests)):
            self._leave(0, "stopping: SIGTERM")

    def _leave(self, status: int, why: str) -> None:
        """Unmount and end the worker; the loop ends with it. The first reason counts."""
        if self._status is None:
            self._status = status
            log("info", why, mountpoint=self.held.mountpoint)
            try:
                kernel.detach(self.held.mountpoint, self.held.device)
            except OSError as error:
                log("error", "the unmount failed", reason=str(error))
            self._place.close()

    # --- guests ------------------------------------------------------------------------------------------------------

    def _on_guest(self) -> None:
        guest = Guest.greet(self.held.listener, self.settings.uids)
        if guest is not None and guest.fds:
            self._place.rejoin(guest)
        elif guest is not None and len(self._guests) < GUESTS:
            self._guests.append(guest)
        elif guest is not None:  # one too many
            guest.dismiss()

    def _turn(self, guest: Guest, now: float) -> None:
        """Answer a guest, or let it wait: while a worker is going everybody does."""
        worker, spawned = self._place.worker, bool(self.settings.argv)
        if self._gone or self._status is not None or not kernel.connected(guest.sock.fileno()):
            self._dismiss(guest)
        elif guest is self._heir:
            self._hand_over(guest, worker is None or worker.sock is not None or now >= self._until)
        elif self._heir is not None or (worker is not None and worker.phase >= Phase.GOING):
            return
        elif guest.hello == "successor":
            brisk = policy.hang(self._place.board, now, 0.0, BRISK_S) is None
            if worker is not None and worker.phase is Phase.SERVING and brisk:
                with contextlib.suppress(OSError):  # it is gone, and dismissed at its next turn
                    wire.send(guest.sock, {"yours": True})
                    self._heir, self._until = guest, now + HANDING_S
                    worker.hang_up()
        elif guest.hello != "1" or (spawned and (worker is None or worker.pid != guest.pid)):
            log("warning", "a stranger at the socket", pid=guest.pid, hello=guest.hello)
            self._dismiss(guest)
        elif worker is None:
            with contextlib.suppress(OSError):  # it is gone, and dismissed at its next turn
                self._place.take(Worker.of_peer(guest))
                self._admit(guest)
        elif spawned and not worker.attached:
            self._admit(guest)
        elif not spawned and guest.name not in ("", worker.name, self._superseded):
            self._superseded = worker.name
            self._place.replace(f"{guest.name} comes")

    def _admit(self, guest: Guest) -> None:
        self._guests.remove(guest)
        self._place.attach(guest.sock)

    def _hand_over(self, guest: Guest, late: bool) -> None:
        """Go once the successor says that it has the mount; when it is too late for that, keep it."""
        if late:
            guest.sock.shutdown(socket.SHUT_RD)  # either it has said so by now, or it can't any more
        message, fds = None, list[int]()
        with contextlib.suppress(BlockingIOError):
            message, fds = wire.receive(guest.sock)
        wire.close(fds)
        if message is not None:
            log("info", "another keeper has the mount", keeper=guest.pid)
            self._gone = True
        elif late:
            log("warning", "the worker brought the mount to no other keeper; this one keeps it")
            with contextlib.suppress(OSError):  # it is gone
                wire.send(guest.sock, {"yours": False})
            self._dismiss(guest)

    def _dismiss(self, guest: Guest) -> None:
        self._heir = None if guest is self._heir else self._heir
        self._guests.remove(guest)
        guest.dismiss()
