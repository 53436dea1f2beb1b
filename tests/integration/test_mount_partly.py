"""A file that is here in part: what is here comes without the event loop, from the disk."""

from __future__ import annotations

import os
import random
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from helios.home import Home
from tests.support.front import Asked, Front, Strike
from tests.support.mounts import MODES, Mount, mounted, push, worker, write
from tests.support.reading import within
from tests.support.registry import running_registry

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif("native" not in MODES, reason="native mounts need root and Linux 6.9"),
]

MIB = 1 << 20
HERE = 8 * MIB
DATA = random.Random(1).randbytes(32 * MIB)

BLOCK = """
import os, sys, time
if "HELIOS_KEEPER" in os.environ and "heliosfs" in sys.orig_argv:
    import heliosfs.fetch.read as module
    read = module.Reads.read
    async def blocking(self, blob, reader, view, offset):
        if blob.want.path == "block.txt":
            open({blocked!r}, "w").close()
            while os.path.exists({blocked!r}):
                time.sleep(0.01)
        await read(self, blob, reader, view, offset)
    module.Reads.read = blocking
"""


@dataclass
class Partly:
    """A mount with a file whose first part is local; the rest does not come. ``blocked`` is there while the loop is."""

    mount: Mount
    fd: int
    other: Path
    blocked: Path

    def read(self, size: int, offset: int) -> bytes:
        """From the worker, whatever the kernel has of it."""
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return os.pread(self.fd, size, offset)

    def counts(self) -> tuple[float, float, float, float]:
        """READs in all, those answered by the event loop, those answered without it, bytes from the disk.

        A READ is answered before it is counted, so they are looked at until they stay.
        """
        found = self._looked()
        while found != (again := self._looked()):
            found = again
        return found

    def _looked(self) -> tuple[float, float, float, float]:
        return (
            self.mount.reads(),
            self.mount.metric("helios_mount_operation_seconds_count", operation="read"),
            self.mount.metric("helios_mount_channel_reads_total"),
            self.mount.metric("helios_mount_read_bytes_total", tier="l1"),
        )


def later_part(asked: Asked) -> Strike | None:
    found = re.match(r"bytes=(\d+)-", asked.headers.get("range", ""))
    return Strike("silent") if "/objects/" in asked.path and found and int(found[1]) >= 2 * HERE else None


@pytest.fixture
def partly(helios: Any, helios_home: Home, tmp_path: Path, wait_for: Any) -> Iterator[Partly]:
    blocked = tmp_path / "blocked"
    hook = write(tmp_path / "hook", {"sitecustomize.py": BLOCK.format(blocked=str(blocked)).encode()})
    environ = {
        "HELIOS_MOUNT__MODE": "native",
        "HELIOS_MOUNT__POOL_MIB": "0",
        "HELIOS_MOUNT__REQUEST_DEADLINE_S": "600",
        "PYTHONPATH": f"{hook}:{os.environ.get('PYTHONPATH', '')}",
    }
    with running_registry(helios) as registry, Front(registry.url, later_part) as front:
        files = {"data.txt": DATA, "block.txt": b"b" * 100_000}
        commit = push(helios_home, write(tmp_path / "model", files), "org/name")
        with mounted(helios_home, tmp_path / "mnt", "--registry", front.url, **environ) as mount:
            directory = mount.path / "org/name" / commit
            fd = os.open(directory / "data.txt", os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # nothing is read ahead that does not come
                assert b"".join(os.pread(fd, MIB, at) for at in range(0, HERE, MIB)) == DATA[:HERE]
                wait_for(lambda: front.struck["silent"], what="the rest to be asked for")
                yield Partly(mount, fd, directory / "block.txt", blocked)
            finally:
                blocked.unlink(missing_ok=True)
                os.close(fd)


def test_what_is_here_of_a_file_is_read_without_the_event_loop(partly: Partly) -> None:
    before = partly.counts()
    for at in range(0, HERE, MIB):
        assert partly.read(MIB, at) == DATA[at : at + MIB]
    reads, of_loop, of_channel, from_disk = (now - then for now, then in zip(partly.counts(), before, strict=True))
    assert of_loop == 0
    assert reads == of_channel >= HERE // MIB
    assert from_disk == HERE
    assert partly.mount.metric("helios_mount_passthrough_opens_total") == 0, "the file is not whole"


def test_what_is_here_of_a_file_is_read_while_the_loop_is_blocked(partly: Partly, wait_for: Any) -> None:
    before, serving = partly.counts(), worker(partly.mount)
    got: list[bytes] = []
    other = threading.Thread(target=lambda: got.append(partly.other.read_bytes()), daemon=True)
    other.start()
    wait_for(partly.blocked.exists, 30, "the loop to be blocked")
    try:
        found = within(60, lambda: partly.read(MIB, MIB))
        assert partly.blocked.exists()
    finally:
        partly.blocked.unlink()
    other.join(60)
    assert (found, got) == (DATA[MIB : 2 * MIB], [b"b" * 100_000])
    assert worker(partly.mount) == serving, "it was not replaced for that"
    assert partly.counts()[2] > before[2]
