"""The loader's pipeline and staging ring: order, bounds, errors, deadlines; on destinations and a device of ours."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helios.errors import DeadlineExceeded
from heliosfs.loader.pipeline import Limits, deliver
from heliosfs.loader.staging import Ring


class Room:
    """Ranges of the test: which bytes of each were filled, how many bytes were open and not delivered at most."""

    def __init__(self, fill: Callable[[int, int], None] = lambda *_: None) -> None:
        self.open_bytes = self.most = 0
        self.filled: dict[int, list[tuple[int, int]]] = {}
        self.fill = fill
        self.lock = threading.Lock()
        self.threads: set[int] = set()
        self.ready: set[int] = set()

    def open(self, number: int, nbytes: int) -> Filled:
        self.open_bytes += nbytes
        self.most = max(self.most, self.open_bytes)
        return Filled(self, number, nbytes)


class Filled:
    def __init__(self, room: Room, number: int, nbytes: int) -> None:
        self.room, self.number, self.nbytes = room, number, nbytes

    def ready(self) -> bool:
        return self.number in self.room.ready

    def fill(self, start: int, stop: int) -> None:
        self.room.fill(self.number, start)
        with self.room.lock:
            self.room.threads.add(threading.get_ident())
            self.room.filled.setdefault(self.number, []).append((start, stop))


def limits(threads: int = 2, ahead: int = 100, part: int = 10, stall_s: float = 30.0) -> Limits:
    return Limits(threads, ahead, part, stall_s)


def names() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("helios-loader-")]


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 300), max_size=12),
    threads=st.integers(1, 4),
    ahead=st.integers(0, 400),
    part=st.integers(1, 120),
    ready=st.sets(st.integers(0, 11)),
)
def test_ranges_come_in_order_whole_and_within_bounds(sizes, threads, ahead, part, ready):
    room = Room()
    room.ready = ready
    ranges = [(nbytes, partial(room.open, number, nbytes)) for number, nbytes in enumerate(sizes)]
    seen = []
    for filled in deliver(ranges, limits(threads, ahead, part)):
        parts = sorted(room.filled.get(filled.number, []))
        assert [start for start, _ in parts] == [0, *(stop for _, stop in parts)][: len(parts)]  # no gap, no overlap
        assert (parts[-1][1] if parts else 0) == (0 if filled.number in ready else filled.nbytes)
        assert all(stop - start <= part for start, stop in parts)
        seen.append(filled.number)
        room.open_bytes -= filled.nbytes
    assert seen == list(range(len(sizes)))
    # What was opened after a delivery was opened before the test could count that delivery: hence one range more.
    assert room.most <= max(ahead, max(sizes, default=0)) + max(sizes, default=0)
    assert not names()


def test_later_ranges_are_filled_while_the_user_is_busy():
    room, third = Room(), threading.Event()
    room.fill = lambda number, _: third.set() if number == 2 else None
    ranges = [(10, partial(room.open, number, 10)) for number in range(5)]
    delivered = deliver(ranges, limits(ahead=20))
    next(delivered)
    assert third.wait(10)  # nobody asked for it yet
    assert 4 not in room.filled
    delivered.close()


def test_parts_of_one_range_are_filled_by_several_threads_at_once():
    meet = threading.Barrier(3)
    room = Room(lambda *_: (meet.wait(20), None)[1])
    assert len(list(deliver([(30, partial(room.open, 0, 30))], limits(threads=3)))) == 1
    assert len(room.threads) == 3


def test_what_is_there_has_no_threads():
    room = Room()
    room.ready = {0, 1}
    for _ in deliver([(30, partial(room.open, number, 30)) for number in range(2)], limits()):
        assert not names()
    assert room.filled == {}


def test_an_error_ends_the_load_with_it():
    def fill(number: int, start: int) -> None:
        if (number, start) == (1, 20):
            raise OSError("rotten")

    room = Room(fill)
    ranges = [(50, partial(room.open, number, 50)) for number in range(40)]
    with pytest.raises(OSError, match="rotten"):
        list(deliver(ranges, limits()))
    assert len(room.filled) < 40
    assert not names()


def test_a_user_who_stops_leaves_no_thread():
    room = Room(lambda *_: time.sleep(0.001))
    delivered = deliver([(50, partial(room.open, number, 50)) for number in range(40)], limits())
    next(delivered)
    delivered.close()
    assert not names()
    assert len(room.filled) < 40


def test_a_disk_that_says_nothing_is_an_error_after_a_while(monkeypatch, caplog):
    """The thread that waits for it is left alone; the load is not."""
    monkeypatch.setattr("heliosfs.loader.pipeline.END_S", 0.05)
    answer = threading.Event()
    room = Room(lambda *_: (answer.wait(60), None)[1])
    with pytest.raises(DeadlineExceeded, match=r"could be read for 0\.2 s"):
        list(deliver([(5, partial(room.open, 0, 5))], limits(threads=1, stall_s=0.2)))
    assert "they are left alone" in caplog.text
    answer.set()
    for thread in threading.enumerate():
        if thread.name.startswith("helios-loader-"):
            thread.join(10)
    assert not names()


def test_a_slow_disk_is_no_silent_one():
    """Each part takes nearly as long as may pass without any; all of them much longer."""
    room = Room(lambda *_: time.sleep(0.1))
    assert len(list(deliver([(50, partial(room.open, 0, 50))], limits(threads=1, stall_s=2.0)))) == 1


class Copy:
    """A copy that has ended when the test's clock says so."""

    def __init__(self, clock: Clock, ends: float) -> None:
        self.clock, self.ends = clock, ends

    def query(self) -> bool:
        return self.clock.now >= self.ends


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Plain:
    """Buffers are numbered; the rest is never asked."""

    def __init__(self) -> None:
        self.made = 0

    def staging(self, nbytes: int) -> int:
        self.made += 1
        return self.made

    def view(self, staging: int) -> memoryview:
        return memoryview(bytearray(8))

    memory = upload = hand_over = None


def ring(clock: Clock, count: int = 3, stall_s: float = 5.0) -> Ring:
    device: Any = Plain()
    return Ring(device, count, 8, stall_s, clock, clock.sleep)


def test_buffers_come_in_turn_each_after_its_own_copy():
    clock = Clock()
    buffers, order = ring(clock), []
    for turn in range(6):
        with buffers.buffer() as buffer:
            assert buffer.busy is None
            order.append((buffer.staging, round(clock.now)))
            buffer.busy = Copy(clock, clock.now + 1)  # type: ignore[assignment]
        clock.now += 0.25 * (turn % 2)
    assert [number for number, _ in order] == [1, 2, 3, 1, 2, 3]
    assert [at for _, at in order[:3]] == [0, 0, 0]  # the first round waits for nothing
    assert order[3][1] == 1  # the second for the copy of the buffer that it takes


def test_a_copy_that_never_ends_is_an_error():
    clock = Clock()
    buffers = ring(clock, count=1)
    with buffers.buffer() as buffer:
        buffer.busy = Copy(clock, 1e9)  # type: ignore[assignment]
    with pytest.raises(DeadlineExceeded, match="a copy to the device took more than 5 s"), buffers.buffer():
        pass
    assert 5 <= clock.now < 6


def test_a_buffer_that_is_kept_is_an_error_for_the_next():
    buffers = ring(Clock(), count=1, stall_s=0.05)
    with buffers.buffer(), pytest.raises(DeadlineExceeded, match="no staging buffer came back"), buffers.buffer():
        pass
    with buffers.buffer() as buffer:  # it is back now
        assert buffer.staging == 1


def test_a_reader_that_fails_gives_its_buffer_back():
    buffers = ring(Clock(), count=1, stall_s=0.05)
    with pytest.raises(OSError, match="rotten"), buffers.buffer():
        raise OSError("rotten")
    with buffers.buffer():
        pass


def test_draining_waits_for_every_copy():
    clock = Clock()
    buffers = ring(clock)
    for ends in (3.0, 1.0, 2.0):
        with buffers.buffer() as buffer:
            buffer.busy = Copy(clock, ends)  # type: ignore[assignment]
    buffers.drain()
    assert clock.now >= 3
