"""A native mount outlives whatever serves it: killed, hung, crashed and upgraded workers, and its keeper."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import mmap
import os
import random
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helios.home import Home
from helios.mounts import find_mount, state_of
from helios.process import ProcessId
from heliosfs.fuse.backing import BACKING_CLOSE
from heliosfs.fuse.tables import open_files
from heliosfs.keeper.board import CHANGE, Board
from tests.support.mounts import MODES, Mount, fails, mounted, next_worker, push, run, worker, write

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif("native" not in MODES, reason="native mounts need root and Linux 6.9"),
]

MIB = 1 << 20
PIDFD_GETFD = 438
FILES = {f"part-{n}.bin": random.Random(n).randbytes(24 * MIB + n) for n in range(3)} | {"config.json": b"{}"}
PATHS = [path for path in (os.environ.get("PYTHONPATH"),) if path]
DIGESTS = {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}


@pytest.fixture
def mount(helios_home: Home, tmp_path: Path) -> Iterator[Mount]:
    commit = push(helios_home, write(tmp_path / "model", FILES), "org/name")
    with mounted(helios_home, tmp_path / "mnt", HELIOS_MOUNT__MODE="native") as mount:
        mount.files = mount.path / "org/name" / commit
        yield mount


class Readers:
    """Threads that read everything again and again, by read and by mmap, past the page cache where they can."""

    def __init__(self, files: Path, count: int) -> None:
        self._files, self._over = files, threading.Event()
        self.errors: list[str] = []
        self.rounds = 0
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(count)]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        names = sorted(DIGESTS)
        while not self._over.is_set():
            name = names[number % len(names)]
            number += 1
            try:
                path = self._files / name
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    if number % 4 or not path.stat().st_size:
                        found = hashlib.file_digest(file, "sha256").hexdigest()
                    else:
                        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
                            found = hashlib.sha256(view).hexdigest()
                if found != DIGESTS[name]:
                    self.errors.append(f"{name}: {found}")
                self.rounds += 1
            except OSError as error:
                self.errors.append(f"{name}: {error}")

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "a reader hangs"


@contextlib.contextmanager
def readers(mount: Mount, count: int = 4) -> Iterator[Readers]:
    reading = Readers(mount.files, count)
    try:
        yield reading
    finally:
        reading.stop()
    assert reading.errors == []
    assert reading.rounds >= count


def test_whole_files_are_read_by_the_kernel(mount: Mount, wait_for: Any) -> None:
    for name in FILES:
        (mount.files / name).read_bytes()
    wait_for(lambda: mount.metric("helios_mount_fills") == 0, what="the files to be whole")
    (mount.files / "part-0.bin").read_bytes()  # the inode may have been open while it was filled
    before = mount.reads()
    for name, data in FILES.items():
        assert (mount.files / name).read_bytes() == data
    assert mount.reads() == before
    assert mount.metric("helios_mount_passthrough_opens_total") >= len(FILES)


def test_the_kernel_keeps_listings_that_never_change_and_no_others(mount: Mount) -> None:
    def asked() -> float:
        return mount.metric("helios_mount_operation_seconds_count", operation="readdir")

    assert sorted(os.listdir(mount.files)) == sorted(FILES)
    before = asked()
    for _ in range(3):
        assert sorted(os.listdir(mount.files)) == sorted(FILES)
    assert asked() == before
    serving = worker(mount)
    serving.send(signal.SIGKILL)
    next_worker(mount, serving)
    assert sorted(os.listdir(mount.files)) == sorted(FILES)
    before = asked()
    os.listdir(mount.files.parent)
    os.listdir(mount.files.parent)
    assert asked() >= before + 2


def test_one_inode_opened_twice_and_while_it_fills(mount: Mount) -> None:
    """safetensors opens each file twice; a file that was open before it was whole stays as it is until it is closed."""
    path = mount.files / "part-1.bin"
    with path.open("rb") as first:
        assert first.read(100) == FILES["part-1.bin"][:100]
        with path.open("rb") as second, path.open("rb") as third:
            assert second.read() == third.read() == FILES["part-1.bin"]
        assert first.read() == FILES["part-1.bin"][100:]
    with path.open("rb") as first, path.open("rb") as second:
        assert first.read() == second.read() == FILES["part-1.bin"]


def test_readers_see_nothing_of_killed_workers(mount: Mount) -> None:
    serving = worker(mount)
    with readers(mount):
        for number in range(6):
            time.sleep(0.3 + 0.1 * number)
            serving.send(signal.SIGKILL)
            serving = next_worker(mount, serving)
    assert mount.files.joinpath("config.json").read_bytes() == b"{}"


def test_open_files_and_directories_go_on(mount: Mount) -> None:
    name = "part-2.bin"
    with (mount.files / name).open("rb", buffering=0) as file, os.scandir(mount.files) as entries:
        first = next(entries).name
        assert file.read(10) == FILES[name][:10]
        serving = worker(mount)
        inode = os.fstat(file.fileno()).st_ino
        serving.send(signal.SIGKILL)
        next_worker(mount, serving)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(file.fileno(), 100, 20 * MIB) == FILES[name][20 * MIB : 20 * MIB + 100]
        assert os.stat(mount.files / name).st_ino == inode
        assert {first, *(entry.name for entry in entries)} == set(FILES)


def test_a_stopped_worker_is_replaced(mount: Mount, expected_log_errors: Any) -> None:
    expected_log_errors("the worker hangs and is replaced")
    expected_log_errors("the worker ended")
    serving = worker(mount)
    serving.send(signal.SIGSTOP)
    begin = time.monotonic()
    assert hashlib.sha256((mount.files / "part-0.bin").read_bytes()).hexdigest() == DIGESTS["part-0.bin"]
    assert time.monotonic() - begin < 40
    assert not serving.alive()


def test_an_upgrade_disturbs_nobody(mount: Mount) -> None:
    state = state_of(mount.home, mount.path)
    assert state is not None
    with readers(mount, 2):
        time.sleep(0.3)
        serving = worker(mount)
        shown = json.loads(run(mount.home, "mount", "--upgrade", mount.path, "--json").stdout)
        assert ProcessId(**shown["worker"]) == worker(mount) != serving
        assert not serving.alive()
        time.sleep(0.3)
    assert state.process.alive(), "the keeper stays"


def test_a_killed_keeper_is_replaced_by_the_worker(mount: Mount, wait_for: Any) -> None:
    state = state_of(mount.home, mount.path)
    assert state is not None
    with readers(mount, 2):
        time.sleep(0.3)
        state.process.send(signal.SIGKILL)
        wait_for(lambda: worker_keeper(mount) != state.pid, timeout_s=20, what="another keeper")
        serving = worker(mount)
        serving.send(signal.SIGKILL)  # and that one replaces the worker
        next_worker(mount, serving)
        time.sleep(0.3)
    run(mount.home, "umount", mount.path)
    assert find_mount(mount.path) is None
    assert not serving.alive()


def worker_keeper(mount: Mount) -> int:
    state = state_of(mount.home, mount.path)
    assert state is not None
    return state.pid


def test_everything_killed_leaves_nothing_that_hangs(mount: Mount) -> None:
    state = state_of(mount.home, mount.path)
    assert state is not None
    serving = worker(mount)
    state.process.send(signal.SIGSTOP)  # neither may start the other again
    serving.send(signal.SIGKILL)
    state.process.send(signal.SIGKILL)
    assert state.process.wait(10)
    with fails(errno.ENOTCONN, errno.ECONNABORTED):
        os.listdir(mount.path)
    again = json.loads(run(mount.home, "mount", mount.path, "--json").stdout)
    assert again["mode"] in MODES
    assert (mount.files / "config.json").read_bytes() == b"{}"


POISON = """
import os, sys, time
if "HELIOS_KEEPER" in os.environ and "heliosfs" in sys.orig_argv:
    import heliosfs.fetch.read as module
    read = module.Reads.read
    async def poisoned(self, blob, reader, view, offset):
        if blob.want.path == "crash.txt":
            os._exit(9)
        if blob.want.path == "block.txt" and not os.path.exists({marker!r}):
            open({marker!r}, "w").close()
            time.sleep(3600)
        await read(self, blob, reader, view, offset)
    module.Reads.read = poisoned
"""


@pytest.fixture
def poisoned(helios_home: Home, tmp_path: Path) -> Iterator[Mount]:
    """A mount whose workers die of reading one file, and stop at the first READ of another.

    Neither is a weight file: those are filled as soon as they are open, and a READ may find its bytes there.
    """
    files = {"crash.txt": b"c" * 100_000, "block.txt": b"b" * 100_000, "good.bin": FILES["part-0.bin"]}
    commit = push(helios_home, write(tmp_path / "model", files), "org/name")
    write(tmp_path / "poison", {"sitecustomize.py": POISON.format(marker=str(tmp_path / "blocked")).encode()})
    with mounted(helios_home, tmp_path / "mnt", PYTHONPATH=str(tmp_path / "poison")) as mount:
        mount.files = mount.path / "org/name" / commit
        yield mount


def test_a_read_that_takes_three_workers_down_is_eio(poisoned: Mount, expected_log_errors: Any) -> None:
    expected_log_errors("the worker ended")
    expected_log_errors("a request took several workers down")
    with (poisoned.files / "good.bin").open("rb") as good:
        first = good.read(MIB)
        with fails(errno.EIO):
            (poisoned.files / "crash.txt").read_bytes()
        assert first + good.read() == FILES["part-0.bin"]
    assert (poisoned.files / "good.bin").read_bytes() == FILES["part-0.bin"]


def test_a_worker_whose_loop_is_blocked_is_replaced(poisoned: Mount, expected_log_errors: Any) -> None:
    expected_log_errors("the worker hangs and is replaced")
    expected_log_errors("the worker ended")
    serving = worker(poisoned)
    assert (poisoned.files / "block.txt").read_bytes() == b"b" * 100_000
    assert next_worker(poisoned, serving) != serving


MUTE = """
import os, sys, time
if "HELIOS_KEEPER" in os.environ and "heliosfs" in sys.orig_argv:
    import heliosfs.fuse.protocol as protocol
    kept = protocol.with_listing_kept
    def once(reply):
        if not os.path.exists({marker!r}):
            open({marker!r}, "w").close()
            time.sleep(3600)
        return kept(reply)
    protocol.with_listing_kept = once
"""


def test_a_worker_whose_thread_for_replies_is_blocked_is_replaced(
    helios_home: Home, tmp_path: Path, expected_log_errors: Any
) -> None:
    """The loop and the other thread go on: without a sign of life of its own it would be found by a request's age."""
    expected_log_errors("the worker hangs and is replaced")
    expected_log_errors("the worker ended")
    commit = push(helios_home, write(tmp_path / "model", {"a": b"a"}), "org/name")
    write(tmp_path / "mute", {"sitecustomize.py": MUTE.format(marker=str(tmp_path / "blocked")).encode()})
    with mounted(helios_home, tmp_path / "mnt", PYTHONPATH=os.pathsep.join([str(tmp_path / "mute"), *PATHS])) as mount:
        assert os.listdir(mount.path / "org/name" / commit) == ["a"]
        assert (tmp_path / "blocked").exists()
        assert "its channel gave no sign of life" in mount.log()


BAD_DISK = """
import os, sys
if "HELIOS_KEEPER" in os.environ and "heliosfs" in sys.orig_argv:
    import types
    from heliosfs.fuse import disk_threads, reads
    def refuse(*args):
        raise OSError(5, "Input/output error")
    for module in (disk_threads, reads):
        module.os = types.SimpleNamespace(**{**vars(os), "preadv": refuse})
"""


def test_a_disk_that_refuses_the_channel_is_asked_once_more_by_the_loop(
    helios_home: Home, tmp_path: Path, wait_for: Any
) -> None:
    commit = push(helios_home, write(tmp_path / "model", FILES), "org/name")
    write(tmp_path / "broken", {"sitecustomize.py": BAD_DISK.encode()})
    with mounted(
        helios_home, tmp_path / "mnt", PYTHONPATH=os.pathsep.join([str(tmp_path / "broken"), *PATHS])
    ) as mount:
        name = "part-0.bin"
        with (mount.path / "org/name" / commit / name).open("rb", buffering=0) as file:
            assert file.read(100) == FILES[name][:100]
            wait_for(lambda: mount.metric("helios_mount_fills") == 0, what="the file to be whole")
            serving = worker(mount)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(file.fileno(), MIB, 20 * MIB) == FILES[name][20 * MIB : 21 * MIB]
            assert worker(mount) == serving, "the mount goes on with the same process"
        assert "a cached file can't be read" in mount.log()


DEATHS = """
import os, sys
if "HELIOS_KEEPER" in os.environ and "heliosfs" in sys.orig_argv:
    from heliosfs.fuse.backing import Backings
    from heliosfs.fuse.modes import IoModes
    def once(name):
        marker = os.path.join({markers!r}, name)
        if not os.path.exists(marker):
            open(marker, "w").close()
            os._exit(9)
    register, opened, close = Backings.register, IoModes.opened, Backings.close
    def registered(self, fd):
        backing = register(self, fd)
        if backing:
            once("registered")
        return backing
    def recorded(self, unique, ino, backing):
        done = opened(self, unique, ino, backing)
        if backing:
            once("recorded")
        return done
    def closing(self, *ids):
        after_record = os.path.exists(os.path.join({markers!r}, "recorded")) and not self._modes.registering
        if any(ids) and after_record:
            once("closing")
        close(self, *ids)
    Backings.register, IoModes.opened, Backings.close = registered, recorded, closing
"""


def test_no_backing_file_stays_registered_wherever_workers_die(
    helios_home: Home, tmp_path: Path, expected_log_errors: Any, wait_for: Any
) -> None:
    """Between the kernel's call and its record, between record and answer, between the last answer and the close."""
    expected_log_errors("the worker ended")
    commit = push(helios_home, write(tmp_path / "model", FILES), "org/name")
    markers = tmp_path / "markers"
    markers.mkdir()
    write(tmp_path / "poison", {"sitecustomize.py": DEATHS.format(markers=str(markers)).encode()})
    path = f"{tmp_path}/poison:{os.environ.get('PYTHONPATH', '')}"
    with mounted(helios_home, tmp_path / "mnt", PYTHONPATH=path) as m:
        m.files = m.path / "org/name" / commit
        with (m.files / "part-0.bin").open("rb") as file:
            file.read()  # before it is whole it has no backing file
            wait_for(lambda: m.metric("helios_mount_fills") == 0, what="the files to be whole")
        for name, data in FILES.items():
            assert (m.files / name).read_bytes() == data
        wait_for(lambda: len(os.listdir(markers)) == 3, what="the deaths")
        assert (m.files / "part-0.bin").read_bytes() == FILES["part-0.bin"]  # the last worker has closed what it found
        board = board_of(m)
        wait_for(lambda: not len(open_files(board)) and not board.words[CHANGE], what="the last RELEASE")
        board.close()
        assert registered_backings(m) == []


def board_of(mount: Mount) -> Board:
    state = state_of(mount.home, mount.path)
    assert state is not None
    fd = next(fd for fd in Path(f"/proc/{state.pid}/fd").iterdir() if "helios-board" in os.readlink(fd))
    return Board(os.open(fd, os.O_RDWR | os.O_CLOEXEC))


def registered_backings(mount: Mount) -> list[int]:
    """The backing ids that the kernel knows; they are closed."""
    state = state_of(mount.home, mount.path)
    assert state is not None
    pidfd = os.pidfd_open(state.pid)
    links = {int(fd.name): os.readlink(fd) for fd in Path(f"/proc/{state.pid}/fd").iterdir()}
    device = next(number for number, target in links.items() if target == "/dev/fuse")
    fd = ctypes.CDLL(None, use_errno=True).syscall(PIDFD_GETFD, pidfd, device, 0)
    found = []
    try:
        for backing in range(1, 30):
            with contextlib.suppress(FileNotFoundError):
                fcntl.ioctl(fd, BACKING_CLOSE, struct.pack("<I", backing))
                found.append(backing)
    finally:
        os.close(fd)
        os.close(pidfd)
    return found


def test_no_request_is_lost_in_the_foreground_mode(helios: Any, helios_home: Home, tmp_path: Path) -> None:
    commit = push(helios_home, write(tmp_path / "model", {"a": b"x"}), "org/name")
    mnt = tmp_path / "mnt"
    process = helios.start("mount", "--foreground", "--json", mnt, env={"HELIOS_MOUNT__MODE": "native"})
    assert json.loads(process.stdout.readline())["mode"] == "native"
    assert (mnt / "org/name" / commit / "a").read_bytes() == b"x"
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert find_mount(mnt) is None
    assert not subprocess.run(["pgrep", "-f", f"heliosfs.*{mnt}"], check=False, capture_output=True).stdout


def test_what_is_open_since_an_earlier_worker_is_not_evicted(mount: Mount, wait_for: Any) -> None:
    name = "part-1.bin"
    (mount.files / name).read_bytes()
    wait_for(lambda: mount.metric("helios_mount_fills") == 0, what="the files to be whole")
    cached = mount.home.cache / "blobs" / DIGESTS[name][:2] / DIGESTS[name]
    with (mount.files / name).open("rb") as file:
        serving = worker(mount)
        serving.send(signal.SIGKILL)
        next_worker(mount, serving)
        wait_for(lambda: mount.metric("helios_mount_inherited_files") == 1, what="the new worker to hold it")
        run(mount.home, "evict", "org/name", "--mount", mount.path)
        assert cached.exists()
        assert file.read() == FILES[name]
    wait_for(lambda: mount.metric("helios_mount_inherited_files") == 0, what="it to be let go")
    run(mount.home, "evict", "org/name", "--mount", mount.path)
    wait_for(lambda: not cached.exists(), what="it to be evicted")
    assert (mount.files / name).read_bytes() == FILES[name]


@pytest.mark.parametrize(("trio", "code"), [("import time; time.sleep(60)", 130), ("raise SystemError('no trio')", 1)])
def test_a_foreground_mount_that_does_not_come_up_leaves_nothing(
    helios: Any, tmp_path: Path, wait_for: Any, trio: str, code: int
) -> None:
    mnt = tmp_path / "mnt"
    write(tmp_path / "broken", {"trio.py": trio.encode()})
    environ = {"HELIOS_MOUNT__MODE": "native", "PYTHONPATH": str(tmp_path / "broken")}
    process = helios.start("mount", "--foreground", mnt, env=environ)
    if code == 130:
        wait_for(lambda: find_mount(mnt) is not None, what="the keeper to mount")
        process.send_signal(signal.SIGINT)
    assert process.wait(30) == code
    assert find_mount(mnt) is None
    assert not mnt.exists()
