"""The board that keeper and worker share, and what the keeper decides from it."""

import contextlib
import os
import signal
import struct
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from heliosfs.fuse.ledger import Ledger
from heliosfs.fuse.modes import IoModes
from heliosfs.fuse.tables import BoardFullError, OpenFile, deliveries, init_request, keep_init, open_files
from heliosfs.keeper import policy
from heliosfs.keeper.board import INIT_MAX, SIZE, Board
from heliosfs.keeper.policy import Death, Restarts

WORDS = ("generation", "loop_ns", "channel_ns", "oldest_ns", "limit_ns", "crashes")
U64 = st.integers(0, 2**64 - 1)


@pytest.fixture
def board():
    board = Board.create()
    yield board
    board.close()


def other(board):
    """The same board as another process maps it."""
    return contextlib.closing(Board(os.dup(board.fd)))


def test_the_layout_is_what_the_module_says(board):
    for number, name in enumerate(WORDS, 1):
        setattr(board, name, number)
    board.mounted_ns, board.oldest, board.late = 7, 8, 9
    keep_init(board, b"init")
    deliveries(board).put(11, 2)
    open_files(board).put(12, 3, 4)
    data = os.pread(board.fd, SIZE + 1, 0)
    assert len(data) == SIZE
    assert struct.unpack_from("<4sI6QI", data) == (b"HBRD", 1, 1, 2, 3, 4, 5, 6, 4)
    assert data[64:69] == b"init\0"
    assert struct.unpack_from("<Q", data, 320) == (7,)
    assert struct.unpack_from("<QQ", data, 368) == (8, 9)
    assert struct.unpack_from("<QQ", data, 4096) == (11, 2)
    assert struct.unpack_from("<QII", data, 20480) == (12, 3, 4)


@given(st.dictionaries(st.sampled_from([*WORDS, "mounted_ns"]), U64), st.binary(max_size=INIT_MAX))
def test_what_one_process_writes_the_other_reads(values, init):
    with contextlib.closing(Board.create()) as board, other(board) as second:
        for name, value in values.items():
            setattr(board, name, value)
        keep_init(board, init)
        assert {name: getattr(second, name) for name in values} == values
        assert init_request(second) == init


def test_the_board_keeps_its_size(board):
    for size in (0, SIZE - 1, SIZE + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(board.fd, size)


@pytest.mark.parametrize("content", [b"", b"HBRD", bytes(SIZE), b"HBRD\2\0\0\0".ljust(SIZE, b"\0")])
def test_what_is_no_board_is_refused(content):
    fd = os.memfd_create("test")
    os.write(fd, content)
    with pytest.raises(ValueError, match="board"):
        Board(fd)
    os.close(fd)


def test_an_init_that_does_not_fit_is_refused(board):
    with pytest.raises(ValueError, match="257 bytes"):
        keep_init(board, bytes(INIT_MAX + 1))
    assert init_request(board) == b""


def test_a_full_table_says_so_and_takes_more_after_a_removal(board):
    table = deliveries(board)
    for key in range(1, 1025):
        table.put(key, 1)
    with pytest.raises(BoardFullError, match="1024"):
        table.put(1025, 1)
    table.put(7, 2)
    table.remove(9)
    table.put(1025, 3)
    assert dict(deliveries(board)) == {key: 1 for key in range(1, 1025) if key != 9} | {7: 2, 1025: 3}


def test_16384_files_are_open_and_no_more_until_one_is_closed(board):
    """One more is ENFILE; those that are open can be opened again."""
    modes = IoModes(Ledger(board, 0))
    assert all(modes.opened(ino, ino, 0) for ino in range(1, 16385))
    assert not modes.opened(16385, 16385, 0)
    assert modes.backing(16385) is None
    assert modes.opened(16386, 7, 0)
    modes.released(16387, 9)
    assert modes.opened(16388, 16385, 0)
    assert len(open_files(board)) == len(IoModes(Ledger(board, 0))) == 16384


def test_a_copy_says_the_same_and_is_apart(board):
    board.generation = 7
    open_files(board).put(12, 3, 4)
    with contextlib.closing(board.copied()) as copy:
        assert list(open_files(copy)) == [OpenFile(12, 3, 4)]
        board.generation, copy.loop_ns = 8, 9
        open_files(board).remove(12)
        assert (copy.generation, board.loop_ns) == (7, 0)
        assert list(open_files(copy)) == [OpenFile(12, 3, 4)]


class Tables(RuleBasedStateMachine):
    """Both tables against dictionaries; every step also through a fresh look, as a successor has it."""

    def __init__(self):
        super().__init__()
        self.board = Board.create()
        self.files, self.deliveries = open_files(self.board), deliveries(self.board)
        self.files_model, self.deliveries_model = {}, {}

    @rule(ino=st.integers(1, 5), backing=st.integers(0, 2**32 - 1), opens=st.integers(1, 2**32 - 1))
    def opened(self, ino, backing, opens):
        self.files.put(ino, backing, opens)
        self.files_model[ino] = OpenFile(ino, backing, opens)

    @rule(ino=st.integers(1, 5))
    def closed(self, ino):
        self.files.remove(ino)
        self.files_model.pop(ino, None)

    @rule(unique=st.integers(1, 2**64 - 1), count=U64)
    def delivered(self, unique, count):
        self.deliveries.put(unique, count)
        self.deliveries_model[unique] = count

    @rule(data=st.data())
    def answered(self, data):
        unique = data.draw(st.sampled_from([1, *self.deliveries_model]))
        self.deliveries.remove(unique)
        self.deliveries_model.pop(unique, None)

    @rule()
    def restarted(self):
        self.files, self.deliveries = open_files(self.board), deliveries(self.board)

    @invariant()
    def tables_are_the_models(self):
        for files in (self.files, open_files(self.board)):
            assert {file.ino: file for file in files} == self.files_model
            assert all(files.get(ino) == self.files_model.get(ino) for ino in range(1, 6))
        for table in (self.deliveries, deliveries(self.board)):
            assert dict(table) == self.deliveries_model
            assert len(table) == len(self.deliveries_model)

    def teardown(self):
        self.board.close()


TestTables = Tables.TestCase
TestTables.settings = settings(max_examples=30, stateful_step_count=20)


# --- what is decided -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "circumstances", "expected"),
    [
        (0, "", Death.CLEAN),
        (3, "", Death.CRASH),
        (1, "ended", Death.CLEAN),
        (None, "ended", Death.CLEAN),
        (None, "", Death.CRASH),
        (-signal.SIGKILL, "", Death.KILLED),
        (-signal.SIGTERM, "", Death.KILLED),
        (-signal.SIGSEGV, "", Death.CRASH),
        (-signal.SIGKILL, "asked", Death.ASKED),
        (-signal.SIGKILL, "hung", Death.CRASH),
        (-signal.SIGKILL, "asked hung", Death.CRASH),
        (-signal.SIGKILL, "oom", Death.CRASH),
        (-signal.SIGKILL, "asked oom", Death.ASKED),
        (-signal.SIGTERM, "oom", Death.KILLED),
    ],
)
def test_how_a_worker_ended(code, circumstances, expected):
    assert policy.death(code, **dict.fromkeys(circumstances.split(), True)) is expected


def test_workers_that_fail_start_later_and_later():
    restarts = Restarts()
    delays = [restarts.died(Death.CRASH, 0.5) for _ in range(9)]
    assert delays == [0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    assert restarts.died(Death.CRASH, 10.0) == 0.0


def test_workers_that_are_never_ready_start_later_and_later():
    restarts = Restarts()
    delays = [restarts.died(how, None) for how in (Death.CLEAN, Death.CRASH, Death.CLEAN, Death.KILLED)]
    assert delays == [0.0, 0.1, 0.2, 0.1], "somebody who kills workers at their start does not lengthen the delay"


def test_kills_from_outside_and_upgrades_do_not_delay_however_quick_they_come():
    restarts = Restarts()
    for how in [Death.KILLED, Death.KILLED, Death.ASKED, Death.CLEAN] * 20:
        assert restarts.died(how, 0.01) == 0.0


def test_signs_of_life_and_their_absence(board):
    ready = 1000.0
    assert policy.hang(board, ready + 10, ready, 10.0) is None, "the time before it was ready does not count"
    assert "loop" in policy.hang(board, ready + 10.1, ready, 10.0)
    board.loop_ns = int(1005e9)
    assert "channel" in policy.hang(board, 1011.0, ready, 10.0)
    board.channel_ns = int(1004e9)
    assert policy.hang(board, 1014.0, ready, 10.0) is None
    assert "channel" in policy.hang(board, 1014.1, ready, 10.0)


def test_a_request_that_waits_too_long(board):
    board.loop_ns = board.channel_ns = int(1040e9)
    board.oldest_ns = int(1000e9)
    assert policy.hang(board, 1040.0, 900.0, 10.0) is None, "the worker has not said how long is too long"
    board.limit_ns = int(35e9)
    assert "40.0 s" in policy.hang(board, 1040.0, 900.0, 10.0)
    assert policy.hang(board, 1040.0, 1030.0, 10.0) is None, "after the machine stood still it has its time again"
    board.oldest_ns = 0
    assert policy.hang(board, 1040.0, 900.0, 10.0) is None


def test_the_clock_is_the_monotonic_one(board):
    board.loop_ns = board.channel_ns = time.monotonic_ns()
    assert policy.hang(board, time.monotonic(), 0.0, 10.0) is None
