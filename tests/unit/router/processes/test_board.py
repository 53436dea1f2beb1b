"""The board: whatever processes begin, end and die, and however names come and go, each count is what is under way."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from router.processes.board import LOADS, Board, BoardError, Row

SLOTS = 3
NAMES = ("a", "b", "c", "d")


class Shared(RuleBasedStateMachine):
    """Processes with a mapping of their own each, beside a list of what is under way."""

    begun = Bundle("begun")

    @initialize()
    def start(self) -> None:
        self.supervisor = Board.make(SLOTS, rows=len(NAMES) + 1)
        self.boards = [Board(self.supervisor.fd) for _ in range(SLOTS)]
        self.rows: dict[tuple[int, str], Row] = {}
        self.lives = [0] * SLOTS
        self.under_way: list[tuple[int, int, str, int]] = []
        self.known: set[str] = set()
        self.watching: dict[str, Row] = {}

    def row(self, slot: int, name: str) -> Row:
        """As a process does: its row is made when it hears of the name."""
        self.known.add(name)
        if (slot, name) not in self.rows:
            self.rows[slot, name] = self.boards[slot].row(name, slot)
        return self.rows[slot, name]

    @rule(target=begun, slot=st.integers(0, SLOTS - 1), name=st.sampled_from(NAMES), tokens=st.integers(0, 1 << 40))
    def begin(self, slot: int, name: str, tokens: int) -> tuple[int, int, str, int]:
        self.row(slot, name).begin(tokens)
        one = (slot, self.lives[slot], name, tokens)
        self.under_way.append(one)
        return one

    @rule(one=consumes(begun))
    def end(self, one: tuple[int, int, str, int]) -> None:
        slot, life, name, tokens = one
        if self.lives[slot] == life:  # else it died with its process
            self.rows[slot, name].end(tokens)
            self.under_way.remove(one)

    @rule(slot=st.integers(0, SLOTS - 1))
    def die(self, slot: int) -> None:
        """And another process gets the slot."""
        self.supervisor.clear(slot)
        self.lives[slot] += 1
        self.under_way = [one for one in self.under_way if one[0] != slot]
        self.boards[slot] = Board(self.supervisor.fd)
        self.rows = {key: row for key, row in self.rows.items() if key[0] != slot}

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        """No process knows the name any more: its row goes when nothing is under way."""
        name = data.draw(st.sampled_from(sorted(self.known)))
        busy = any(one[2] == name for one in self.under_way)
        self.supervisor.row(name, 0).ints[3] = 7
        assert self.supervisor.release(name) is not busy
        if not busy:
            self.known.discard(name)
            self.rows = {key: row for key, row in self.rows.items() if key[1] != name}

    @rule(slot=st.integers(0, SLOTS - 1), name=st.sampled_from(NAMES))
    def new_names_find_zeroes(self, slot: int, name: str) -> None:
        if name not in self.known:
            assert list(self.row(slot, name).ints) == [0] * 8

    @invariant()
    def sums_are_right(self) -> None:
        for name in self.known:
            mine = [one for one in self.under_way if one[2] == name]
            for board in (self.supervisor, *self.boards):
                row = board.row(name, 0)
                assert (row.requests, row.tokens) == (len(mine), sum(one[3] for one in mine))

    def teardown(self) -> None:
        if hasattr(self, "supervisor"):
            for slot in range(SLOTS):
                self.supervisor.clear(slot)
            for name in self.known:
                row = self.supervisor.row(name, 0)
                assert (row.requests, row.tokens) == (0, 0)
            os.close(self.supervisor.fd)


TestShared = Shared.TestCase
TestShared.settings = settings(max_examples=60, stateful_step_count=30)


def test_processes_that_count_at_once_lose_nothing() -> None:
    board = Board.make(4)
    pids = []
    for slot in range(4):
        pid = os.fork()
        if not pid:
            row = board.row("w", slot)
            for _ in range(5000):
                row.begin(3)
                row.begin(5)
                row.end(3)
            os._exit(0)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
    row = board.row("w", 0)
    assert (row.requests, row.tokens) == (20_000, 100_000)
    board.clear(2)
    assert (row.requests, row.tokens) == (15_000, 75_000)
    os.close(board.fd)


def test_processes_that_name_at_once_agree_on_the_rows() -> None:
    board = Board.make(4)
    pids = []
    for slot in range(4):
        pid = os.fork()
        if not pid:
            for i in range(slot, 200 + slot):
                board.row(f"w{i % 200}", slot).begin(i % 200)
            os._exit(0)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
    assert [(board.row(f"w{i}", 0).requests, board.row(f"w{i}", 0).tokens) for i in range(200)] == [
        (4, 4 * i) for i in range(200)
    ]
    os.close(board.fd)


def test_words_are_everybodys() -> None:
    board = Board.make(2)
    one, two = board.row("bucket", 0), Board(board.fd).row("bucket", 1)
    one.floats[0], two.ints[1] = 2.5, 1 << 63
    assert (two.floats[0], one.ints[1]) == (2.5, 1 << 63)
    board.clear(0)
    assert two.floats[0] == 2.5  # the words of a dead process are not its own
    os.close(board.fd)


def test_columns_are_cleared_for_a_process_that_died_and_others_hear_of_it() -> None:
    board = Board.make(3, LOADS + 2)
    rows = [Board(board.fd).row("w", slot) for slot in range(3)]
    for number, row in enumerate(rows):
        row.put(0, number + 1)
        row.put(1, 10 * (number + 1))
        row.begin(7)
    rows[0].ints[0] = 5
    moments = {board.moment}
    board.clear(1)
    moments.add(board.moment)
    assert [list(row.every(1)) for row in rows] == [[10, 0, 30]] * 3
    assert [row.mine(0) for row in rows] == [1, 0, 3]
    assert (rows[0].requests, rows[0].tokens, rows[0].ints[0]) == (2, 14, 5)
    for row in rows:
        row.note()
        moments.add(board.moment)
    assert len(moments) == 5
    other = board.row("x", 0)
    assert [list(other.every(column)) for column in (0, 1)] == [[0, 0, 0]] * 2
    os.close(board.fd)


def test_a_full_board_says_so() -> None:
    board = Board.make(1, rows=2)
    board.row("a", 0), board.row("b", 0)
    with pytest.raises(BoardError, match="no more than 2 rows"):
        board.row("c", 0)
    assert board.release("a")
    board.row("c", 0)
    os.close(board.fd)


def test_other_memory_is_refused() -> None:
    fd = os.memfd_create("other")
    os.truncate(fd, 4096)
    with pytest.raises(BoardError, match="not a router's"):
        Board(fd)
    os.close(fd)
