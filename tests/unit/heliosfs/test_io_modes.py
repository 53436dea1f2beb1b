"""The I/O modes of open inodes, against the kernel's own rules and workers that die at any instruction."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from heliosfs.fuse.modes import Doubt, IoModes

INODES = (10, 20, 30)


class Board:
    """What outlives a worker. ``left`` writes remain until the worker dies; -1: it lives on."""

    def __init__(self, room: int = 100) -> None:
        self.open: dict[int, tuple[int, int]] = {}
        self.now: Doubt | None = None
        self.room, self.left = room, -1

    def write(self) -> None:
        if self.left == 0:
            raise SystemExit("killed")
        self.left -= self.left > 0

    def files(self) -> dict[int, tuple[int, int]]:
        return dict(self.open)

    def put(self, ino: int, backing: int, opens: int) -> bool:
        if ino not in self.open and len(self.open) >= self.room:
            return False
        self.write()
        self.open[ino] = (backing, opens)
        return True

    def remove(self, ino: int) -> None:
        self.write()
        del self.open[ino]

    def doubt(self) -> Doubt | None:
        return self.now

    def set_doubt(self, doubt: Doubt | None) -> None:
        self.write()
        self.now = doubt


class Kernel:
    """The table of /docs: which second open of an inode is an EIO. Backing 0 is through the page cache."""

    def __init__(self) -> None:
        self.handles: dict[int, list[int]] = {}
        self.registered: set[int] = set()
        self.next = 1

    def register(self) -> int:
        self.next += 1
        self.registered.add(self.next)
        return self.next

    def open(self, ino: int, backing: int) -> None:
        for other in self.handles.get(ino, []):
            assert other == backing, f"EIO: inode {ino} is open with {other}, now {backing}"
        assert backing == 0 or backing in self.registered, "EIO: no such backing file"
        self.handles.setdefault(ino, []).append(backing)


def test_the_first_open_decides_and_the_last_release_frees() -> None:
    modes = IoModes(Board())
    assert modes.backing(10) is None
    assert modes.opened(1, 10, 7)
    assert modes.backing(10) == 7
    assert modes.opened(2, 10, 7)
    with pytest.raises(ValueError, match="inode 10 is open with backing 7, not 0"):
        modes.opened(3, 10, 0)
    assert modes.released(4, 10) == 0
    assert modes.released(5, 10) == 7
    assert modes.backing(10) is None
    assert modes.released(6, 10) == 0, "a release of what nobody knows is done"


def test_an_inode_without_room_is_not_opened() -> None:
    modes = IoModes(Board(room=1))
    assert modes.opened(1, 10, 0)
    assert not modes.opened(2, 20, 0)
    assert modes.opened(3, 10, 0)
    modes.released(4, 10)
    modes.released(5, 10)
    assert modes.opened(6, 20, 0)


class Traffic(RuleBasedStateMachine):
    """OPENs and RELEASEs of a kernel, answered by workers that are killed between any two writes."""

    def __init__(self) -> None:
        super().__init__()
        self.board, self.kernel = Board(), Kernel()
        self.modes = IoModes(self.board)
        self.whole = {10}
        self.unique = 0

    def answer(self, opcode: str, ino: int, unique: int) -> None:
        """What the channel does for one request; SystemExit anywhere."""
        self.kernel.registered.discard(self.modes.came(unique))
        if opcode == "open":
            backing = self.modes.backing(ino)
            if backing is None:
                backing = self.kernel.register() if ino in self.whole else 0
            assert self.modes.opened(unique, ino, backing)
            self.kernel.open(ino, backing)
            self.answered = True
            self.modes.settled()
            return
        free = self.modes.released(unique, ino)
        self.kernel.handles[ino].pop()
        self.answered = True
        self.modes.settled()
        self.kernel.registered.discard(free)

    def request(self, opcode: str, ino: int, deaths: list[int]) -> None:
        """The kernel's request, sent again to the next worker until it is answered."""
        self.unique += 1
        self.answered = False
        for left in [*deaths, -1]:
            self.board.left = left
            try:
                self.answer(opcode, ino, self.unique)
            except SystemExit:
                self.board.left = -1
                self.modes = IoModes(self.board)
            if self.answered:
                break
        self.board.left = -1

    deaths = st.lists(st.integers(0, 5), max_size=3)

    @rule(ino=st.sampled_from(INODES), deaths=deaths)
    def open(self, ino: int, deaths: list[int]) -> None:
        self.request("open", ino, deaths)

    @precondition(lambda self: any(self.kernel.handles.values()))
    @rule(data=st.data(), deaths=deaths)
    def release(self, data: st.DataObject, deaths: list[int]) -> None:
        ino = data.draw(st.sampled_from(sorted(ino for ino, handles in self.kernel.handles.items() if handles)))
        self.request("release", ino, deaths)

    @rule(ino=st.sampled_from(INODES))
    def complete(self, ino: int) -> None:
        self.whole.add(ino)

    @rule(ino=st.sampled_from(INODES))
    def evict(self, ino: int) -> None:
        self.whole.discard(ino)

    @rule()
    def die(self) -> None:
        self.modes = IoModes(self.board)

    @invariant()
    def the_books_are_the_kernels(self) -> None:
        for ino in INODES:
            handles = self.kernel.handles.get(ino, [])
            assert self.modes.backing(ino) == (handles[0] if handles else None)
            assert self.board.open.get(ino, (0, 0))[1] == len(handles)


Traffic.TestCase.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
TestTraffic = Traffic.TestCase
