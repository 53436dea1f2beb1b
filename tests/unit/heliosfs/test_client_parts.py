"""The client's parts by themselves: the portal, descriptors, calls, an index of tensors."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from helios.errors import DeadlineExceeded, InvalidInput, Unavailable
from heliosfs.client.buffers import Descriptor
from heliosfs.client.calls import Calls
from heliosfs.client.index import INDEX, list_tensors, read_index
from heliosfs.client.portal import Portal
from heliosfs.client.routes import MountRoute, SharedRoute
from heliosfs.client.values import Closed, TensorInfo

MIB = 1 << 20


@asynccontextmanager
async def nothing() -> AsyncIterator[str]:
    yield "value"


@pytest.mark.parametrize("seed", range(8))
def test_every_call_ends_whenever_the_portal_does(seed: int) -> None:
    """With its value, or with Closed; none hangs."""
    own = random.Random(seed)
    portal = Portal("test-portal")
    assert portal.open(nothing) == "value"
    outcomes: list[object] = []

    def work() -> None:
        for number in range(300):

            async def answer(number: int = number) -> int:
                await trio.sleep(own.choice([0, 0, 0.001, 100]) if number == 299 else 0)
                return number

            try:
                outcomes.append(portal.call(answer) == number)
            except Closed as error:
                outcomes.append(error)
                return

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(own.uniform(0, 0.1))
    portal.close()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert all(outcome is True or isinstance(outcome, Closed) for outcome in outcomes)


def test_an_opening_that_fails_is_raised_and_leaves_no_thread() -> None:
    @asynccontextmanager
    async def broken() -> AsyncIterator[None]:
        raise Unavailable("broken")
        yield

    portal = Portal("test-portal")
    with pytest.raises(Unavailable, match="broken"):
        portal.open(broken)
    portal.close()
    assert not any(thread.name == "test-portal" for thread in threading.enumerate())


def test_a_call_on_its_own_loop_is_refused() -> None:
    portal = Portal("test-portal")
    portal.open(nothing)

    async def inner() -> None:
        portal.call(inner)

    with pytest.raises(RuntimeError, match="wait for itself"):
        portal.call(inner)
    portal.close()


@pytest.fixture
def content(tmp_path: Path) -> Path:
    path = tmp_path / "content"
    path.write_bytes(random.Random(1).randbytes(3 * MIB))
    return path


def opened(path: Path, size: int | None = None) -> Descriptor:
    return Descriptor(os.open(path, os.O_RDONLY), "content", path.stat().st_size if size is None else size)


def test_close_while_threads_read(content: Path) -> None:
    """Other files take the descriptor's number at once: nobody ever reads those."""
    data = content.read_bytes()
    other = content.with_name("other")
    other.write_bytes(bytes(3 * MIB))
    wrong: list[int] = []
    for _ in range(30):
        descriptor = opened(content)

        def read(descriptor: Descriptor = descriptor) -> None:
            buffer = memoryview(bytearray(MIB))
            while True:
                try:
                    descriptor.read_into(buffer, MIB)
                except Closed:
                    return
                if buffer != data[MIB : 2 * MIB]:
                    wrong.append(1)

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        descriptor.close()
        fds = [os.open(other, os.O_RDONLY) for _ in range(4)]
        for thread in threads:
            thread.join(10)
        for fd in fds:
            os.close(fd)
    assert not wrong


def test_a_descriptor_says_what_is_wrong(content: Path) -> None:
    descriptor = opened(content, 4 * MIB)
    with pytest.raises(Unavailable, match="shorter than it should be"):
        descriptor.read_into(memoryview(bytearray(MIB)), 3 * MIB - 10)
    with pytest.raises(DeadlineExceeded, match="before the deadline"):
        descriptor.read_into(memoryview(bytearray(10)), 0, time.monotonic() - 1)
    descriptor.close()
    descriptor.close()
    with pytest.raises(Closed):
        descriptor.fileno()


@pytest.mark.trio
async def test_calls_end_by_deadline_and_by_close() -> None:
    calls = Calls("it")
    with pytest.raises(DeadlineExceeded, match=r"it: the wait was not done within 0\.05 s"):
        await calls.run("the wait", 0.05, trio.sleep_forever)
    caught = []

    async def wait() -> None:
        try:
            await calls.run("the wait", None, trio.sleep_forever)
        except Closed as error:
            caught.append(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        await calls.close()
    assert len(caught) == 2
    with pytest.raises(Closed):
        await calls.run("more", None, trio.sleep_forever)


@pytest.mark.trio
async def test_a_mount_that_hangs_gives_way_to_the_store(tmp_path: Path, content: Path) -> None:
    """A pipe stands for a mount that opens and never answers; its thread gets its bytes late, and nobody takes them."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    held = os.open(fifo, os.O_RDWR)

    class Pipe(Descriptor):
        def read_into(self, view: memoryview, offset: int, until: float = float("inf")) -> None:
            os.readv(held, [view])

    class Own:
        closed = False

        async def read_into(self, offset: int, view: memoryview) -> int:
            view[:] = content.read_bytes()[offset : offset + len(view)]
            return len(view)

        def local_fd(self) -> int | None:
            return None

        async def close(self) -> None:
            self.closed = True

    own, opens = Own(), []

    async def open_own() -> Own:
        opens.append(1)
        return own

    pipe = Pipe(os.open(content, os.O_RDONLY), "pipe", 3 * MIB)
    route = SharedRoute(MountRoute(pipe, 0.2, trio.CapacityLimiter(4)), open_own)
    views = [bytearray(100), bytearray(100)]
    async with trio.open_nursery() as nursery:
        for view in views:
            nursery.start_soon(route.read_into, 1000, memoryview(view))
    os.write(held, b"\xaa" * 200)
    await trio.sleep(0.1)
    assert [bytes(view) for view in views] == [content.read_bytes()[1000:1100]] * 2
    assert opens == [1]
    await route.close()
    assert own.closed
    os.close(held)


NAMES = st.text("abc./", min_size=1, max_size=5)


@given(weight_map=st.dictionaries(NAMES, NAMES, max_size=5), files=st.sets(NAMES, max_size=5))
def test_an_index_names_files_that_are_there_or_is_refused(weight_map: dict[str, str], files: set[str]) -> None:
    data = ('{"weight_map": {' + ", ".join(f'"{n}": "{f}"' for n, f in weight_map.items()) + "}}").encode()
    if set(weight_map.values()) <= files:
        assert read_index(data, INDEX, files) == weight_map
    else:
        with pytest.raises(InvalidInput, match="files that are not there"):
            read_index(data, INDEX, files)


@pytest.mark.parametrize("data", [b"", b"[]", b'{"weight_map": {"a": 5}}', b"[" * 100_000, b"\xff"])
def test_what_is_no_index_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidInput, match="is not an index of tensors"):
        read_index(data, INDEX, {"a"})


def test_tensors_of_one_name_in_two_files_are_refused() -> None:
    tensor = TensorInfo("w", "U8", (1,), 1, "a", 10)
    assert list_tensors({"a": [tensor]}, {"w": "a"}) == {"w": tensor}
    with pytest.raises(InvalidInput, match="'w' is in a and in b"):
        list_tensors({"a": [tensor], "b": [tensor]}, {})
    with pytest.raises(InvalidInput, match="'w' is in b, but it is not there"):
        list_tensors({"a": [tensor]}, {"w": "b"})
