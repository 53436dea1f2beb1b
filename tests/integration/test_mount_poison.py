"""A request that takes every worker down with it: it ends as EIO, and nobody else notices."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from helios.home import Home
from tests.support.mounts import MODES, Mount, fails, mounted, push, worker, write

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif("native" not in MODES, reason="native mounts need root and Linux 6.9"),
]

LONGEST_S = 200.0
SIZE = 100_000
SLOW = {f"slow-{number}.txt": bytes([number]) * SIZE for number in range(3)}
PLAIN = {f"plain-{number}.txt": bytes([16 + number]) * SIZE for number in range(6)}
FILES = {"crash.txt": b"c" * SIZE, "late.txt": b"l" * SIZE, "block.txt": b"b" * SIZE, **SLOW, **PLAIN}

POISON = """
import os, sys, time
if "HELIOS_KEEPER" in os.environ and "heliosfs" in sys.orig_argv:
    import trio
    import heliosfs.fuse.native as native
    import heliosfs.fetch.read as module
    read = module.Reads.read
    directory = {directory!r}
    async def poisoned(self, blob, reader, view, offset):
        name = blob.want.path
        if name in ("crash.txt", "late.txt", "block.txt") or name.startswith("slow"):
            with open(os.path.join(directory, name), "a") as file:
                file.write(str(os.getpid()) + "\\n")
        while not os.path.exists(os.path.join(directory, "go")):  # until all of them wait
            await trio.sleep(0.05)
        if name == "late.txt":
            await trio.sleep(1)
        if name in ("crash.txt", "late.txt"):
            os._exit(9)
        if name == "block.txt":
            time.sleep(3600)
        if name.startswith("slow"):
            await trio.sleep(4)
        await read(self, blob, reader, view, offset)
    module.Reads.read = poisoned
"""


class Scene:
    """A mount, and who reads what in it. ``workers(name)``: how many processes took a READ of that file."""

    def __init__(self, mount: Mount, directory: Path, threads: ThreadPoolExecutor) -> None:
        self.mount, self._directory, self._threads = mount, directory, threads

    def read(self, name: str) -> Future[bytes]:
        return self._threads.submit((self.mount.files / name).read_bytes)

    def ask(self, name: str) -> Future[bytes]:
        """One READ: past the page cache, for which the kernel asks again, page by page, what was an error."""
        return self._threads.submit(one_read, self.mount.files / name)

    def workers(self, name: str) -> int:
        path = self._directory / name
        return len(set(path.read_text().split())) if path.exists() else 0

    def go(self) -> None:
        (self._directory / "go").touch()


@pytest.fixture
def scene(helios_home: Home, tmp_path: Path, expected_log_errors: Callable[[str], None]) -> Iterator[Scene]:
    expected_log_errors("the worker ended")
    expected_log_errors("a request took several workers down")
    expected_log_errors("the worker hangs and is replaced")
    commit = push(helios_home, write(tmp_path / "model", FILES), "org/name")
    directory = tmp_path / "poison"
    write(directory, {"sitecustomize.py": POISON.format(directory=str(directory)).encode()})
    with ThreadPoolExecutor(len(FILES)) as threads:
        path = os.pathsep.join(filter(None, (str(directory), os.environ.get("PYTHONPATH"))))
        with mounted(helios_home, tmp_path / "mnt", PYTHONPATH=path) as mount:
            mount.files = mount.path / "org/name" / commit
            yield Scene(mount, directory, threads)


def one_read(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, 1 << 17) as buffer:
            return buffer[: os.preadv(fd, [buffer], 0)]
    finally:
        os.close(fd)


def is_eio(future: Future[bytes]) -> None:
    with fails(errno.EIO):
        future.result(LONGEST_S)


@pytest.mark.parametrize("order", ["poison first", "poison last"])
def test_others_that_wait_beside_it_get_their_bytes(scene: Scene, order: str, wait_for: Any) -> None:
    """Cold READs, slow ones and quick ones, are under way when the first worker dies; more come meanwhile."""
    names = [*SLOW, "crash.txt", *PLAIN][:: 1 if order == "poison last" else -1]
    first = worker(scene.mount)
    futures = {name: scene.ask(name) if name == "crash.txt" else scene.read(name) for name in names}
    wait_for(lambda: all(scene.workers(name) for name in ("crash.txt", *SLOW)), what="all of them to wait")
    scene.go()
    is_eio(futures.pop("crash.txt"))
    for name, future in futures.items():
        assert future.result(LONGEST_S) == FILES[name], name
    assert worker(scene.mount) != first
    assert scene.workers("crash.txt") == 3
    assert scene.mount.metric("helios_mount_resends_total") >= 1, "others came again"


def test_one_that_dies_after_a_while_is_found_too(scene: Scene, wait_for: Any) -> None:
    futures = {name: scene.ask(name) for name in (*SLOW, "late.txt")}
    wait_for(lambda: all(scene.workers(name) for name in futures), what="all of them to wait")
    scene.go()
    is_eio(futures.pop("late.txt"))
    for name, future in futures.items():
        assert future.result(LONGEST_S) == FILES[name], name


def test_one_that_blocks_its_worker_is_found_too(scene: Scene, wait_for: Any) -> None:
    """Whoever is alone when the loop is blocked stays alone until the keeper replaces the worker."""
    futures = {name: scene.ask(name) for name in ("slow-0.txt", "block.txt")}
    wait_for(lambda: all(scene.workers(name) for name in futures), what="both to wait")
    scene.go()
    is_eio(futures["block.txt"])
    assert futures["slow-0.txt"].result(LONGEST_S) == FILES["slow-0.txt"]


def test_who_comes_while_workers_die_is_served(scene: Scene, wait_for: Any) -> None:
    """Names are looked up and files are read all the time; none of that fails, or waits until the poison is found."""
    over, errors, rounds = threading.Event(), list[str](), [0]

    def use() -> None:
        while not over.is_set():
            for name in PLAIN:
                try:
                    if (scene.mount.files / name).read_bytes() != FILES[name]:
                        errors.append(name)
                    os.stat(scene.mount.path / "org" / f"missing-{rounds[0]}", follow_symlinks=False)
                except FileNotFoundError:
                    rounds[0] += 1
                except OSError as error:
                    errors.append(f"{name}: {error}")

    slow, crash = scene.read("slow-0.txt"), scene.ask("crash.txt")
    wait_for(lambda: scene.workers("slow-0.txt") and scene.workers("crash.txt"), what="both to wait")
    scene.go()
    user = threading.Thread(target=use)
    user.start()
    try:
        is_eio(crash)
        assert slow.result(LONGEST_S) == FILES["slow-0.txt"]
    finally:
        over.set()
        user.join(LONGEST_S)
    assert not user.is_alive()
    assert not errors
    assert rounds[0]
