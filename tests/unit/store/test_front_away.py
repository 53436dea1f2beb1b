"""The front's disk is away for a while: what was acknowledged before, and what was done past it, are both right."""

from __future__ import annotations

from pathlib import Path

import pytest

from helios.errors import NotFound, Unavailable
from heliosfs.store.front import near, uploads
from heliosfs.store.front.lines import encode
from heliosfs.store.front.missed import Missed
from heliosfs.store.front.waiting import NAME
from tests.support.front_away import OWED, REMOVED, UPLOADED, WAITING, fill, found, owed, put, reopen
from tests.support.front_store import RECORD, Front, blob, read


@pytest.fixture
def front(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(near, "LOOK_S", 0.0)
    monkeypatch.setattr(uploads, "FIRST_S", 0.01)
    made = Front(tmp_path, back=True)
    yield made
    made.store.close()


@pytest.mark.parametrize("meanwhile", ["nothing", "removal of another"])
def test_what_was_acknowledged_is_right_after_a_start_without_the_disk(front: Front, meanwhile: str) -> None:
    fill(front)
    front.take_away()
    reopen(front)
    if meanwhile != "nothing":
        front.store.delete(UPLOADED)
        with pytest.raises(NotFound):
            read(front.store, UPLOADED)
        with pytest.raises(Unavailable):
            read(front.store, WAITING)
    front.bring_back()
    reopen(front)
    assert owed(front) == OWED
    assert found(front, UPLOADED) == (blob(1)[1] if meanwhile == "nothing" else None)
    assert not (front.front / REMOVED).exists()


@pytest.mark.parametrize("fresh", [False, True], ids=["known", "unknown"])
def test_what_was_done_past_the_disk_is_right_when_it_is_back(front: Front, fresh: bool) -> None:
    fill(front)
    front.take_away()
    if fresh:
        reopen(front)
    front.cloud.down = False
    put(front, REMOVED)
    front.store.delete(WAITING)
    front.store.delete(UPLOADED)
    front.store.delete(RECORD)
    front.store.put_bytes(RECORD, b"newer")
    front.bring_back()
    reopen(front)
    assert owed(front) == [blob(2)[1], None, b"newer"]
    assert found(front, UPLOADED) is None
    assert not (front.root / "front.missed").exists()


@pytest.mark.parametrize("fresh", [False, True], ids=["known", "unknown"])
def test_what_was_refused_past_the_disk_changes_nothing_that_waits_there(front: Front, fresh: bool) -> None:
    fill(front)
    front.take_away()
    if fresh:
        reopen(front, down=True)
    for key in (WAITING, RECORD):
        with pytest.raises(Unavailable):
            front.store.delete(key)
    with pytest.raises(Unavailable):
        put(front, REMOVED)
    front.bring_back()
    reopen(front, down=True)
    assert owed(front) == OWED


def test_a_removal_of_which_nobody_heard_whether_it_worked(front: Front) -> None:
    """The copy in the front may be all that is left of the object: it does not count as one that the cloud has."""
    put(front, UPLOADED)
    front.settle()
    front.take_away()
    front.cloud.lose.add("delete")
    with pytest.raises(Unavailable):
        front.store.delete(UPLOADED)
    front.bring_back()
    reopen(front)
    assert found(front, UPLOADED) is None
    put(front, UPLOADED)
    front.settle()
    assert found(front, UPLOADED) == blob(1)[1]


@pytest.mark.parametrize("what", ["put_file", "delete"])
def test_the_disk_comes_back_in_the_middle_of_something(
    front: Front, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """What waited on it for the same key does not undo what is acknowledged then."""
    fill(front)
    front.take_away()
    reopen(front)
    act = getattr(front.cloud, what)
    key = REMOVED if what == "put_file" else WAITING

    def meanwhile(*args: object) -> None:
        monkeypatch.setattr(front.cloud, what, act)
        front.bring_back()
        front.near.look()
        assert front.near.item(key), "what waits was found"
        act(*args)

    monkeypatch.setattr(front.cloud, what, meanwhile)
    if what == "put_file":
        put(front, REMOVED)
    else:
        front.store.delete(WAITING)
    assert front.near.item(key) is None
    want = [blob(2)[1], OWED[1], OWED[2]] if what == "put_file" else [None, None, OWED[2]]
    assert owed(front) == want
    reopen(front)
    assert owed(front) == want


def test_a_record_that_did_not_get_into_the_place_of_another_leaves_that_removed(front: Front) -> None:
    """The journal says that it is to replace what the cloud has, but its file has no name yet."""
    front.store.put_bytes(RECORD, b"old")
    front.settle()
    front.cloud.down = True
    front.store.delete(RECORD)
    front.die()
    with (front.front / NAME).open("ab") as file:
        file.write(encode("=", RECORD))
    front.open()
    front.settle()
    assert found(front, RECORD) is None


def test_a_disk_that_goes_while_a_record_is_replaced_keeps_the_removal(front: Front, monkeypatch) -> None:
    front.store.put_bytes(RECORD, b"old")
    front.settle()
    front.cloud.down = True
    front.store.delete(RECORD)
    store = front.near.store
    assert store is not None

    def gone(*_: object) -> None:
        front.take_away()
        raise Unavailable("its disk is gone")

    monkeypatch.setattr(store, "put_bytes", gone)
    with pytest.raises(Unavailable):
        front.store.put_bytes(RECORD, b"new")
    with pytest.raises(NotFound):
        read(front.store, RECORD)
    front.bring_back()
    reopen(front)
    front.settle()
    assert found(front, RECORD) is None


def test_a_record_that_the_disk_does_not_give_is_not_read_as_it_was_before(front: Front) -> None:
    """The cloud has that yet, and may have it for long."""
    fill(front)
    front.take_away()
    with front.store._uploads.turn(RECORD):  # the upload begins with the removal
        front.cloud.down = False
        assert (front.cloud_root / RECORD).read_bytes() == b"old"
        with pytest.raises(Unavailable, match=r"does not give it"):
            read(front.store, RECORD)
        front.bring_back()
        assert read(front.store, RECORD) == b"new"


def test_a_record_that_is_just_written_in_the_place_of_another_is_not_there_yet(front: Front, monkeypatch) -> None:
    front.store.put_bytes(RECORD, b"old")
    front.settle()
    front.cloud.down = True
    front.store.delete(RECORD)
    store = front.near.store
    assert store is not None
    write = store.put_bytes

    def meanwhile(key: str, data: bytes) -> None:
        front.cloud.down = False  # the upload begins when this has ended
        with pytest.raises(NotFound):
            read(front.store, RECORD)
        write(key, data)

    monkeypatch.setattr(store, "put_bytes", meanwhile)
    front.store.put_bytes(RECORD, b"new")
    front.settle()
    assert found(front, RECORD) == b"new"


def test_a_copy_that_the_disk_did_not_remove_goes_before_the_removal_is_forgotten(front: Front, monkeypatch) -> None:
    put(front, UPLOADED)
    front.settle()
    front.cloud.down = True
    store = front.near.store
    assert store is not None

    def refuses(_key: str) -> None:
        raise Unavailable("an error of the disk")

    with monkeypatch.context() as patch:
        patch.setattr(store, "delete", refuses)
        front.store.delete(UPLOADED)
    assert (front.front / UPLOADED).exists()
    put(front, REMOVED)  # the disk takes it, so it knows by then what it missed
    front.cloud.down = False
    front.settle()
    reopen(front)
    assert found(front, UPLOADED) is None


def test_nothing_is_written_down_elsewhere_while_the_disk_is_there(front: Front, monkeypatch) -> None:
    """It would cost two flushes of another disk for each write."""

    def never(*_: object, **__: object) -> bool:
        raise AssertionError

    monkeypatch.setattr(Missed, "note", never)
    for back in (True, False):
        front.back = back
        reopen(front)
        put(front, UPLOADED)
        front.store.put_bytes(RECORD, b"old")
        front.store.delete(RECORD)
        front.store.put_bytes(RECORD, b"new")
        front.store.delete(UPLOADED)
        front.settle()
        assert found(front, RECORD) == b"new"
        front.store.delete(RECORD)
        front.settle()


def test_what_cannot_be_written_down_is_not_done(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(front)
    front.take_away()
    reopen(front)

    def full(*_: object, **__: object) -> bool:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Missed, "note", full)
        with pytest.raises(Unavailable, match=r"missed can't be noted in .*No space left"):
            front.store.delete(UPLOADED)
        with pytest.raises(Unavailable, match="No space left"):
            put(front, blob(3)[0])
    assert (front.cloud_root / UPLOADED).exists()
    assert not (front.cloud_root / blob(3)[0]).exists()
