"""This process among those that share a registry's metadata: its lease, and what dead ones left."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from typing import Final

from sqlalchemy.engine import Connection

from helios.errors import HeliosError
from registry.metadata import claims
from registry.metadata.database import Changes, Database
from registry.metadata.guard import Guard

log = logging.getLogger("helios.registry.member")

LEASE_S: Final = 30.0
"""A process that has not renewed its lease for this long is taken for dead, in seconds of the database's clock."""


class Member:
    """One process. Its sessions are safe while it renews its lease; if it can't, they end and it begins new ones."""

    def __init__(self, database: Database, *, lease_s: float = LEASE_S) -> None:
        self.id = secrets.token_hex(16)
        self._database, self._lease_s = database, lease_s
        self._guard: Guard | None = None
        self.url = ""
        """Where other processes reach this one; "": nowhere."""
        self._name = f"{socket.gethostname()}:{os.getpid()}"

    def begin(self, connection: Connection, session: str) -> None:
        """Start a session that this process holds, inside a writing transaction."""
        self._renew(connection)
        claims.begin(connection, session, self.id)

    def renew(self) -> None:
        """Say that this process is alive."""
        with self._database.write(lazy=True, changes=Changes.NOTHING) as connection:
            self._renew(connection)

    def _renew(self, connection: Connection) -> None:
        claims.lease(connection, self.id, self._name, self.url, self._database.kind.now, self._lease_s, self._held)

    def _hold(self) -> None:
        """Be seen to be connected, if that can be: the lease counts without it, too."""
        try:
            if self._guard is not None:
                self._guard.hold()
        except HeliosError as error:
            log.warning("others can't see whether this process is connected", extra={"error": str(error)})

    @property
    def _held(self) -> int | None:
        return None if self._guard is None else self._guard.number

    def reached_at(self, url: str) -> None:
        """Tell the others where this process is reached from here on."""
        self.url = url
        if self._database.kind.shared:
            self.renew()

    def present(self, connection: Connection) -> None:
        """Be among the processes at work, inside a writing transaction whose rows refer to this one."""
        self._renew(connection)

    def bury_dead(self) -> int:
        """End the sessions of processes that are dead; returns how many there were.

        Where processes don't share the database, every other one is. What the sessions leave is for ``Sessions.clean``.
        """
        now, shared = self._database.kind.now, self._database.kind.shared
        with self._database.read() as connection:
            if shared and not claims.dead_processes(connection, now) and not claims.orphans(connection):
                return 0
            if not shared and not claims.orphans(connection, {self.id}):
                return 0
        with self._database.write(changes=Changes.NOTHING) as connection:
            if shared:
                for process, name in claims.dead_processes(connection, now).items():
                    log.warning("a registry process is gone", extra={"who": name})
                    claims.leave(connection, process)
            else:
                claims.leave_all(connection, besides=self.id)
            left = claims.orphans(connection, None if shared else {self.id})
            claims.end(connection, left)
        return len(left)

    def leave(self) -> None:
        """End this process' part, at shutdown."""
        with self._database.write(changes=Changes.NOTHING) as connection:
            claims.leave(connection, self.id)
            claims.end(connection, claims.orphans(connection))

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Renew the lease in a thread of its own, so that nothing that blocks elsewhere can cost it; then leave."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(self._lease_s / 5):
                self._hold()
                try:
                    self.renew()
                except HeliosError as error:
                    log.warning("the lease could not be renewed", extra={"error": str(error)})

        thread = threading.Thread(target=beat, name="lease", daemon=True)
        if self._database.kind.shared:  # else nobody would ask
            self._guard = Guard(self._database)
            self._hold()
            self.renew()
            thread.start()
        try:
            yield
        finally:
            stop.set()
            if thread.is_alive():
                thread.join()
            try:
                self.leave()
            except HeliosError as error:  # the others, or the next start, see that the lease is over
                log.warning("could not leave in order", extra={"error": str(error)})
            if self._guard is not None:
                self._guard.close()
