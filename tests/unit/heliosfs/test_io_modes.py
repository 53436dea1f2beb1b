"""The I/O modes of open inodes, against the kernel's own rules and workers that die at any instruction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from heliosfs.fuse.ledger import Ledger
from heliosfs.fuse.modes import Change, IoModes
from heliosfs.keeper import board as keeper
from heliosfs.keeper.refuse import put_back, released

INODES = (10, 20, 30)


class Life:
    """How many steps a worker has left until it dies; -1: it lives on."""

    def __init__(self) -> None:
        self.left = -1

    def step(self) -> None:
        if self.left == 0:
            raise SystemExit("killed")
        self.left -= self.left > 0


class Records:
    """What outlives a worker, as fuse/ledger.py keeps it on a real board. Each write is a step."""

    def __init__(self, life: Life, room: int = 100) -> None:
        self.board, self.life, self.room = keeper.Board.create(), life, room

    def worker(self) -> Worker:
        return Worker(self.board, self.life, self.room)


class Worker(Ledger):
    """A worker's ledger."""

    def __init__(self, board: keeper.Board, life: Life, room: int) -> None:
        super().__init__(board, board.generation)
        self.life, self.room = life, room

    def put(self, ino: int, backing: int, opens: int) -> bool:
        if ino not in self.files() and len(self.files()) >= self.room:
            return False
        self.life.step()
        return super().put(ino, backing, opens)

    def remove(self, ino: int) -> None:
        self.life.step()
        super().remove(ino)

    @property
    def change(self) -> Change | None:
        return super().change

    @change.setter
    def change(self, change: Change | None) -> None:
        self.life.step()
        Ledger.change.fset(self, change)  # type: ignore[attr-defined]

    @property
    def registering(self) -> bool:
        return super().registering

    @registering.setter
    def registering(self, now: bool) -> None:
        self.life.step()
        Ledger.registering.fset(self, now)  # type: ignore[attr-defined]


class Kernel:
    """The table of /docs: which second open of an inode is an EIO. Backing 0 is through the page cache."""

    def __init__(self) -> None:
        self.handles: dict[int, list[int]] = {}
        self.registered: set[int] = set()
        self.next = 1
        self.unanswered: list[Request] = []

    def register(self) -> int:
        self.registered.add(self.next)
        self.next += 1
        return self.next - 1

    def answered(self, request: Request, backing: int) -> None:
        self.unanswered.remove(request)
        if request.opcode == "release":
            self.handles[request.ino].remove(request.backing)
            return
        for other in self.handles.get(request.ino, []):
            assert other == backing, f"EIO: inode {request.ino} is open with {other}, now {backing}"
        assert backing == 0 or backing in self.registered, "EIO: no such backing file"
        self.handles.setdefault(request.ino, []).append(backing)


@dataclass(frozen=True)
class Request:
    """``backing`` is the handle's that is released."""

    unique: int
    opcode: str
    ino: int
    backing: int = 0


def test_the_first_open_decides_and_the_last_release_frees() -> None:
    modes = IoModes(Records(Life()).worker())
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
    modes = IoModes(Records(Life(), room=1).worker())
    assert modes.opened(1, 10, 0)
    assert not modes.opened(2, 20, 0)
    assert modes.opened(3, 10, 0)
    modes.released(4, 10)
    modes.released(5, 10)
    assert modes.opened(6, 20, 0)


class Traffic(RuleBasedStateMachine):
    """OPENs and RELEASEs of a kernel, several at a time, answered by workers that are killed between any two steps."""

    def __init__(self) -> None:
        super().__init__()
        self.life, self.kernel = Life(), Kernel()
        self.records = Records(self.life)
        self.whole = {10}
        self.unique = 0
        self.sent: list[Request] = []
        self.taken: list[Request] = []
        self.start()

    def start(self) -> None:
        """A worker starts; what was taken and not answered is sent again. It may die of its start, too."""
        while True:
            self.taken = []
            again = list(self.sent)
            try:
                self.modes = IoModes(self.records.worker())
                for backing in self.modes.settle({request.unique for request in again}):
                    self.close(backing)
                if self.modes.registering:
                    following = self.register()
                    for backing in (*self.modes.lost(following), following):
                        self.close(backing)
                    self.modes.registering = False
                self.taken = again
                return
            except SystemExit:
                self.life.left = -1

    def close(self, backing: int) -> None:
        self.life.step()
        self.kernel.registered.discard(backing)
        self.life.step()

    def register(self) -> int:
        self.life.step()
        backing = self.kernel.register()
        self.life.step()
        return backing

    def answer(self, request: Request) -> None:
        """What the channel does with an answer of pyfuse3."""
        self.taken.remove(request)
        free = 0
        if request.opcode == "open":
            backing = self.modes.backing(request.ino)
            if backing is None:
                backing = 0
                if request.ino in self.whole:
                    self.modes.registering = True
                    backing = self.register()
            assert self.modes.opened(request.unique, request.ino, backing)
        else:
            backing, free = 0, self.modes.released(request.unique, request.ino)
        self.life.step()
        self.kernel.answered(request, backing)
        self.sent.remove(request)
        self.life.step()
        if free:
            self.close(free)
        self.modes.settled()

    def alive(self, does: Callable[[], None]) -> None:
        try:
            does()
        except SystemExit:
            self.life.left = -1
            self.start()

    @rule(ino=st.sampled_from(INODES))
    def open(self, ino: int) -> None:
        self.unique += 1
        self.kernel.unanswered.append(Request(self.unique, "open", ino))

    @precondition(lambda self: any(self.kernel.handles.values()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        sent = [(request.ino, request.backing) for request in self.kernel.unanswered if request.opcode == "release"]
        for ino, handles in self.kernel.handles.items():
            if len(handles) > sum(each == ino for each, _ in sent) and data.draw(st.booleans()):
                self.unique += 1
                self.kernel.unanswered.append(Request(self.unique, "release", ino, handles[0]))

    @rule()
    def read_one(self) -> None:
        """A worker takes a request that none had before."""
        new = [request for request in self.kernel.unanswered if request not in self.sent]
        if new:
            self.sent.append(new[0])
            self.taken.append(new[0])

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def answer_one(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.taken))
        self.alive(lambda: self.answer(request))

    @rule()
    def nobody_serves_for_too_long(self) -> None:
        """The keeper answers what waits (keeper/refuse.py), and then a worker comes again."""
        board, waiting = self.records.board, list(self.kernel.unanswered)
        unused = [put_back(board, {request.unique for request in waiting})]
        for request in waiting:
            self.kernel.unanswered.remove(request)
            if request.opcode == "release":
                self.kernel.handles[request.ino].remove(request.backing)
                unused.append(released(board, request.ino))
        self.kernel.registered -= set(unused)
        self.sent = []
        self.start()

    @rule(left=st.integers(0, 12))
    def die_soon(self, left: int) -> None:
        self.life.left = left

    @rule(ino=st.sampled_from(INODES), whole=st.booleans())
    def complete_or_evict(self, ino: int, whole: bool) -> None:
        (self.whole.add if whole else self.whole.discard)(ino)

    def teardown(self) -> None:
        """All requests are answered."""
        self.life.left = -1
        while self.kernel.unanswered:
            self.read_one()
            while self.taken:
                self.answer(self.taken[0])
        used = set()
        for ino in INODES:
            handles = self.kernel.handles.get(ino, [])
            assert self.modes.backing(ino) == (handles[0] if handles else None)
            assert self.records.worker().files().get(ino, (0, 0))[1] == len(handles)
            used |= set(handles) - {0}
        assert self.kernel.registered == used, "a backing file stays open that nobody uses"
        self.records.board.close()


Traffic.TestCase.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
TestTraffic = Traffic.TestCase
