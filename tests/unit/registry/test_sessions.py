"""What sessions store is kept, or goes, and never what somebody else needs."""

from __future__ import annotations

import contextlib
import io
import random
import threading
import time
from pathlib import Path

import pytest

from helios.errors import IntegrityError, NotFound, RepoNotFound, Unavailable
from helios.names import RepoId
from heliosfs.store.keys import PUBLIC
from registry.claiming import Claims
from registry.member import Member
from registry.metadata.database import Changes
from registry.metadata.tables import processes, unfinished
from registry.sessions import Sessions, own_store
from tests.unit.registry.conftest import Registry

ONE = RepoId.parse("org/one")


def noise(seed: int, size: int = 300_000) -> bytes:
    return random.Random(seed).randbytes(size)


def test_a_given_up_session_leaves_nothing(registry: Registry) -> None:
    registry.publish("org/one", {"a": noise(1)})
    before = registry.objects()
    with registry.sessions.open(ONE) as session:
        registry.put(noise(2), session=session)
        registry.put(noise(1), session=session)
    assert registry.objects() > before
    assert registry.sessions.clean() == 2  # the blob and its recipe
    assert registry.objects() == before
    assert registry.sessions.clean() == 0


def test_a_published_session_loses_nothing(registry: Registry) -> None:
    record = registry.publish("org/one", {"a": noise(1), "b": noise(2)})
    before = registry.objects()
    assert registry.sessions.clean() == 0
    assert registry.objects() == before
    for entry in registry.catalog.contents.manifest(ONE, record.commit).files.values():
        registry.catalog.contents.blob_reader(ONE, entry.sha256).verify()


def test_a_blob_that_another_session_claims_stays(registry: Registry) -> None:
    mine, theirs = registry.sessions.open(ONE), registry.sessions.open(ONE)
    registry.put(noise(1), session=theirs)
    entry = registry.put(noise(1), session=mine)
    theirs.close()
    registry.sessions.clean()
    registry.catalog.publisher.publish(ONE, "main", {"a": entry}, author="", message="")
    mine.close()
    registry.sessions.clean()
    assert registry.catalog.contents.blob_reader(ONE, entry.sha256).read(0, 300_000) == noise(1)


def test_reusing_a_stored_blob_claims_it(registry: Registry) -> None:
    mine, theirs = registry.sessions.open(ONE), registry.sessions.open(ONE)
    stored = registry.put(noise(1), session=theirs)
    assert mine.reuse("0" * 64) is None
    entry = mine.reuse(stored.sha256)
    theirs.close()
    registry.sessions.clean()
    assert entry is not None
    registry.catalog.publisher.publish(ONE, "main", {"a": entry}, author="", message="")
    mine.close()


def test_chunks_shared_with_a_given_up_blob_stay(registry: Registry) -> None:
    """A blob that was deduplicated against one that went keeps the object both lie in."""
    common = noise(1, 4 << 20)
    theirs = registry.sessions.open(ONE)
    registry.put(common + noise(2), session=theirs)
    mine = registry.sessions.open(ONE)
    entry = registry.put(common + noise(3), session=mine)
    theirs.close()
    registry.sessions.clean()
    registry.catalog.publisher.publish(ONE, "main", {"a": entry}, author="", message="")
    mine.close()
    registry.sessions.clean()
    content = common + noise(3)
    assert registry.catalog.contents.blob_reader(ONE, entry.sha256).read(0, len(content)) == content


def test_publishing_a_blob_that_was_given_up_fails_cleanly(registry: Registry) -> None:
    entry = registry.put(noise(1))
    registry.sessions.clean()
    with pytest.raises(NotFound):
        registry.catalog.publisher.publish(ONE, "main", {"a": entry}, author="", message="")


def test_a_killed_registry_is_cleaned_up_after(registry: Registry) -> None:
    record = registry.publish("org/one", {"a": noise(1)})
    kept = registry.objects()
    session = registry.sessions.open(ONE)
    registry.put(noise(2), session=session)
    claims_of = Claims(registry.database, session.name)
    for key in (
        "public/blobs/ab/" + "ab" * 32,
        f"public/commits/models/org/ghost/{'cd' * 20}",
        "public/packs/12/" + "1234" * 8,
    ):
        claims_of.announce(key)
        registry.store.put_bytes(key, b"stored, but its row was not")
    claims_of.announce("public/blobs/ef/" + "ef" * 32)  # and this one was not even stored
    again = registry.killed()
    try:
        assert again.sessions.recover() > 0
        assert again.objects() == kept
        assert again.sessions.recover() == 0
        assert again.catalog.resolve(ONE, "main").commit == record.commit
    finally:
        again.close()


def test_what_a_registry_left_that_noted_no_claims_is_found_by_looking(registry: Registry) -> None:
    registry.publish("org/one", {"a": noise(1)})
    kept = registry.objects()
    with registry.database.write() as connection:  # as the first version did
        connection.execute(unfinished.insert().values(session="old", started=1))
    registry.store.put_bytes("public/blobs/ab/" + "ab" * 32, b"stored, but its row was not")
    registry.store.put_bytes(f"public/commits/models/org/ghost/{'cd' * 20}", b"the same")
    again = registry.reopen()
    try:
        assert again.sessions.recover() == 2
        assert again.objects() == kept
    finally:
        again.close()


def test_a_clean_end_needs_no_recovery(registry: Registry) -> None:
    registry.publish("org/one", {"a": noise(1)})
    again = registry.reopen()
    try:
        assert again.sessions.recover() == 0
    finally:
        again.close()


def test_an_ingest_after_the_end_is_refused(registry: Registry) -> None:
    session = registry.sessions.open(ONE)
    session.close()
    session.close()
    with pytest.raises(Unavailable):
        session.ingest("late", 4, io.BytesIO(b"late"))


def test_a_store_has_one_owner(registry: Registry) -> None:
    own_store(registry.catalog, "/home/one")
    own_store(registry.catalog, "/home/one")
    (registry.root / "registry").rename(registry.root / "old") if registry.url is None else None
    other = Registry.open(registry.root)  # with other metadata
    try:
        with pytest.raises(IntegrityError, match="belongs to another registry"):
            own_store(other.catalog, "/home/two")
    finally:
        other.close()


def test_sessions_in_parallel_with_cleaning(registry: Registry) -> None:
    """Pushes of overlapping content, half of them given up, while cleaning runs: every commit stays readable."""
    failures: list[BaseException] = []
    done = threading.Event()

    def clean() -> None:
        while not done.is_set():
            registry.sessions.work.set()
            registry.sessions.clean()
            time.sleep(0.002)

    def work(number: int) -> None:
        rng = random.Random(number)
        try:
            for turn in range(6):
                with registry.sessions.open(ONE) as session:
                    entries = {str(i): registry.put(noise(rng.randrange(5), 20_000), session=session) for i in range(3)}
                    if rng.random() < 0.5:
                        registry.catalog.publisher.publish(
                            ONE, f"r{number}", entries, author="", message=str(turn), commit=f"{number:020x}{turn:020x}"
                        )
        except BaseException as error:
            failures.append(error)

    cleaner = threading.Thread(target=clean)
    workers = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in (cleaner, *workers):
        thread.start()
    for thread in workers:
        thread.join(60)
    done.set()
    cleaner.join(60)
    assert not failures
    registry.sessions.work.set()
    registry.sessions.clean()
    for info in registry.catalog.repos():
        for commit in info.refs.values():
            for entry in registry.catalog.contents.manifest(info.repo, commit).files.values():
                registry.catalog.contents.blob_reader(info.repo, entry.sha256).verify()


def test_a_publish_whose_session_others_have_ended_is_refused(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process was silent for too long: the manifest that it has written may have been deleted since."""
    record = registry.publish("org/one", {"a.bin": b"content"})
    files = registry.catalog.contents.manifest(RepoId.parse("org/one"), record.commit).files
    put, put_bytes = [], registry.store.put_bytes

    def stopped(key: str, data: bytes) -> None:
        put_bytes(key, data)
        if not put:
            put.append(key)
            with registry.database.write(changes=Changes.NOTHING) as connection:
                connection.execute(processes.update().values(expires=0.0))
            Member(registry.database).bury_dead()

    monkeypatch.setattr(registry.store, "put_bytes", stopped)
    with pytest.raises(Unavailable, match="given up meanwhile"):
        registry.catalog.publisher.publish(RepoId.parse("org/two"), "main", dict(files), author="", message="")
    with pytest.raises(RepoNotFound):
        registry.catalog.refs(RepoId.parse("org/two"))
    assert registry.catalog.contents.manifest(RepoId.parse("org/one"), record.commit).files == files


def test_what_one_process_need_not_keep_any_more_no_other_one_keeps(tmp_path: Path, postgres_url: str) -> None:
    """Each process claims what all have downloaded; the one that gives it up is only one of them."""
    kept: set[tuple[str, str]] = set()
    with contextlib.ExitStack() as stack:
        processes = []
        for _ in range(2):
            one = Registry.open(tmp_path, postgres_url)
            stack.callback(one.close)
            one.sessions = Sessions(one.catalog, one.store, one.sessions.ingest, lambda: set(kept))
            one.catalog.lease_s = 0.0  # nobody was told where it lies
            processes.append(one)
        here, there = processes
        with here.sessions.open(ONE) as session:
            entry = here.put(b"downloaded", session=session)
            kept.add((PUBLIC, entry.sha256))
        there.sessions.recover()
        stored = here.objects()
        assert stored
        kept.clear()
        here.sessions.release({(PUBLIC, entry.sha256)})
        here.sessions.clean()
        assert here.objects() == stored, "the other one has not heard of it"
        there.sessions.recover()
        there.sessions.clean()
        assert here.objects() == set()
