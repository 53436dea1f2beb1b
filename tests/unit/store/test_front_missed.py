"""What a front's disk missed is known by key: after a death at any step, and as long as the list can be relied on."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from heliosfs.store.front import missed, near, uploads
from heliosfs.store.front.lines import Damaged
from heliosfs.store.front.missed import Missed, head, parse
from tests.support.front_away import REMOVED, UPLOADED, WAITING, fill, found, put, reopen
from tests.support.front_crash import Crash
from tests.support.front_store import RECORD, Front, blob, until


@pytest.fixture
def front(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(near, "LOOK_S", 0.0)
    monkeypatch.setattr(uploads, "FIRST_S", 0.01)
    made = Front(tmp_path, back=True)
    yield made
    made.store.close()


# --- a process dies at each step -------------------------------------------------------------------------------------


class Acted:
    """What is done while the disk is away, while it comes back, and after that; and what may be there then."""

    def __init__(self, front: Front) -> None:
        self.front = front
        self.may: dict[str, set[bytes | None]] = {UPLOADED: {blob(1)[1]}, REMOVED: {None}}
        self.may |= {WAITING: {blob(0)[1]}, RECORD: {b"new"}}

    def all(self) -> None:
        self._put(REMOVED, blob(2)[1])
        self._remove(WAITING)
        self._remove(UPLOADED)
        self._remove(RECORD)
        self._put(RECORD, b"newer")
        self.front.bring_back()
        self.front.near.look()
        self._remove(RECORD)
        self._put(RECORD, b"newest")
        self._put(WAITING, blob(0)[1])

    def _put(self, key: str, data: bytes) -> None:
        self.may[key] = self.may[key] | {data}
        if key == RECORD:
            self.front.store.put_bytes(key, data)
        else:
            put(self.front, key)
        self.may[key] = {data}

    def _remove(self, key: str) -> None:
        self.may[key] = self.may[key] | {None}
        self.front.store.delete(key)
        self.may[key] = {None}


@pytest.mark.parametrize("fresh", [False, True], ids=["known", "unknown"])
def test_a_death_at_any_step_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected_log_errors, fresh: bool
) -> None:
    expected_log_errors("background work broke")  # of a process that is dead, and whose threads are not
    monkeypatch.setattr(near, "LOOK_S", 0.0)
    for name, value in (("FIRST_S", 0.002), ("LONGEST_S", 0.01), ("IDLE_S", 0.01)):
        monkeypatch.setattr(uploads, name, value)
    step, killed = 0, True
    while killed:
        root = tmp_path / str(step)
        root.mkdir()
        front = Front(root, back=True)
        fill(front)
        front.take_away()
        if fresh:
            reopen(front)
        acted = Acted(front)
        with Crash(front, step) as crash:
            front.cloud.down = False
            killed = crash.kills(acted.all)
        if (root / "away").exists():
            front.bring_back()
        front.open()
        front.settle()
        for key, allowed in acted.may.items():
            assert found(front, key) in allowed, f"{key}, killed at step {step}"
        front.store.close()
        step += 1
    assert step > 30


# --- the list --------------------------------------------------------------------------------------------------------


def known(front: Front) -> bytes:
    return (front.root / "front.json").read_bytes()


@pytest.mark.parametrize("how", ["damaged", "too many keys", "too many bytes"])
def test_a_list_that_cannot_be_relied_on_has_everything_compared(
    front: Front, monkeypatch: pytest.MonkeyPatch, expected_log_errors, how: str
) -> None:
    """What is in doubt then is uploaded, or taken from the cloud where that has something else."""
    expected_log_errors("the cloud has another object of this name")
    monkeypatch.setattr(missed, "MAX_KEYS", 1 if how == "too many keys" else 1000)
    monkeypatch.setattr(missed, "MAX_BYTES", 100 if how == "too many bytes" else 1 << 20)
    front.store.put_bytes(RECORD, b"old")
    put(front, UPLOADED)
    put(front, REMOVED)
    front.settle()
    front.cloud.down = True
    put(front, WAITING)
    front.take_away()
    reopen(front)
    front.store.delete(UPLOADED)
    if how == "damaged":
        (front.root / "front.missed").write_bytes(b"helios-missed 2\n")
        reopen(front)
    front.store.delete(RECORD)
    front.store.put_bytes(RECORD, b"new")
    assert b'"away":true' in known(front)
    front.store.delete(REMOVED)
    front.bring_back()
    front.near.look()
    assert front.near.item(WAITING).doubtful
    front.settle()
    assert found(front, WAITING) == blob(0)[1]
    assert found(front, RECORD) == b"new"
    until(lambda: b'"away":false' in known(front))  # noted once nothing waits
    assert not (front.root / "front.missed").exists()


def test_the_list_of_another_front_says_nothing_of_this_one(front: Front) -> None:
    put(front, UPLOADED)
    front.settle()
    missed_by_another = Missed(front.root / "front.missed")
    missed_by_another.of("another")
    assert missed_by_another.note(UPLOADED, sure=True)
    missed_by_another.close()
    reopen(front)
    assert (front.front / UPLOADED).exists()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([UPLOADED, REMOVED, RECORD]), st.booleans()), max_size=8), st.data())
def test_a_list_says_what_was_noted_or_that_it_is_damaged(
    tmp_path_factory: pytest.TempPathFactory, notes: list[tuple[str, bool]], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("missed") / "front.missed"
    first, want, states = Missed(path), {}, [{}]
    first.of("id")
    for key, sure in notes:
        assert first.note(key, sure=sure)
        if want != (want := want | {key: sure or want.get(key, False)}):
            states.append(want)
    first.close()
    assert first.keys == want
    if not notes:
        return
    written = path.read_bytes()
    assert written.count(b"\n") == len(states), "what is known already costs nothing"
    assert parse(written, "id") == want
    assert parse(written, "other") == {}
    cut = data.draw(st.integers(len(head("id")), len(written)))
    path.write_bytes(written[:cut])
    again = Missed(path)
    again.of("id")
    assert again.keys == states[written[:cut].count(b"\n") - 1], "a torn last line was never relied on"
    assert not again.lost
    assert again.note(WAITING, sure=True)
    again.close()
    assert parse(path.read_bytes(), "id") == again.keys
    at = data.draw(st.integers(0, len(written) - 2))
    flipped = written[:at] + bytes([written[at] ^ 1]) + written[at + 1 :]
    if at < len("helios-missed 1") or at >= len(head("id")):
        with pytest.raises(Damaged):
            parse(flipped, "id")
