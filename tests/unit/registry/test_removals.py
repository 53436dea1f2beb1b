"""Removals: in steps, so that nobody waits for more than one of them, and gone on with wherever one was killed."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event

from benchmarks.removals import fill
from helios.errors import NoSpace, RepoNotFound, Unavailable
from helios.names import RepoId
from heliosfs.store.keys import blob_key, commit_key
from registry import burial, removal
from registry.burial import bury, claim_unburied, withdraw
from registry.claiming import ClaimingStore, Claims
from registry.gc import collect
from registry.gc.collect import Collector, Times
from registry.metadata import claims, database, inventory, quotas
from registry.metadata import removals as tables_of_removals
from registry.metadata.database import Changes, Database
from registry.metadata.gc_tables import recounts, removals
from registry.metadata.tables import blobs, commits, doomed, objects, ref_moves, repository_blobs
from registry.metadata.turn import Turn
from registry.removal import finish_removals
from tests.unit.registry.conftest import Registry

ONE, TWO = RepoId.parse("org/one"), RepoId.parse("org/two")
COMMITS, FILES = 70, 90
MOST = 110
"""Rows that one transaction may change where steps are small: fewer than any of the removals here has to."""
AT_ONCE = Times(keep_commits_s=3600.0, grace_s=0.0, lease_s=0.0)
KEY = blob_key("public", "1" * 64)


@contextlib.contextmanager
def counting(watched: Database) -> Iterator[list[int]]:
    """Rows that each transaction changes; on SQLite with those that go with others."""
    done: list[int] = []
    change: dict[Any, int] = {}

    def total(connection: Any) -> int:
        raw = connection.connection.dbapi_connection
        return int(getattr(raw, "total_changes", 0))

    def begun(connection: Any) -> None:
        change[connection.connection.dbapi_connection] = -total(connection)

    def executed(connection: Any, cursor: Any, statement: str, *_rest: Any) -> None:
        raw = connection.connection.dbapi_connection
        if not hasattr(raw, "total_changes") and statement.startswith(("INSERT", "UPDATE", "DELETE")):
            change[raw] = change.get(raw, 0) + max(cursor.rowcount, 0)

    def committed(connection: Any) -> None:
        done.append(change.pop(connection.connection.dbapi_connection, 0) + total(connection))

    listeners = (("begin", begun), ("after_cursor_execute", executed), ("commit", committed))
    for name, listener in listeners:
        event.listen(watched.engine, name, listener)
    try:
        yield done
    finally:
        for name, listener in listeners:
            event.remove(watched.engine, name, listener)


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of what they are, and of what is removed."""
    for module, names in ((tables_of_removals, "ROWS"), (database, "BATCH"), (removal, "PAGE"), (collect, "MARKS")):
        monkeypatch.setattr(module, names, getattr(module, names) // 10)
    count = removal.COUNT // 8
    for module in (removal, collect):
        monkeypatch.setattr(module, "COUNT", count)
    monkeypatch.setattr(collect, "COMMITS", collect.COMMITS // 4)
    monkeypatch.setattr(burial, "BATCH", burial.BATCH // 4)


def count(registry: Registry, table: sa.Table) -> int:
    with registry.database.read() as connection:
        return connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0


@pytest.mark.usefixtures("small_steps")
def test_no_transaction_of_a_removal_grows_with_what_is_removed(registry: Registry) -> None:
    catalog = registry.catalog
    fill(registry.database, registry.store, "org/one", COMMITS, FILES)
    fill(registry.database, registry.store, "org/two", COMMITS, FILES)
    with counting(registry.database) as changed:
        catalog.delete_repo(ONE)
        assert (count(registry, removals), count(registry, commits)) == (0, COMMITS)
        assert sum(changed) > MOST * 2
        assert max(changed) <= MOST
        changed.clear()
        Collector(catalog, AT_ONCE).run()
        assert count(registry, commits) == 1
        # What the last commit of the other one holds.
        assert count(registry, repository_blobs) == count(registry, blobs) == 10
        assert count(registry, recounts) == 0
        assert sum(changed) > MOST * 4
        assert max(changed) <= MOST


@pytest.mark.usefixtures("small_steps")
def test_no_transaction_grows_with_a_push_that_is_given_up(registry: Registry) -> None:
    fill(registry.database, registry.store, "org/given-up", 0, FILES, pending=True)
    registry.sessions.work.set()
    with counting(registry.database) as changed:
        registry.sessions.clean()
    assert count(registry, blobs) == count(registry, objects) == count(registry, doomed) == 0
    assert sum(changed) > MOST * 2
    assert max(changed) <= MOST


def kill_after(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, writes: int
) -> contextlib.AbstractContextManager[Any]:
    """The process ends before it writes once more."""
    write, left = registry.database.write, [writes]

    def dying(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return write(*args, **options)

    monkeypatch.setattr(registry.database, "write", dying)
    return pytest.raises(KeyboardInterrupt)


def test_half_of_a_removal_is_seen_by_nobody_and_gone_on_with(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = registry.publish("org/one", {"a.bin": b"shared", "b.bin": b"its own"})
    registry.publish("org/two", {"a.bin": b"shared"})
    with monkeypatch.context() as patched, kill_after(registry, patched, 1):
        registry.catalog.delete_repo(ONE, author="me")
    registry = registry.killed()
    try:
        catalog = registry.catalog
        assert count(registry, removals) == 1
        with pytest.raises(RepoNotFound):
            catalog.refs(ONE)
        assert [info.repo for info in catalog.repos()] == [TWO]
        assert catalog.count() == 1
        assert catalog.stored_domains() == ["public"]
        assert [move.new for move in catalog.ref_history(ONE, None, 10)] == [None, gone.commit]
        with registry.database.read() as connection:
            assert [name for _, name, _ in quotas.all_repositories(connection)] == [str(TWO)]
            assert [row[1] for row in inventory.records(connection, None)] == [str(TWO)]
            shares, _ = inventory.shares(connection, "public")
            assert [share.repo for share in shares] == [str(TWO)]
        plan = Collector(catalog, AT_ONCE).run(dry_run=True)
        assert (plan.commits, plan.removed_commits, plan.removed_blobs) == (1, 0, 1)

        again = registry.publish(
            "org/one", {"a.bin": b"shared", "b.bin": b"its own"}
        )  # the same commit, before it ends
        assert again.commit == gone.commit
        finish_removals(registry.database, 0.0)
        assert (count(registry, removals), count(registry, commits)) == (0, 2)
        bury(registry.database, registry.store)
        assert commit_key("public", ONE, gone.commit) in registry.objects()
        assert catalog.contents.manifest(ONE, again.commit).files.keys() == {"a.bin", "b.bin"}

        catalog.delete_repo(ONE)
        Collector(catalog, AT_ONCE).run()
        assert commit_key("public", ONE, gone.commit) not in registry.objects() or count(registry, doomed) > 0
        assert [info.repo for info in catalog.repos()] == [TWO]
        assert count(registry, ref_moves) == 5
    finally:
        registry.close()


def test_what_a_collection_was_killed_at_is_counted_by_the_next(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(registry.database, registry.store, "org/one", 3, 70)
    collector = Collector(registry.catalog, AT_ONCE)
    with monkeypatch.context() as patched:
        patched.setattr(collector, "_recount", kill)
        with pytest.raises(KeyboardInterrupt):
            collector.run()
    registry = registry.killed()
    try:
        assert (count(registry, commits), count(registry, recounts), count(registry, repository_blobs)) == (1, 1, 70)
        plan = Collector(registry.catalog, AT_ONCE).run(dry_run=True)
        assert plan.removed_blobs == 60
        assert Collector(registry.catalog, AT_ONCE).run().removed_blobs == 60
        assert (count(registry, recounts), count(registry, repository_blobs)) == (0, 10)
    finally:
        registry.close()


def kill(*_args: object) -> None:
    raise KeyboardInterrupt


# --- objects ---


@pytest.fixture
def given_up(registry: Registry) -> Registry:
    """With an object that nobody needs."""
    registry.store.put_bytes(KEY, b"of a blob that was removed")
    with registry.database.write() as connection:
        claims.doom(connection, [KEY])
    return registry


def claim(registry: Registry, key: str) -> None:
    """As who is about to write an object."""
    with registry.sessions.open(ONE) as session:
        claim_unburied(registry.database, [key], lambda c: claims.claim(c, session.name, [key]))
        with registry.database.write() as connection:
            claims.release(connection, session.name, [key])


def deleting(registry: Registry, monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], None]) -> None:
    """Have something happen while an object is deleted."""
    delete = registry.store.delete

    def slow(key: str) -> None:
        monkeypatch.setattr(registry.store, "delete", delete)
        meanwhile()
        delete(key)

    monkeypatch.setattr(registry.store, "delete", slow)


@pytest.mark.parametrize("how", ["buried", "withdrawn"])
def test_others_write_while_an_object_is_deleted_and_only_its_writer_waits(
    given_up: Registry, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    registry, seen = given_up, []
    monkeypatch.setattr(burial, "WAIT_S", 0.0)

    def meanwhile() -> None:
        claim(registry, blob_key("public", "2" * 64))
        with pytest.raises(Unavailable, match="being deleted just now"):
            claim(registry, KEY)
        assert bury(registry.database, registry.store) == 0  # it is somebody else's
        seen.append(how)

    if how == "buried":
        deleting(registry, monkeypatch, meanwhile)
        assert bury(registry.database, registry.store) == 1
    else:
        with registry.sessions.open(ONE) as session:
            store = ClaimingStore(registry.store, Claims(registry.database, session.name))
            store.put_bytes(KEY, b"of a blob that was removed")
            deleting(registry, monkeypatch, meanwhile)
            store.delete(KEY)
    assert seen == [how]
    assert KEY not in registry.objects()
    assert count(registry, doomed) == 0
    claim(registry, KEY)


def test_who_writes_what_is_being_deleted_waits_for_that(given_up: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    registry, begun = given_up, threading.Event()
    order: list[str] = []

    def write() -> None:
        begun.set()
        claim(registry, KEY)
        order.append("claimed")

    writer = threading.Thread(target=write)

    def meanwhile() -> None:
        writer.start()
        assert begun.wait(10)
        writer.join(0.2)
        order.append("deleted")

    deleting(registry, monkeypatch, meanwhile)
    bury(registry.database, registry.store)
    writer.join(20)
    assert order == ["deleted", "claimed"]


def test_what_somebody_was_killed_at_deleting_is_deleted_by_the_next(
    given_up: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched, kill_after(given_up, patched, 1):
        bury(given_up.database, given_up.store)
    given_up.store.put_bytes(KEY, b"of a blob that was removed")
    registry = given_up.killed()
    try:
        registry.sessions.recover()
        if registry.url is not None:  # another process may be at it yet
            assert bury(registry.database, registry.store) == 0
            monkeypatch.setattr(burial, "WAIT_S", 0.0)
            with pytest.raises(Unavailable):
                claim(registry, KEY)
            with registry.database.write(changes=Changes.NOTHING) as connection:
                connection.execute(doomed.update().values(not_before=doomed.c.not_before - burial.HOLD_S))
            claim(registry, KEY)
            bury(registry.database, registry.store)
        assert KEY not in registry.objects()
    finally:
        registry.close()


def test_a_deletion_that_fails_is_made_later(given_up: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    def away() -> None:
        raise Unavailable("the store is away")

    deleting(given_up, monkeypatch, away)
    with pytest.raises(Unavailable, match="the store is away"):
        bury(given_up.database, given_up.store)
    claim(given_up, KEY)
    assert bury(given_up.database, given_up.store) == 1
    assert KEY not in given_up.objects()


@pytest.mark.parametrize("how", ["buried", "withdrawn"])
def test_what_is_deleted_makes_room_for_saying_so(
    given_up: Registry, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The disk is full that has the metadata as well."""
    database, store = given_up.database, given_up.store

    def full(*_args: object) -> None:
        if KEY in given_up.objects():
            raise NoSpace("the disk is full")

    with given_up.sessions.open(ONE) as session:
        if how == "withdrawn":
            claim_unburied(database, [KEY], lambda c: claims.claim(c, session.name, [KEY]))
        monkeypatch.setattr(claims, "begin_removal", full)
        if how == "buried":
            assert bury(database, store) == 1
        else:
            withdraw(database, store, session.name, [KEY])
    assert KEY not in given_up.objects()


def test_a_turn_goes_to_who_waited_longest() -> None:
    turn, had = Turn(), []

    def wait(name: str) -> None:
        assert turn.acquire(10)
        had.append(name)

    assert turn.acquire(0)
    threads = []
    for number, name in enumerate(("first", "second")):
        threads.append(threading.Thread(target=wait, args=(name,)))
        threads[-1].start()
        while len(turn._waiting) <= number:
            threads[-1].join(0.001)
    for number, thread in enumerate(threads):
        turn.release()
        assert not turn.acquire(0)  # who has just had it stands behind
        thread.join(10)
        assert len(had) == number + 1
    turn.release()
    assert had == ["first", "second"]
    assert turn.acquire(0)
