"""A real mount for tests: a home, real pushes, ``helios mount``, and its metrics."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helios.home import Home
from helios.http.client import HttpClient
from helios.mounts import find_mount, state_of
from helios.native import reasons_against
from helios.process import ProcessId
from heliosfs.keeper.board import Board

HELIOS = Path(sys.executable).parent / "helios"

MODES = ["portable"] if reasons_against("auto") else ["native", "portable"]
"""The modes that this machine can mount in."""


@dataclass
class Mount:
    """A mount that answers; ``state`` is what ``helios mount --json`` printed."""

    home: Home
    path: Path
    state: dict[str, object]

    def page(self, path: str) -> str:
        client = HttpClient(f"unix:{self.state['socket']}", timeout_s=10)
        try:
            return client.bytes("GET", path).decode()
        finally:
            client.close()

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        total = 0.0
        for line in self.page("/metrics").splitlines():
            match = re.fullmatch(rf"{name}(?:\{{(.*)\}})? (\S+)", line)
            if match and all(f'{key}="{value}"' in (match[1] or "") for key, value in labels.items()):
                total += float(match[2])
        return total

    def reads(self) -> float:
        """READs that reached the process that serves it: the kernel had them from nowhere else. Those answered in the
        channel of a native mount never are an operation of the event loop; a portable mount has no channel."""
        names = (f"helios_mount_{what}_seconds_count" for what in ("request", "operation"))
        return max(self.metric(name, operation="read") for name in names)

    def log(self) -> str:
        return Path(str(self.state["log"])).read_text()


def call(mount: Mount, method: str, path: str, body: object = None) -> Any:
    """Ask the mount's control API."""
    client = HttpClient(f"unix:{mount.state['socket']}", timeout_s=30)
    try:
        return client.json(method, f"/api/v1/{path}", body=body)
    finally:
        client.close()


def worker(mount: Mount) -> ProcessId:
    """The process that serves the mount now."""
    state = state_of(mount.home, mount.path)
    assert state is not None
    assert state.worker is not None
    return state.worker


def next_worker(mount: Mount, last: ProcessId, timeout_s: float = 30.0) -> ProcessId:
    """Wait until another one serves it."""
    end = time.monotonic() + timeout_s
    while (now := worker(mount)) == last:
        assert time.monotonic() < end, "the worker was not replaced"
        time.sleep(0.02)
    return now


def board(mount: Mount) -> Board:
    """What the keeper and the worker of a native mount share; to be closed."""
    for link in Path(f"/proc/{mount.state['pid']}/fd").iterdir():
        if "helios-board" in os.readlink(link):
            return Board(os.open(link, os.O_RDWR | os.O_CLOEXEC))
    raise AssertionError("the keeper has no board")


def forget_names(mount: Mount) -> None:
    """Have the kernel forget every name and inode that nobody uses: a remount does that."""
    flags = 32 | 1 | 2 | 4 | 1024  # MS_REMOUNT, and the mount's own
    if ctypes.CDLL(None, use_errno=True).mount(None, os.fsencode(mount.path), None, ctypes.c_ulong(flags), None):
        raise OSError(ctypes.get_errno(), "the mount can't be remounted")


def kill(state: Mapping[str, Any]) -> None:
    """SIGKILL everything that keeps and serves a mount, and wait until it is gone: the mount point is dead then."""
    processes = [ProcessId(state["pid"], state["start"])]
    if state["worker"]:
        processes.append(ProcessId(**state["worker"]))
    for process in processes:
        process.send(signal.SIGKILL)
    for process in processes:
        assert process.wait(10)


@contextlib.contextmanager
def fails(*codes: int) -> Iterator[None]:
    """The block raises OSError with one of these errnos."""
    try:
        yield
    except OSError as error:
        if error.errno not in codes:
            raise
    else:
        raise AssertionError(f"it did not fail with {[errno.errorcode[code] for code in codes]}")


def run(home: Home, *args: str | Path, code: int = 0, **environ: str) -> subprocess.CompletedProcess[str]:
    """``helios …`` on a home."""
    done = subprocess.run(
        [str(HELIOS), *map(str, args)],
        env={**os.environ, "HELIOS_HOME": str(home.root), **environ},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, f"helios {args}: exit {done.returncode}\n{done.stdout}{done.stderr}"
    return done


def write(directory: Path, files: Mapping[str, bytes], executable: tuple[str, ...] = ()) -> Path:
    """Make a directory with these files."""
    for name, data in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.chmod(0o755 if name in executable else 0o644)
    return directory


def push(home: Home, directory: Path, spec: str) -> str:
    """Publish a directory; returns the commit."""
    return run(home, "push", directory, spec).stdout.strip()


@contextlib.contextmanager
def mounted(home: Home, path: Path, *args: str, **environ: str) -> Iterator[Mount]:
    """Mount, and in the end unmount and see that nothing is left. Others that the home has may stay."""
    others = set(home.run.glob("mounts/*"))
    mount = Mount(home, path, json.loads(run(home, "mount", path, "--json", *args, **environ).stdout))
    try:
        yield mount
    finally:
        if find_mount(path) is not None:
            run(home, "umount", path)
    assert find_mount(path) is None
    assert set(home.run.glob("mounts/*")) <= others
