"""A keeper with a real mount for tests, and the raw worker (tests/support/raw_worker.py) that serves one file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from helios.mounts import detach, find_mount
from heliosfs.fuse.attach import NAME
from heliosfs.keeper import wire
from heliosfs.keeper.board import Board

SUPPORT = Path(__file__).resolve().parent
MIB = 1 << 20

NAMESPACE = ("unshare", "--pid", "--fork", "--kill-child")
"""What a container is here: pids of its own, and nobody else's; mounts are seen everywhere."""


class Kept:
    """A mount with a keeper; whatever it started is ended by pid."""

    def __init__(self, directory: Path, size: int) -> None:
        self.mountpoint, self.faults, self.backing = directory / "m", directory / "faults", directory / "backing"
        self.socket, self.pid_file, self.log = directory / "k.sock", directory / "worker.pid", directory / "log"
        self.mountpoint.mkdir()
        self.faults.mkdir()
        data = random.Random(7).randbytes(size)
        self.backing.write_bytes(data)
        self.digest = hashlib.sha256(data).hexdigest()
        self.file = self.mountpoint / "file"
        self.keepers: list[subprocess.Popen[bytes]] = []
        self.others: list[subprocess.Popen[bytes]] = []
        self.workers: set[int] = set()
        self._boards: dict[int, Board] = {}
        """By the number of their memory's inode."""
        self.worker_argv = [sys.executable, str(SUPPORT / "raw_worker.py"), str(self.backing), str(self.faults)]

    def start(self, *options: str, spawn: bool = True, within: Sequence[str] = ()) -> dict[str, object]:
        """Start a keeper; returns what it says on its pipe (without a spawned worker: nothing)."""
        read_fd, write_fd = os.pipe()
        command = [sys.executable, "-P", "-m", "heliosfs.keeper", str(self.mountpoint), "--socket", str(self.socket)]
        command += ["--worker-pid-file", str(self.pid_file), "--ready-fd", str(write_fd), *options]
        command += ["--", *self.worker_argv] if spawn else ["--external"]
        with self.log.open("ab") as log:
            self.keepers.append(subprocess.Popen([*within, *command], stderr=log, pass_fds=[write_fd]))
        os.close(write_fd)
        with os.fdopen(read_fd, "rb") as pipe:
            if not spawn:
                self.wait(lambda: (self.listens() and find_mount(self.mountpoint)) or self.keeper.poll() is not None)
                return {}
            assert select.select([pipe], [], [], 30)[0], "the keeper says nothing"
            answer: dict[str, object] = json.loads(pipe.readline() or b"{}")
        if "state" in answer:
            self.worker()
        return answer

    @property
    def keeper(self) -> subprocess.Popen[bytes]:
        return self.keepers[-1]

    def worker(self) -> int:
        """The present worker's pid."""
        pid = int(self.pid_file.read_text())
        self.workers.add(pid)
        return pid

    def next_worker(self, last: int) -> int:
        self.wait(lambda: self.pid_file.exists() and self.worker() != last)
        return self.worker()

    def listens(self) -> bool:
        """Whether the latest keeper does."""
        pid, inodes = inner(self.keeper), set()
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            inodes |= {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()}
        table = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
        return any(row[-1].startswith(str(self.socket)) and f"socket:[{row[6]}]" in inodes for row in table)

    def start_worker(self, name: str = "", within: Sequence[str] = (), **environ: str) -> subprocess.Popen[bytes]:
        """Start a worker as somebody else than the keeper does."""
        environ = {**os.environ, wire.ENVIRON: str(self.socket), NAME: name, **environ}
        with self.log.open("ab") as log:
            process = subprocess.Popen([*within, *self.worker_argv], env=environ, stderr=log)
        self.workers.add(process.pid)
        self.others.append(process)
        return process

    def fault(self, name: str) -> None:
        (self.faults / name).touch()

    def struck(self, name: str) -> bool:
        return not (self.faults / name).exists()

    def board(self) -> Board:
        """The keeper's board, through its descriptor, once it has one."""
        self.wait(lambda: self._board_fd() is not None)
        path = self._board_fd()
        assert path is not None
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        known = self._boards.get(os.fstat(fd).st_ino)
        if known is not None:
            os.close(fd)
            return known
        board = self._boards[os.fstat(fd).st_ino] = Board(fd)
        return board

    def _board_fd(self) -> Path | None:
        with contextlib.suppress(FileNotFoundError):  # it starts or ends just now
            for fd in Path(f"/proc/{inner(self.keeper)}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                    if "helios-board" in os.readlink(fd):
                        return fd
        return None

    def logged(self, text: str) -> bool:
        return text in self.log.read_text()

    def read(self) -> str:
        """The digest of the file, read through the mount."""
        digest = hashlib.sha256()
        with self.file.open("rb", buffering=0) as file:
            while part := file.read(MIB):
                digest.update(part)
        return digest.hexdigest()

    @staticmethod
    def wait(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, "it did not come true"
            time.sleep(0.01)

    def left(self) -> list[str]:
        """What a keeper that ended must not leave."""
        left = [str(path) for path in (self.socket, self.pid_file) if path.exists()]
        left += [f"process {pid}" for pid in self.workers if alive(pid)]
        return left + ([str(self.mountpoint)] if find_mount(self.mountpoint) else [])

    def close(self) -> None:
        if self.pid_file.exists():
            self.worker()
        for process in (*self.keepers, *self.others):
            if process.poll() is None:
                process.kill()
            process.wait()
        for pid in filter(alive, self.workers):
            os.kill(pid, signal.SIGKILL)
        for board in self._boards.values():
            board.close()
        detach(self.mountpoint)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def inner(process: subprocess.Popen[bytes]) -> int:
    """The pid, as we see it, of what was started in a NAMESPACE; 0 while there is none."""
    if process.args[0] != NAMESPACE[0]:  # type: ignore[index]
        return process.pid
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    except FileNotFoundError:
        return 0
    return int(children[0]) if children else 0


READER = """
import hashlib, os, select, sys
while True:
    fd = os.open(sys.argv[1], os.O_RDONLY)
    digest = hashlib.sha256()
    while part := os.read(fd, 1 << 20):
        digest.update(part)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    print(digest.hexdigest(), flush=True)
    if select.select([0], [], [], 0)[0]:
        break
"""


class Rounds:
    """Somebody who reads the file over and over, past the page cache.

    A process of its own: the test's children would have its file open, and wait for an answer when they close it.
    """

    def __init__(self, path: Path) -> None:
        command = [sys.executable, "-c", READER, str(path)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0)
        self._found: set[str] = set()

    def next(self) -> None:
        """Wait until the file was read once more, from the beginning."""
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        while self._process.stdout.read() is not None:  # what it read before
            pass
        os.set_blocking(self._process.stdout.fileno(), True)
        for _ in range(2):
            assert select.select([self._process.stdout], [], [], 60)[0], "a reader hangs"
            self._found.add(self._process.stdout.readline().decode().strip())

    def digests(self, timeout_s: float) -> set[str]:
        """Stop; what was seen. Fails with what a read raised."""
        out, error = self._process.communicate(b"stop", timeout_s)
        assert not error, error.decode()
        return self._found | set(out.decode().split())

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()


@contextlib.contextmanager
def reading(kept: Kept) -> Iterator[Rounds]:
    """Somebody reads meanwhile; ``digests`` is to be asked inside."""
    rounds = Rounds(kept.file)
    try:
        yield rounds
    finally:
        rounds.close()


def ends(kept: Kept, status: int) -> None:
    assert kept.keeper.wait(15) == status
    Kept.wait(lambda: not kept.left(), 2)
