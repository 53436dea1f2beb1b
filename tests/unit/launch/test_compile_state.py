"""What `helios status` is told of starts of engines."""

import os

import pytest

from helios.launch.compile_made import Bad, Made, sweep
from helios.launch.compile_state import Shown, Start, forget_dead, starts

START = Start(model="org/name", commit="c" * 40, key="k" * 32, artifact=None, how="here", why="of it", looked_s=0.1)


def test_a_start_is_shown_while_its_owner_lives_and_forgotten_after(tmp_path):
    shown = Shown.open(tmp_path, "1-1", START)
    assert starts(tmp_path) == [START]
    shown.published("d" * 40)
    assert [start.published for start in starts(tmp_path)] == ["d" * 40]
    forget_dead(tmp_path)
    assert len(starts(tmp_path)) == 1
    shown.close()
    shown.close()
    assert os.listdir(tmp_path / "open") == []


def test_what_the_dead_left_is_not_shown_and_removed(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "1-1.json").write_bytes(b'{"half')
    assert starts(tmp_path) == []
    forget_dead(tmp_path)
    assert os.listdir(tmp_path / "open") == []


def test_a_record_that_is_being_written_is_left_out(tmp_path):
    shown = Shown.open(tmp_path, "1-1", START)
    (tmp_path / "open" / "1-1.json").write_bytes(b'{"half')
    assert starts(tmp_path) == []
    shown.close()


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "the engine compiles, because of it"),
        ({"earlier": True}, "what this home has compiled before is there, because of it"),
        (
            {"artifact": "a" * 40, "files": 2, "bytes": 1_500_000, "how": "overlayfs", "why": ""},
            "2 files, 1.5 MB, after 0.1 s (overlayfs)",
        ),
        (
            {"artifact": "a" * 40, "how": "copied", "why": "of a reason"},
            "0 files, 0.0 MB, after 0.1 s (copied, because of a reason)",
        ),
    ],
)
def test_what_was_found_is_said_in_one_line(fields, text):
    assert Start(**({name: getattr(START, name) for name in START.__struct_fields__} | fields)).found == text


def test_kernels_are_bad_after_two_failures_in_a_row_with_the_same(tmp_path):
    bad = Bad(tmp_path)
    bad.add("k", "one")
    assert ("k", "one") not in bad
    bad.add("k", "other")
    bad.add("k", "one")
    assert ("k", "one") not in bad
    bad.add("k", "one")
    assert ("k", "one") in bad
    bad.forget("k", "other")
    assert ("k", "one") in bad
    bad.forget("k", "one")
    assert ("k", "one") not in bad
    (tmp_path / "bad" / "k").write_bytes(b"\xff\xfe one x")
    assert ("k", "one") not in bad


def test_a_directory_in_use_is_not_dropped_and_one_that_was_dropped_is_used_anew(tmp_path):
    path = tmp_path / "made" / "k"
    one, two = Made.use(path), Made.use(path)
    (path / "a").write_bytes(b"1")
    one.close()
    Made.drop(path)
    assert os.listdir(path) == ["a"]
    two.close()
    Made.drop(path)
    assert os.listdir(tmp_path / "made") == []
    again = Made.use(path)
    assert os.listdir(path) == []
    again.close()


def test_what_was_being_dropped_when_its_process_was_killed_goes(tmp_path):
    (tmp_path / "made" / ".going-1" / "deep").mkdir(parents=True)
    (tmp_path / "staging" / "files").mkdir(parents=True)
    sweep(tmp_path)
    assert os.listdir(tmp_path / "made") == os.listdir(tmp_path / "staging") == []
