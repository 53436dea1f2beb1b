"""A front store in single cases: who is right when copies differ, removals among copies, locks, the journal."""

from __future__ import annotations

import os
import time
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from helios.errors import NotFound, Unavailable, UsageError
from helios.metrics import RegistryMetrics
from heliosfs.store.directory import DirectoryStore
from heliosfs.store.front import fills, uploads
from heliosfs.store.front.disk import Memory, leave
from heliosfs.store.front.lines import Damaged, encode
from heliosfs.store.front.near import Near
from heliosfs.store.front.waiting import HEAD, NAME, Op, Waiting, parse
from heliosfs.store.sealed import SealedStore
from heliosfs.store.sealing import DomainKey
from tests.support.front_store import LIMIT, RECORD, Front, blob, read, until

KEY, DATA = blob(3)


@pytest.fixture
def front(tmp_path: Path):
    made = Front(tmp_path, back=True)
    yield made
    made.cloud.gate.set()
    made.store.close()


def put(front: Front, number: int = 3) -> str:
    key, data = blob(number)
    path = front.store.staging() / "file"
    path.write_bytes(data)
    front.store.put_file(key, path)
    return key


def spoil(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(b"?" * path.stat().st_size)


# --- uploads and those who write and remove meanwhile ---


def failed(front: Front) -> float:
    return front.near.metrics.front_uploads.labels("failed")._value.get()


def test_a_write_that_takes_a_while_is_not_taken_for_a_loss(front: Front, monkeypatch, caplog) -> None:
    """Its line is in the journal before the file is there: the upload waits for it, and no other is held up."""
    slow = front.near.store
    assert slow is not None
    write = slow.put_file

    def slowly(key: str, path: Path) -> None:
        time.sleep(0.7)
        write(key, path)

    monkeypatch.setattr(slow, "put_file", slowly)
    put(front)
    front.settle()
    assert (front.cloud_root / KEY).read_bytes() == DATA
    assert failed(front) == 0
    assert "uploads wait for the cloud" not in caplog.text


def test_what_is_removed_while_it_goes_up_is_no_failure(front: Front, monkeypatch, caplog) -> None:
    check = uploads.check_content
    removed = []

    def remove_first(key: str, path: Path) -> None:
        if not removed:
            removed.append(key)
            front.store.delete(key)
            raise OSError("there is nothing any more")
        check(key, path)

    monkeypatch.setattr(uploads, "check_content", remove_first)
    put(front)
    until(lambda: removed)
    front.settle()
    assert not (front.cloud_root / KEY).exists()
    assert failed(front) == 0
    assert "uploads wait for the cloud" not in caplog.text


# --- copies that differ ----------------------------------------------------------------------------------------------


def test_what_the_cloud_lost_or_has_wrong_comes_back_from_the_front(front: Front, expected_log_errors) -> None:
    """As a verification finds it: it looks past the front."""
    expected_log_errors("the cloud lost an object")
    put(front)
    front.settle()
    lasting = front.store.lasting
    (front.cloud_root / KEY).unlink()
    assert lasting.info(KEY).size == len(DATA)
    front.settle()
    assert (front.cloud_root / KEY).read_bytes() == DATA
    spoil(front.cloud_root / KEY)
    found = memoryview(bytearray(len(DATA)))
    lasting.read_into(KEY, 0, found)
    assert found != DATA, "the cloud's own bytes, though the front has them right"
    assert lasting.heal(KEY, 0, len(DATA), lambda data: data == DATA)
    front.settle()
    assert (front.cloud_root / KEY).read_bytes() == DATA
    spoil(front.cloud_root / KEY)
    spoil(front.front / KEY)
    assert not lasting.heal(KEY, 0, len(DATA), lambda data: data == DATA), "nobody has it right"
    (front.cloud_root / KEY).unlink()
    with pytest.raises(NotFound):
        lasting.info(KEY)


def test_a_copy_that_rots_while_it_waits_is_not_uploaded(front: Front, expected_log_errors) -> None:
    expected_log_errors("an object can't be uploaded")
    front.cloud.down = True
    put(front)
    spoil(front.front / KEY)
    front.cloud.down = False
    until(lambda: any("could not be uploaded yet" in problem for problem in front.store.problems()))
    assert not front.store.heal(KEY, 0, len(DATA), lambda data: data == DATA)
    assert (front.front / KEY).exists(), "it is all there is"
    assert not (front.cloud_root / KEY).exists()
    (front.front / KEY).write_bytes(DATA)
    front.settle()
    assert (front.cloud_root / KEY).read_bytes() == DATA


def test_rot_in_the_front_is_read_from_the_cloud_from_then_on(front: Front) -> None:
    put(front)
    front.settle()
    spoil(front.front / KEY)
    assert front.store.heal(KEY, 0, len(DATA), lambda data: data == DATA)
    assert not (front.front / KEY).exists()
    assert read(front.store, KEY) == DATA
    # One that is too short, or gone, is noticed by whoever reads.
    front2 = put(front, 2)
    front.settle()
    path = front.front / front2
    path.chmod(0o644)
    path.write_bytes(b"short")
    assert read(front.store, front2) == blob(2)[1]
    assert not front.store.near(front2)


def test_the_cloud_has_something_else_under_a_key_that_is_a_hash(front: Front, expected_log_errors) -> None:
    expected_log_errors("the cloud has another object of this name")
    with DirectoryStore(front.cloud_root) as other:
        other.put_bytes(KEY, b"not it")
    put(front)
    front.settle()
    assert (front.cloud_root / KEY).read_bytes() == DATA


def test_the_front_is_right_about_records_when_its_journal_is_lost(front: Front) -> None:
    """Also a second time, before the cloud could be asked."""
    front.store.put_bytes(RECORD, b"old")
    front.settle()
    front.cloud.down = True
    front.store.delete(RECORD)
    front.store.put_bytes(RECORD, b"new")
    for _ in range(2):
        front.die()
        (front.front / NAME).unlink()
        front.open(down=True)
        assert read(front.store, RECORD) == b"new"
    front.cloud.down = False
    front.settle()
    assert read(front.store, RECORD) == b"new"
    assert (front.cloud_root / RECORD).read_bytes() == b"new"


def test_the_cloud_is_right_about_records_when_the_front_was_away(front: Front, expected_log_errors) -> None:
    """Also when the journal is lost, before that is settled."""
    expected_log_errors("the cloud has another object of this name")
    front.store.put_bytes(RECORD, b"old")
    front.settle()
    front.front.rename(front.root / "away")
    front.store.delete(RECORD)
    front.store.put_bytes(RECORD, b"new")
    front.store.close()
    (front.root / "away").rename(front.front)
    front.open(down=True)
    with pytest.raises(Unavailable):
        read(front.store, RECORD)
    assert front.store.open_local(RECORD) is None
    front.die()
    (front.front / NAME).unlink()
    front.open()
    assert read(front.store, RECORD) == b"new"
    front.settle()
    assert read(front.store, RECORD) == b"new"
    assert (front.cloud_root / RECORD).read_bytes() == b"new"


# --- while something is under way ------------------------------------------------------------------------------------


def test_an_object_that_is_removed_while_it_is_brought_stays_away(front: Front) -> None:
    put(front)
    front.settle()
    assert front.near.evict(KEY)
    for _ in range(2):
        assert read(front.store, KEY) == DATA
    front.cloud.gate.clear()
    front.store._fills.read(KEY, len(DATA))
    until(lambda: list((front.front / ".staging").glob("*/fill-*")) or front.store.near(KEY))
    front.store.delete(KEY)
    front.cloud.gate.set()
    front.settle()
    time.sleep(0.05)
    assert not front.store.near(KEY)
    assert not (front.front / KEY).exists()
    with pytest.raises(NotFound):
        front.store.info(KEY)
    put(front)
    front.settle()
    assert (front.cloud_root / KEY).read_bytes() == DATA


def test_what_waits_is_never_let_go_and_what_finds_no_room_goes_to_the_cloud(front: Front) -> None:
    front.cloud.gate.clear()
    keys = [put(front, number) for number in (3, 2, 1)]
    assert front.near.popular.used == 8300
    front.cloud.gate.set()
    front.cloud.down = True
    with pytest.raises(Unavailable):
        put(front, 4)
    for key in keys:
        assert (front.front / key).exists()
    front.cloud.down = False
    assert put(front, 4)
    front.settle()
    assert (front.cloud_root / blob(4)[0]).exists()
    assert front.near.popular.used <= LIMIT


def test_wanted_again_while_it_is_being_removed(front: Front) -> None:
    put(front)
    front.settle()
    front.cloud.down = True
    front.store.delete(KEY)
    with pytest.raises(NotFound):
        read(front.store, KEY)
    put(front)
    assert read(front.store, KEY) == DATA
    front.cloud.down = False
    front.settle()
    assert (front.cloud_root / KEY).read_bytes() == DATA


def test_a_store_that_is_closed_while_it_uploads_keeps_its_directory(
    front: Front, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Else what is under way would meet what a successor does with the same key."""
    monkeypatch.setattr(uploads, "CLOSE_S", 0.1)
    front.cloud.gate.clear()
    put(front)
    assert front.cloud.came.wait(20)
    front.store.close()
    with pytest.raises(UsageError, match="another process uses"):
        Near(front.front, "s3://bucket", Memory(tmp_path / "front.json"), None, 0.0, RegistryMetrics())
    assert parse((front.front / NAME).read_bytes()) == {KEY: Op.PUT}


# --- whose directory it is -------------------------------------------------------------------------------------------


def test_a_directory_that_is_something_else_is_left_alone(front: Front, tmp_path: Path) -> None:
    def opened(root: Path, store: str = "s3://bucket", memory: str = "front.json") -> Near:
        return Near(root, store, Memory(tmp_path / memory), None, 0.0, RegistryMetrics())

    with pytest.raises(UsageError, match="another process uses"):
        opened(front.front)
    put(front)
    front.settle()
    front.store.close()
    with pytest.raises(UsageError, match="is the front of s3://bucket, not of gs://other"):
        opened(front.front, "gs://other")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    with pytest.raises(UsageError, match=r"is not empty \(thesis.tex\)"):
        opened(tmp_path / "home", memory="other.json")
    assert os.listdir(tmp_path / "home") == ["thesis.tex"]
    # A front that this registry has not met: what it holds is compared with the cloud, not believed.
    (front.cloud_root / KEY).unlink()
    (tmp_path / "front.json").unlink()
    front.open()
    front.settle()
    assert (front.cloud_root / KEY).read_bytes() == DATA


def test_a_front_is_not_left_while_it_owes_something(front: Front, tmp_path: Path) -> None:
    front.cloud.down = True
    put(front)
    with pytest.raises(UsageError, match="holds objects that are not in s3://bucket yet"):
        leave(Memory(tmp_path / "front.json"), "s3://bucket")
    front.cloud.down = False
    until(lambda: b'"owes":false' in (tmp_path / "front.json").read_bytes())
    leave(Memory(tmp_path / "front.json"), "s3://bucket")


# --- bringing --------------------------------------------------------------------------------------------------------


def test_wrong_bytes_from_the_cloud_never_get_a_name_here(
    front: Front, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fills, "PIECE", 700)
    put(front)
    front.settle()
    front.near.evict(KEY)
    spoil(front.cloud_root / KEY)
    for _ in range(3):
        read(front.store, KEY)
    until(lambda: "other than its name says" in caplog.text)
    assert not front.store.near(KEY)
    spoil(front.cloud_root / KEY)
    (front.cloud_root / KEY).write_bytes(DATA)
    for _ in range(3):
        assert read(front.store, KEY) == DATA
    until(lambda: front.store.near(KEY))
    assert (front.front / KEY).read_bytes() == DATA


# --- the journal -----------------------------------------------------------------------------------------------------

KEYS = st.sampled_from([blob(number)[0] for number in range(3)] + [RECORD])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["+", "-", "=", "."]), KEYS), max_size=12), st.data())
def test_a_journal_says_what_was_said_or_that_it_is_damaged(lines: list[tuple[str, str]], data: st.DataObject) -> None:
    def state(some: list[tuple[str, str]]) -> dict[str, Op]:
        out: dict[str, Op] = {}
        for op, key in some:
            out.pop(key, None)
            if op != ".":
                out[key] = Op(op)
        return out

    whole = HEAD + b"".join(encode(op, key) for op, key in lines)
    assert list(parse(whole).items()) == list(state(lines).items())
    cut = data.draw(st.integers(len(HEAD), len(whole)))
    left = whole[:cut].count(b"\n") - 1
    assert parse(whole[:cut]) == state(lines[:left]), "a torn last line was never relied on"
    at = data.draw(st.integers(0, len(whole) - 1))
    flipped = whole[:at] + bytes([whole[at] ^ (1 << data.draw(st.integers(0, 7)))]) + whole[at + 1 :]
    try:
        found = parse(flipped)
    except Damaged:
        return
    # Nothing but the last line's end may change unnoticed: then that line counts as torn.
    assert found == state(lines[:-1])
    assert at == len(whole) - 1


def test_a_journal_stays_short_and_refuses_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = Waiting(tmp_path)
    for _ in range(2000):
        waiting.add(KEY, Op.PUT)
        waiting.done(KEY)
    assert (tmp_path / NAME).stat().st_size < 200_000
    waiting.add(KEY, Op.PUT)

    def fails(_fd: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fails)
        with pytest.raises(OSError, match="Input"):
            waiting.add(RECORD, Op.DELETE)
    assert waiting.items.keys() == {KEY}
    waiting.add(blob(1)[0], Op.DELETE)
    assert parse((tmp_path / NAME).read_bytes()) == {KEY: Op.PUT, blob(1)[0]: Op.DELETE}, "begun anew from memory"
    waiting.close()


# --- encrypted domains -----------------------------------------------------------------------------------------------


def test_an_encrypted_domain_behind_a_front(front: Front, expected_log_errors) -> None:
    """Where its objects are is told by their own names; what lies here and in the cloud is encrypted."""
    expected_log_errors("the cloud lost an object")
    store = SealedStore(front.store, {"secret": [DomainKey(bytes(range(32)))]})
    key, data = KEY.replace("public", "secret"), DATA
    front.cloud.down = True
    path = store.staging() / "file"
    path.write_bytes(data)
    store.put_file(key, path)
    assert store.near(key)
    assert store.waits(key)
    assert read(store, key) == data
    front.cloud.down = False
    front.settle()
    assert not store.waits(key)
    (here,) = [p for p in front.front.rglob("*") if p.is_file() and "sealed" in p.parts]
    (there,) = [p for p in front.cloud_root.rglob("*") if p.is_file() and "sealed" in p.parts]
    assert here.read_bytes() == there.read_bytes() != data
    spoil(there)
    found = memoryview(bytearray(len(data)))
    assert store.lasting.heal(key, 0, len(data), lambda content: content == data)
    front.settle()
    store.lasting.read_into(key, 0, found)
    assert found == data
    assert there.read_bytes() == here.read_bytes()
    store.delete(key)
    assert not store.near(key)
