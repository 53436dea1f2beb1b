"""A worker asks its new mount for its root; it can be killed while it does, whatever becomes of the question."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from heliosfs.fuse.protocol import INIT, REPLY, REQUEST
from heliosfs.keeper import kernel

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts by itself, which only root may"),
]

ASKING = """
import sys, trio
from pathlib import Path
from heliosfs.fuse.mounting import wait_until_it_answers
trio.run(wait_until_it_answers, Path(sys.argv[1]))
"""


class Silent:
    """A mount whose server reads requests and answers none but INIT."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        opcode, unique = self.take()
        assert opcode == INIT
        out = struct.pack("<IIIIHHI", 7, 39, 1 << 20, 0, 64, 48, 1 << 20).ljust(64, b"\0")
        os.writev(fd, [REPLY.pack(REPLY.size + len(out), 0, unique), out])

    def take(self) -> tuple[int, int]:
        """Opcode and number of the next request."""
        _, opcode, unique, *_ = REQUEST.unpack_from(os.read(self.fd, 1 << 21))
        return opcode, unique

    def fail(self, unique: int, errno: int) -> None:
        os.write(self.fd, REPLY.pack(REPLY.size, -errno, unique))


@pytest.fixture
def mountpoint(tmp_path: Path) -> Path:
    (tmp_path / "mnt").mkdir()
    return tmp_path / "mnt"


@pytest.fixture
def silent(mountpoint: Path) -> Iterator[Silent]:
    fd, device = kernel.mount(str(mountpoint), kernel.OPTIONS)
    try:
        yield Silent(fd)
    finally:
        kernel.abort(device)
        kernel.detach(str(mountpoint), device)
        os.close(fd)


@contextlib.contextmanager
def asking(mountpoint: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", ASKING, str(mountpoint)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_worker_that_is_killed_while_it_asks_is_gone_at_once(silent: Silent, mountpoint: Path) -> None:
    """What it holds, locks above all, is free for the next one, which is to answer the question."""
    with asking(mountpoint) as process:
        silent.take()
        process.send_signal(signal.SIGKILL)
        until = time.monotonic() + 10
        while process.poll() is None:
            assert time.monotonic() < until, "the killed process waits for its own mount"
            time.sleep(0.01)


def test_a_mount_that_fails_says_why(silent: Silent, mountpoint: Path) -> None:
    with asking(mountpoint) as process:
        _, unique = silent.take()
        silent.fail(unique, 5)
        assert "fails: Input/output error" in process.communicate(timeout=20)[1]
    assert process.returncode == 1
