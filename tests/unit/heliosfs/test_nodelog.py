"""The node log: what was written is found again, whatever happened to the end of the file; nothing else is believed."""

import errno
import itertools
import os
import random
import resource
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliosfs.tree import nodelog, noderecords
from heliosfs.tree.nodelog import NodeLog
from heliosfs.tree.noderecords import Record
from tests.support.disks import remount, small_disk
from tests.support.durable import FATES, Disk, Shim, put

MOUNT = 1234567890
NUMBERS = st.integers(2, (1 << 63) - 1)
RECORDS = st.builds(
    Record,
    ino=NUMBERS,
    parent=NUMBERS,
    name=st.binary(min_size=1, max_size=255),
    mtime=st.none() | st.integers(0, 1 << 40),
    attempt=st.integers(0, 255),
    identity=st.integers(0, (1 << 64) - 1),
    live=st.just(True),
)


def record(ino, name=b"x", parent=1, **more):
    return Record(ino, parent, name, **({"mtime": 5, "attempt": 0, "identity": ino * 7 % (1 << 64)} | more))


def written(path, *records):
    log = NodeLog.open(path, MOUNT)
    for each in records:
        log.held(each)
    log.close()


def reopened(path, **options):
    return NodeLog.open(path, MOUNT, **options)


@given(st.lists(RECORDS, max_size=8))
def test_every_record_is_found_by_the_next_worker(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("log") / "nodes"
    written(path, *records)
    log = reopened(path)
    last = {each.ino: each for each in records}
    assert {ino: log.find(ino) for ino in last} == last
    assert len(log) == len(last)
    assert log.find(1) is None
    log.close()


def test_a_worker_does_not_look_up_its_own_records(tmp_path):
    log = NodeLog.open(tmp_path / "nodes", MOUNT)
    log.held(record(7))
    assert log.find(7) is None
    assert 7 not in log
    log.close()


@given(st.integers(0, 200), st.binary(max_size=60))
def test_a_torn_tail_is_cut_off_and_written_over(tmp_path_factory, cut, noise):
    path = tmp_path_factory.mktemp("log") / "nodes"
    records = [record(n, b"n%d" % n) for n in (2, 3, 4)]
    written(path, *records)
    whole = path.read_bytes()
    step = (len(whole) - noderecords.HEAD_BYTES) // 3
    end = max(noderecords.HEAD_BYTES, len(whole) - cut)
    path.write_bytes(whole[:end] + noise)
    kept = (end - noderecords.HEAD_BYTES) // step
    log = reopened(path)
    assert [log.find(each.ino) for each in records] == records[:kept] + [None] * (3 - kept)
    log.held(record(9))
    log.close()
    again = reopened(path)
    assert again.find(9) == record(9)
    assert len(again) == kept + 1
    again.close()


@given(st.data())
def test_a_changed_byte_hides_a_record_and_what_follows_and_changes_nothing(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("log") / "nodes"
    records = {each.ino: each for each in (record(n, b"name-%d" % n) for n in range(2, 8))}
    written(path, *records.values())
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(noderecords.HEAD_BYTES, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    log = reopened(path)
    found = [log.find(ino) for ino in records]
    log.close()
    known = (at - noderecords.HEAD_BYTES) // ((len(content) - noderecords.HEAD_BYTES) // 6)
    assert found == [*records.values()][:known] + [None] * (6 - known)


@pytest.mark.parametrize("damage", [b"", b"HNOD", b"junk" * 100, bytes(1000)])
def test_a_file_that_is_no_log_is_started_anew(tmp_path, damage):
    path = tmp_path / "nodes"
    path.write_bytes(damage)
    log = reopened(path)
    assert len(log) == 0
    log.held(record(2))
    log.close()
    again = reopened(path)
    assert again.find(2) == record(2)
    again.close()


def test_the_log_of_another_mount_is_not_believed(tmp_path):
    path = tmp_path / "nodes"
    written(path, record(2))
    log = NodeLog.open(path, MOUNT + 1)
    assert log.find(2) is None
    log.close()
    assert path.stat().st_size == noderecords.HEAD_BYTES


def test_the_last_place_counts(tmp_path):
    path = tmp_path / "nodes"
    written(path, record(2, b"old"), record(3), record(2, b"new"))
    log = reopened(path)
    assert log.find(2).name == b"new"
    log.held(record(2, b"newer"))
    assert log.find(2).name == b"newer", "what this worker adds to an inode of before counts too"
    log.close()


def test_what_was_given_back_is_still_found_until_the_log_is_compacted(tmp_path):
    path = tmp_path / "nodes"
    written(path, record(2), record(3))
    log = reopened(path)
    log.forgotten(2)
    assert not log.find(2).live
    log.close()
    log = reopened(path)
    assert not log.find(2).live
    assert log.find(3).live
    log.close()
    written(path, *(record(3) for _ in range(6)))
    log = reopened(path, compact_bytes=0)
    assert log.find(2) is None
    assert log.find(3) == record(3)
    log.close()


def test_what_is_handed_out_again_is_live_again(tmp_path):
    path = tmp_path / "nodes"
    log = NodeLog.open(path, MOUNT)
    log.held(record(2))
    log.forgotten(2)
    log.held(record(2, b"again"))
    log.close()
    log = reopened(path)
    assert log.find(2) == record(2, b"again")
    log.close()


def test_compaction_keeps_the_way_up_of_what_is_live(tmp_path):
    """A directory that the kernel gave back may be the only known way to a file that it holds under another name."""
    path = tmp_path / "nodes"
    log = NodeLog.open(path, MOUNT)
    for each in (record(2, b"org"), record(3, b"model", 2), record(4, b"file", 3), record(5, b"gone", 3)):
        log.held(each)
    for _ in range(4):
        log.held(record(4, b"file", 3, attempt=1))
    for ino in (2, 3, 5):
        log.forgotten(ino)
    log.close()
    before = path.stat().st_size
    for _ in range(2):  # compacted once, it is not needed again
        log = reopened(path, compact_bytes=0)
        assert log.find(4) == record(4, b"file", 3, attempt=1)
        assert log.moved(4 * 7) == log.find(4)
        assert [(log.find(ino).name, log.find(ino).live) for ino in (2, 3)] == [(b"org", False), (b"model", False)]
        assert log.find(5) is None
        log.close()
    assert path.stat().st_size < before
    assert [entry.name for entry in tmp_path.iterdir()] == ["nodes"]


def test_a_small_log_and_one_that_is_up_to_date_are_left_alone(tmp_path):
    path = tmp_path / "nodes"
    written(path, *(record(2) for _ in range(50)))
    inode = path.stat().st_ino
    reopened(path).close()
    assert path.stat().st_ino == inode
    written(path, *(record(n) for n in range(2, 200)))
    reopened(path, compact_bytes=0).close()
    assert path.stat().st_ino == inode


def test_a_log_that_grows_is_compacted_while_it_is_used(tmp_path):
    path = tmp_path / "nodes"
    log = NodeLog.open(path, MOUNT, compact_bytes=200)
    longest = 0
    for number in range(2, 5000):
        log.held(record(number, b"%d" % number))
        log.flush()
        if number > 20:
            log.forgotten(number - 10)
        longest = max(longest, path.stat().st_size)
    assert longest < 3 * 200 * nodelog.GROWTH
    assert [entry.name for entry in tmp_path.iterdir()] == ["nodes"]
    log.close()
    log = reopened(path)
    assert all(log.find(number) == record(number, b"%d" % number) for number in range(4990, 5000))
    assert log.find(2).live
    assert log.find(500) is None
    log.close()


def test_a_log_that_can_not_be_compacted_goes_on_as_it_is(tmp_path, caplog):
    path = tmp_path / "nodes"
    (tmp_path / "nodes.new").mkdir()
    log = NodeLog.open(path, MOUNT, compact_bytes=10)
    for _ in range(100):
        log.held(record(2))
        log.flush()
    log.close()
    assert len([line for line in caplog.records if "can't be compacted" in line.message]) >= 1
    (tmp_path / "nodes.new").rmdir()
    log = reopened(path)
    assert log.find(2) == record(2)
    log.close()


def test_many_inodes_in_any_order(tmp_path):
    path = tmp_path / "nodes"
    rng = random.Random(1)
    numbers = rng.sample(range(2, 1 << 63), 5000)
    written(path, *(record(n, b"%d" % n) for n in numbers))
    log = reopened(path)
    rng.shuffle(numbers)
    assert all(log.find(n).name == b"%d" % n for n in numbers)
    assert not any(n + 1 in log for n in numbers[:100] if n + 1 not in numbers)
    for n in numbers[:2500]:
        log.forgotten(n)
    log.close()
    log = reopened(path)
    assert [log.find(n).live for n in numbers] == [False] * 2500 + [True] * 2500
    log.close()


def test_a_full_disk_stops_nobody_and_is_said_once(tmp_path, caplog):
    path = tmp_path / "nodes"
    log = NodeLog.open(path, MOUNT)
    log.held(record(2))
    log.flush()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 30, limits[1]))  # in the middle of a record
    try:
        for number in range(3, 10):
            log.held(record(number))
            log.flush()
        for number in range(10, 30_000):
            log.held(record(number))
        log.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len([line for line in caplog.records if "can't be recorded" in line.message]) == 1
    log.held(record(7, b"after"))
    log.close()
    log = reopened(path)
    assert log.find(2) == record(2)
    assert log.find(7) == record(7, b"after"), "it goes on when there is room again"
    log.close()


def test_what_is_left_unwritten_is_written_when_there_is_room(tmp_path):
    path = tmp_path / "nodes"
    log = NodeLog.open(path, MOUNT)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 30, limits[1]))
    try:
        log.held(record(2))
        log.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.held(record(3))
    log.close()
    log = reopened(path)
    assert (log.find(2), log.find(3)) == (record(2), record(3))
    log.close()


def test_only_the_owner_reads_it_and_it_goes_with_the_mount(tmp_path):
    log = NodeLog.open(tmp_path / "nodes", MOUNT)
    assert os.stat(tmp_path / "nodes").st_mode & 0o777 == 0o600
    log.close()
    log.remove()
    log.remove()
    assert list(tmp_path.iterdir()) == []


# --- crashes, and disks that refuse ---


def lived(path, mark=lambda *_: None):
    """A worker's life: it hands inodes out, gets some back, and its log is compacted as it grows."""
    log = NodeLog.open(path, MOUNT, compact_bytes=64)
    for number in range(2, 90):
        log.held(record(number, b"n%d" % number))
        log.flush()
        mark("handed", str(number))
        if number % 8:
            mark("back", str(number))
            log.forgotten(number)
    log.close()


def look(path, inos):
    """The next worker finds every inode that the kernel may name."""
    log = NodeLog.open(path, MOUNT, compact_bytes=1 << 20)
    lost = {ino for ino in inos if log.find(ino) is None}
    log.close()
    assert not lost


def test_a_kill_at_any_step_loses_no_inode_that_the_kernel_has(tmp_path):
    """A write that was under way may be torn; what was answered is there. Of a power cut anything may be left: the
    mount is gone then, but the log of another one is opened."""
    (root := tmp_path / "run").mkdir()
    with Shim(root) as shim:
        lived(root / "nodes", shim.mark)
    assert any(step.call == "rename" for step in shim.log), "it was compacted"
    disk, held, rng = Disk(), set(), random.Random(4)
    for number, step in enumerate(shim.log):
        if step.call == "#handed":
            held.add(int(step.name))
        elif step.call == "#back":
            held.discard(int(step.name))
        else:
            disk.take(step)
            states = [(disk.crash(lambda: True, lambda: "whole"), held)]
            if number % 5 == 0:
                states.append((disk.crash(lambda: rng.random() < 0.5, lambda: rng.choice(FATES)), set()))
            for state, inos in states:
                (again := tmp_path / "again").mkdir()
                put(state, again)
                look(again / "nodes", inos)
                shutil.rmtree(again)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_refuses_any_step_stops_no_worker(tmp_path, code):
    with Shim(tmp_path) as shim:
        lived(tmp_path / "count")
    for at in range(0, len(shim.log), 7):
        (root := tmp_path / f"at-{at}").mkdir()
        made = itertools.count()

        def refuse(step, made=made, at=at):
            if next(made) >= at:
                raise OSError(code, os.strerror(code))

        with Shim(root, refuse):
            lived(root / "nodes")
        look(root / "nodes", set())


def test_a_read_only_log_is_gone_on_with_in_memory(tmp_path, caplog):
    with small_disk(tmp_path / "disk", 3) as disk:
        written(disk / "nodes", record(7), record(8))
        remount(disk, "ro")
        log = reopened(disk / "nodes")
        assert log.find(7) == record(7)
        log.held(record(9))
        log.flush()
        log.close()
        assert "inodes can't be recorded" in caplog.text
