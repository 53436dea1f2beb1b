"""What the benchmarks of mounts share: daemons that end on every way out, mounts, what they used, files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from helios.home import Home
from helios.mounts import find_mount
from tests.support.mounts import Mount

HELIOS = Path(sys.executable).parent / "helios"
END_S = 30.0
"""How long a daemon may take to end before it is killed, in seconds."""


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit inside, so that everything made is taken down."""

    def stop(number: int, _: FrameType | None) -> None:
        for each in before:  # a second one must not interrupt the way down
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def run_in(directory: Path, name: str) -> Iterator[Path]:
    """A directory of the benchmark's own below this one, which is removed, also by SIGTERM and SIGHUP."""
    with stoppable():
        work = Path(tempfile.mkdtemp(dir=directory, prefix=f"helios-{name}-"))
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


@contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """The process ends with the block: SIGTERM, and SIGKILL when it does not listen."""
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def helios(home: Home, *args: str | Path, within: Sequence[str] = (), environ: Mapping[str, str] | None = None) -> str:
    """Run a command on a home and return what it printed; ``within`` is what it is run by (nsenter …)."""
    command = [*within, str(HELIOS), *map(str, args)]
    env = {**os.environ, **(environ or {}), "HELIOS_HOME": str(home.root)}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=False, timeout=600)
    if done.returncode:
        raise SystemExit(f"helios {' '.join(map(str, args))} failed with {done.returncode}")
    return done.stdout


@contextmanager
def registry(home: Home, within: Sequence[str] = (), *, environ: Mapping[str, str] | None = None) -> Iterator[str]:
    """The real registry on a home; yields its URL."""
    environ = {"HELIOS_LOG__LEVEL": "warning", **os.environ, **(environ or {}), "HELIOS_HOME": str(home.root)}
    command = [*within, str(HELIOS), "registry", "--port", "0"]
    with ended(subprocess.Popen(command, env=environ, stdout=subprocess.PIPE)) as process:
        assert process.stdout is not None
        words = process.stdout.readline().split()
        if not words:
            raise SystemExit(f"the registry on {home.root} did not start")
        yield words[0].decode()


@contextmanager
def mounted(
    home: Home, path: Path, *, urls: str = "", within: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> Iterator[Mount]:
    """A real mount of a home, unmounted in the end; ``urls``: its registries, where not the embedded one."""
    environ = {**(environ or {}), **({"HELIOS_REGISTRY__URLS": urls} if urls else {})}
    try:
        yield Mount(home, path, json.loads(helios(home, "mount", path, "--json", within=within, environ=environ)))
    except Exception:
        for log in home.logs.glob("mount-*.log"):  # it goes with the home
            sys.stderr.write("".join(log.read_text().splitlines(keepends=True)[-20:]))
        raise
    finally:
        if find_mount(path) is not None:
            helios(home, "umount", path)


def registry_pid(home: Home) -> int:
    """The pid of the registry that runs on the home."""
    return int(json.loads((home.run / "registry.json").read_text())["pid"])


def worker(mount: Mount) -> int:
    """The pid of the process that serves the mount."""
    return int((mount.home.run / "heliosfs-worker.pid").read_text())


def cpu_s(pid: int) -> float:
    """User and system seconds of a running process, its threads included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def mount_cpu(mount: Mount) -> dict[int, float]:
    """CPU seconds of the mount's processes: the one that serves it, and the one that keeps it where that is another."""
    return {pid: cpu_s(pid) for pid in {worker(mount), int(str(mount.state["pid"]))}}


def cpu_since(mount: Mount, before: dict[int, float]) -> float:
    """CPU seconds of the mount's processes since ``mount_cpu`` was asked."""
    now = mount_cpu(mount)
    if now.keys() != before.keys():
        raise SystemExit(f"the mount's worker was replaced meanwhile; see {mount.state['log']}")
    return sum(now.values()) - sum(before.values())


def reads(mount: Mount) -> float:
    """READ requests that Python has answered: in the channel, which portable mounts lack, or on the event loop."""
    names = ("helios_mount_request_seconds_count", "helios_mount_operation_seconds_count")
    return max(mount.metric(name, operation="read") for name in names)


def attribute(path: Path, name: str) -> str:
    return os.getxattr(path, f"user.helios.{name}").decode()


def local_file(mount: Mount, path: Path) -> Path:
    """Where the local tier has a file's bytes: whole, or as much as there is."""
    sha256 = attribute(path, "sha256")
    cache = Path(str(mount.state["cache"]))
    whole = cache / "blobs" / sha256[:2] / sha256
    return whole if whole.exists() else cache / "partial" / f"{sha256}.data"


def read_through(path: Path, size: int | None = None) -> None:
    """Read a file, or its first ``size`` bytes, as a plain program would."""
    buffer = memoryview(bytearray(1 << 20))
    left = path.stat().st_size if size is None else size
    with path.open("rb", buffering=0) as file:
        while left > 0:
            count = file.readinto(buffer[: min(len(buffer), left)])
            if not count:
                raise SystemExit(f"{path} ended {left} bytes early")
            left -= count


def wait_until_whole(path: Path, limit_s: float = 60.0, tier: str = "l1") -> None:
    """Wait until a local tier has the whole file as a plain one."""
    until = time.monotonic() + limit_s
    while attribute(path, "tier") != tier:
        if time.monotonic() > until:
            raise SystemExit(f"{path} is not whole after {limit_s:g} s: {attribute(path, 'progress')}")
        time.sleep(0.05)


def percentile(values: Sequence[float], part: float) -> float:
    """The smallest value that at least ``part`` of all are not above (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, -int(-part * len(ordered) // 1) - 1)]
