"""Leases: on commits that somebody uses, and on work that one process does at a time. Every function runs inside a
transaction; times are seconds of the database's clock."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from registry.metadata.gc_tables import pins, turns
from registry.metadata.repositories import Repository
from registry.metadata.tables import is_there, processes, repositories


@dataclass(frozen=True, slots=True)
class Pin:
    """A lease on a commit: who holds it, and until when."""

    holder: str
    repo: str
    commit: str
    expires: float


def clock(connection: Connection, now: sa.ColumnElement[float]) -> float:
    """What the database's clock shows."""
    return float(connection.scalar(sa.select(now)) or 0.0)


# --- turns ---


def take_turn(connection: Connection, name: str, holder: str, now: float, *, shared: bool) -> bool:
    """Have a process do some work that only one does at a time; False while another one that is alive does it.

    Where processes don't share the database (``shared``) there is no other one.
    """
    held_by = connection.scalar(sa.select(turns.c.holder).where(turns.c.name == name))
    if shared and held_by not in (None, holder):
        alive = sa.select(processes.c.id).where(processes.c.id == held_by, processes.c.expires >= now)
        if connection.scalar(alive) is not None:
            return False
    connection.execute(turns.delete().where(turns.c.name == name))
    connection.execute(turns.insert().values(name=name, holder=holder))
    return True


def leave_turn(connection: Connection, name: str, holder: str) -> None:
    """Give the turn back."""
    connection.execute(turns.delete().where(turns.c.name == name, turns.c.holder == holder))


# --- pins ---


def pin(connection: Connection, holder: str, repository: Repository, commit: str, expires: float) -> None:
    """Keep a commit of the repository until then; again for a later time, or an earlier one."""
    unpin(connection, holder, repository, commit)
    values = {"holder": holder, "repository": repository.id, "commit": commit, "expires": expires}
    connection.execute(pins.insert().values(values))


def unpin(connection: Connection, holder: str, repository: Repository, commit: str) -> None:
    """Give a pin back; one that is not there is no error."""
    where = (pins.c.holder == holder) & (pins.c.repository == repository.id) & (pins.c.commit == commit)
    connection.execute(pins.delete().where(where))


def pins_of(connection: Connection, now: float) -> list[Pin]:
    """All pins that hold, by repository and commit."""
    query = sa.select(pins.c.holder, repositories.c.name, pins.c.commit, pins.c.expires)
    query = query.join_from(pins, repositories, pins.c.repository == repositories.c.id).where(pins.c.expires > now)
    query = query.where(is_there())
    return [Pin(*row) for row in connection.execute(query.order_by(repositories.c.name, pins.c.commit, pins.c.holder))]


def count_pins(connection: Connection, holder: str) -> int:
    """How many commits a holder has pinned."""
    return connection.scalar(sa.select(sa.func.count()).where(pins.c.holder == holder)) or 0


def forget_pins(connection: Connection, now: float) -> None:
    """Drop pins whose time is over."""
    connection.execute(pins.delete().where(pins.c.expires <= now))
