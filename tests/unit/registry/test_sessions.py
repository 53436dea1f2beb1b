"""What sessions store is kept, or goes, and never what somebody else needs."""

from __future__ import annotations

import io
import random
import threading
import time

import pytest

from helios.errors import IntegrityError, NotFound, Unavailable
from helios.names import RepoId
from registry.claiming import Claims
from registry.metadata.tables import unfinished
from registry.sessions import own_store
from tests.unit.registry.conftest import Registry

ONE = RepoId.parse("org/one")


def noise(seed: int, size: int = 300_000) -> bytes:
    return random.Random(seed).randbytes(size)


def test_a_given_up_session_leaves_nothing(registry: Registry) -> None:
    registry.publish("org/one", {"a": noise(1)})
    before = registry.objects()
    with registry.sessions.open() as session:
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
    for entry in registry.catalog.manifest(ONE, record.commit).files.values():
        registry.catalog.blob_reader(ONE, entry.sha256).verify()


def test_a_blob_that_another_session_claims_stays(registry: Registry) -> None:
    mine, theirs = registry.sessions.open(), registry.sessions.open()
    registry.put(noise(1), session=theirs)
    entry = registry.put(noise(1), session=mine)
    theirs.close()
    registry.sessions.clean()
    registry.catalog.publish(ONE, "main", {"a": entry}, author="", message="")
    mine.close()
    registry.sessions.clean()
    assert registry.catalog.blob_reader(ONE, entry.sha256).read(0, 300_000) == noise(1)


def test_reusing_a_stored_blob_claims_it(registry: Registry) -> None:
    mine, theirs = registry.sessions.open(), registry.sessions.open()
    stored = registry.put(noise(1), session=theirs)
    assert mine.reuse("0" * 64) is None
    entry = mine.reuse(stored.sha256)
    theirs.close()
    registry.sessions.clean()
    assert entry is not None
    registry.catalog.publish(ONE, "main", {"a": entry}, author="", message="")
    mine.close()


def test_chunks_shared_with_a_given_up_blob_stay(registry: Registry) -> None:
    """A blob that was deduplicated against one that went keeps the object both lie in."""
    common = noise(1, 4 << 20)
    theirs = registry.sessions.open()
    registry.put(common + noise(2), session=theirs)
    mine = registry.sessions.open()
    entry = registry.put(common + noise(3), session=mine)
    theirs.close()
    registry.sessions.clean()
    registry.catalog.publish(ONE, "main", {"a": entry}, author="", message="")
    mine.close()
    registry.sessions.clean()
    content = common + noise(3)
    assert registry.catalog.blob_reader(ONE, entry.sha256).read(0, len(content)) == content


def test_publishing_a_blob_that_was_given_up_fails_cleanly(registry: Registry) -> None:
    entry = registry.put(noise(1))
    registry.sessions.clean()
    with pytest.raises(NotFound):
        registry.catalog.publish(ONE, "main", {"a": entry}, author="", message="")


def test_a_killed_registry_is_cleaned_up_after(registry: Registry) -> None:
    record = registry.publish("org/one", {"a": noise(1)})
    kept = registry.objects()
    session = registry.sessions.open()
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
    session = registry.sessions.open()
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
                with registry.sessions.open() as session:
                    entries = {str(i): registry.put(noise(rng.randrange(5), 20_000), session=session) for i in range(3)}
                    if rng.random() < 0.5:
                        registry.catalog.publish(
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
            for entry in registry.catalog.manifest(info.repo, commit).files.values():
                registry.catalog.blob_reader(info.repo, entry.sha256).verify()
