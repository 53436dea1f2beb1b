"""Who brings a content and has ended is known by its connection, long before its lease is over."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from registry.member import Member
from registry.metadata import claims, sharing
from registry.metadata.database import Changes, Database
from registry.metadata.tables import processes

CONTENT = "a content"


@pytest.fixture
def two(postgres_url: str) -> Iterator[tuple[Database, Database]]:
    """Two processes' databases, which are one."""
    with contextlib.ExitStack() as stack:
        yield tuple(stack.enter_context(contextlib.closing(Database.postgres(postgres_url))) for _ in range(2))  # type: ignore[misc]


def cut_off(database: Database) -> None:
    """End the connection that holds a number, as the end of its process does."""
    with database.write(changes=Changes.NOTHING) as connection:
        connection.execute(
            sa.text(
                "SELECT pg_terminate_backend(l.pid, 10000) FROM pg_locks l, processes p WHERE l.locktype = 'advisory' "
                "AND l.objid::bigint = p.guard & 4294967295 AND l.classid::bigint = p.guard >> 32"
            )
        )


def test_a_dead_process_brings_nothing_any_more_though_its_lease_goes_on(two: tuple[Database, Database]) -> None:
    ours, theirs = two
    other = Member(theirs, lease_s=600)
    me = Member(ours, lease_s=600)
    with other.at_work():
        with theirs.write() as connection:
            other.present(connection)
            assert sharing.take(connection, CONTENT, other.id, theirs.kind, None) is None
            claims.begin(connection, "its session", other.id)
        with ours.read() as connection:
            assert sharing.owner(connection, CONTENT, ours.kind) == sharing.Owner(other.id, "")
        cut_off(ours)
        with ours.write() as connection:
            assert sharing.owner(connection, CONTENT, ours.kind) is None
        assert me.bury_dead() == 0  # it may live, so what it writes is left alone until its lease is over
        with ours.read() as connection:
            assert claims.is_under_way(connection, "its session")

        other._hold()  # it lives, and connects again
        other.renew()
        with ours.write() as connection:
            me.present(connection)
            assert sharing.take(connection, CONTENT, me.id, ours.kind, None) == sharing.Owner(other.id, "")
        cut_off(ours)
        with ours.write() as connection:
            assert sharing.take(connection, CONTENT, me.id, ours.kind, None) is None
        other._hold()
        other.renew()
        with theirs.read() as connection:
            assert sharing.owner(connection, CONTENT, theirs.kind) == sharing.Owner(me.id, "")


def test_a_process_that_can_not_be_seen_to_be_connected_has_its_lease(two: tuple[Database, Database]) -> None:
    ours, theirs = two
    other = Member(theirs, lease_s=600)  # of an older version, say
    with theirs.write() as connection:
        other.present(connection)
        sharing.take(connection, CONTENT, other.id, theirs.kind, None)
    with ours.read() as connection:
        assert sharing.owner(connection, CONTENT, ours.kind) == sharing.Owner(other.id, "")
    with ours.write() as connection:
        connection.execute(processes.update().values(expires=0.0))
    with ours.read() as connection:
        assert sharing.owner(connection, CONTENT, ours.kind) is None


def test_the_lease_is_renewed_though_no_number_can_be_held(
    two: tuple[Database, Database], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = two
    other = Member(theirs, lease_s=600)
    with other.at_work():
        cut_off(ours)
        with monkeypatch.context() as patched:
            patched.setattr(theirs.engine, "connect", lost)
            other._hold()
        other.renew()
        with ours.read() as connection:
            guard, expires = connection.execute(sa.select(processes.c.guard, processes.c.expires)).one()
            assert guard is None
            assert expires > connection.scalar(sa.select(ours.kind.now)) + 500
    with ours.read() as connection:
        assert connection.execute(sa.select(processes)).all() == []


def lost(*_args: object) -> None:
    raise sa.exc.TimeoutError("no connection was free")
