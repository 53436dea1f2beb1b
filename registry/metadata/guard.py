"""A number that a process holds for as long as it is connected: others see at once that it has ended.

It is a lock of PostgreSQL that belongs to a connection, and that the server gives back when that is closed, which the
kernel does for a process however it ends. A connection may break although the process lives. So that nobody holds the
number is a reason to do its work beside it where that does no harm, and no proof that it is dead: that is its lease.
"""

from __future__ import annotations

import contextlib
import secrets
from typing import Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from registry.metadata.database import Database

BITS: Final = 62
"""Of a number: two processes draw the same one never."""


class Guard:
    """The number of one process. One thread holds and closes it."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._connection: Connection | None = None
        self.number: int | None = None
        """What is held, as far as is known; None: nothing."""

    def hold(self) -> None:
        """See that a number is held: another one where the connection was lost. Raises Unavailable, and holds none."""
        if self._connection is not None:
            with contextlib.suppress(sa.exc.DBAPIError):
                self._connection.exec_driver_sql("SELECT 1")
                return
            self.close()
        with self._database.errors():
            connection = self._database.engine.connect().execution_options(helios_single=True)
            number = secrets.randbits(BITS)
            try:
                connection.execute(sa.select(sa.func.pg_advisory_lock(number)))
            except BaseException:
                connection.invalidate()
                connection.close()
                raise
        self._connection, self.number = connection, number

    def close(self) -> None:
        """Hold nothing any more."""
        connection, self._connection, self.number = self._connection, None, None
        if connection is not None:
            connection.invalidate()
            connection.close()
