"""Starting and stopping mounts: what ``helios mount``, ``helios umount`` and everything that needs a mount share.

The mount's daemon is a fresh process in a session of its own (``python -m heliosfs``). It says through a pipe that the
mount answers, or why there is none; from then on only its state file and its signals tie it to anybody.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from helios import config, native
from helios.decoding import converted
from helios.errors import Conflict, DeadlineExceeded, InvalidInput, NotFound, Unavailable, from_code
from helios.home import Home, hash_text
from helios.keepers import keeper_command, start_options
from helios.lockfile import held
from helios.mounts import (
    FSTYPE,
    MountEntry,
    MountState,
    canonical,
    claim,
    detach,
    find_mount,
    parse_state,
    state_of,
    state_path,
)
from helios.process import ProcessId

START_S: Final = 150.0
"""How long a mount may take to be ready, in seconds: an embedded registry may have to start first, after a crash."""

STOP_S: Final = 15.0
"""How long a mount's daemon may take to end by itself, in seconds."""

LOCK_S: Final = 2.0
"""How long the lock of a killed process may outlive it, in seconds."""

LOG_BYTES: Final = 8 << 20
"""A log longer than this is put aside (one older is kept) when the next mount starts."""

_READY_FD = 3


@dataclass(frozen=True, slots=True)
class Place:
    """A mount point that is free. ``created``: it was made for the mount; ``note``: what was repaired."""

    mountpoint: Path
    created: bool
    note: str | None = None


def prepare(home: Home, path: Path) -> Place:
    """Make sure that something can be mounted at ``path``: made if its parent is there, a dead mount of ours removed.

    Raises Conflict when something is mounted there, InvalidInput when it is not an empty directory.
    """
    home.ensure_run()
    mountpoint = canonical(path)
    try:
        str(mountpoint).encode()
    except UnicodeEncodeError:
        raise InvalidInput(f"the mount point {mountpoint!r} is not valid UTF-8") from None
    created, note = _clear(home, mountpoint)
    try:
        if not created:
            os.mkdir(mountpoint)
            created = True
    except FileExistsError:
        pass
    except OSError as error:
        raise InvalidInput(f"the mount point {mountpoint} can't be made: {error.strerror}") from None
    try:
        if not stat.S_ISDIR(os.stat(mountpoint).st_mode):
            raise InvalidInput(f"the mount point {mountpoint} is not a directory")
        with os.scandir(mountpoint) as entries:
            if next(entries, None) is not None:
                raise InvalidInput(f"the mount point {mountpoint} is not empty", hint="Choose an empty directory.")
    except OSError as error:
        raise InvalidInput(f"the mount point {mountpoint} can't be used: {error.strerror}") from None
    return Place(mountpoint, created, note)


def start(
    home: Home, place: Place, overrides: Mapping[str, Mapping[str, Any]], timeout_s: float = START_S
) -> MountState:
    """Start a mount's daemon and wait until the mount answers.

    ``overrides`` are configuration flags by section. Raises the daemon's own error, or Unavailable with the last lines
    of its log.
    """
    try:
        log = _log_file(home, place.mountpoint)
        begin = log.stat().st_size
        environ = {**os.environ, "HELIOS_HOME": str(home.root)}
        with _command(home, place, overrides, log) as (command, inherited):
            answer, status = _run_until_ready(command, environ, log, timeout_s, inherited)
        if status is not None:
            _explain(answer, status, log, begin)
    except BaseException:
        _undo(home, place)
        raise
    return converted(answer["state"], MountState)


def upgrade(home: Home, path: Path, timeout_s: float = START_S) -> MountState:
    """Replace the worker of a native mount by a fresh one, of the code that is installed now; readers notice nothing.

    Raises NotFound where this home has no mount, Conflict where it has no keeper, DeadlineExceeded.
    """
    mountpoint = canonical(path)
    state = state_of(home, mountpoint)
    if state is None or not lives(home, mountpoint, state):
        raise NotFound(f"nothing of {home.root} is mounted at {mountpoint}")
    if state.worker is None:
        raise Conflict(
            f"the mount at {mountpoint} is portable: it ends with its process ({state.reason})",
            hint=f"helios umount {mountpoint}, then helios mount {mountpoint}.",
        )
    state.process.send(signal.SIGHUP)
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        now = state_of(home, mountpoint)
        if now is not None and now.worker not in (None, state.worker):
            return now
        time.sleep(0.05)
    raise DeadlineExceeded(f"there is no new worker after {timeout_s:.0f} s", hint=f"The log: {state.log}")


def _clear(home: Home, mountpoint: Path) -> tuple[bool, str | None]:
    """Remove a dead mount of ours. Returns whether its mount point was made for it, and what was done."""
    entry, state = find_mount(mountpoint), state_of(home, mountpoint)
    if held(state_path(home, mountpoint)):
        if not _wait_until_free(home, mountpoint):
            by = f"process {state.pid}" if state else "a process that is just starting"
            raise Conflict(f"{mountpoint} is mounted already, by {by}", hint=f"helios umount {mountpoint} ends it.")
        entry, state = find_mount(mountpoint), state_of(home, mountpoint)
    if entry is not None and (entry.fstype != FSTYPE or (state is None and not _dead(entry))):
        raise Conflict(
            f"{mountpoint} is a mount point already ({entry.fstype}), and not one of {home.root}",
            hint="Choose another directory, or unmount that one first.",
        )
    if entry is None and state is None:
        return False, None
    created = sweep(home, mountpoint, keep_directory=True)
    note = f"the mount at {mountpoint} had lost its process; it was unmounted" if entry else None
    return created, note


def lives(home: Home, mountpoint: Path, state: MountState) -> bool:
    """Whether the daemon that ``state`` names serves the mount.

    The kernel drops the lock of a killed process a moment after the process is gone, so the lock alone says too much.
    """
    return held(state_path(home, mountpoint)) and state.process.alive() and find_mount(mountpoint) is not None


def _wait_until_free(home: Home, mountpoint: Path) -> bool:
    """A daemon that has unmounted, or was killed, is ending: wait for its lock. False when one lives after all."""
    end = time.monotonic() + STOP_S
    while time.monotonic() < end:
        if not held(state_path(home, mountpoint)):
            return True
        state = state_of(home, mountpoint)
        if find_mount(mountpoint) is not None and (state is None or state.process.alive()):
            return False
        time.sleep(0.05)
    return False


def sweep(home: Home, mountpoint: Path, keep_directory: bool = False) -> bool:
    """Remove what a dead daemon left: the mount, the state file, the directory made for it. Returns whether that was.

    Raises Conflict when a daemon has it, Unavailable.
    """
    end = time.monotonic() + LOCK_S
    while (lock := claim(home, mountpoint)) is None:  # of one that was killed, for a moment; or of a new one
        if time.monotonic() > end:
            raise Conflict(f"{mountpoint} was mounted again in this moment")
        time.sleep(0.05)
    state = parse_state(lock.read())
    created = state is not None and state.created
    try:
        entry = find_mount(mountpoint)
        if entry is not None and entry.fstype == FSTYPE:
            detach(mountpoint)
        if created and not keep_directory:
            with contextlib.suppress(OSError):  # not empty: somebody uses it
                mountpoint.rmdir()
    finally:
        lock.release()
    return created


def _dead(entry: MountEntry) -> bool:
    """Whether a mount of unknown origin has lost its daemon. A child asks: a hanging mount would hang whoever asks."""
    probe = subprocess.Popen(
        ["stat", "--file-system", str(entry.mountpoint)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={"LC_ALL": "C", "PATH": os.defpath},
    )
    try:
        _, said = probe.communicate(timeout=2)
    except subprocess.TimeoutExpired:
        probe.kill()
        return False
    return probe.returncode != 0 and os.strerror(107) in said  # ENOTCONN


def _log_file(home: Home, mountpoint: Path) -> Path:
    log = home.ensure_logs() / f"mount-{mountpoint.name or 'root'}-{hash_text(str(mountpoint)):016x}.log"
    log.touch()
    if log.stat().st_size > LOG_BYTES:
        log.replace(log.with_suffix(".log.1"))
        log.touch()
    return log


def _worker(place: Place, overrides: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The command that serves a mount, by itself or for a keeper."""
    command = [sys.executable, "-P", "-m", "heliosfs", str(place.mountpoint), "--overrides", json.dumps(overrides)]
    return [*command, "--created"] if place.created else command


@contextlib.contextmanager
def _command(
    home: Home, place: Place, overrides: Mapping[str, Mapping[str, Any]], log: Path
) -> Iterator[tuple[list[str], list[int]]]:
    """What serves a mount, and the descriptors that it inherits: a keeper with its worker, or a daemon alone."""
    worker = [*_worker(place, overrides), "--log", str(log)]
    settings = config.load_from_process(overrides).mount
    if reasons := native.reasons_against(settings.mode):
        yield [*worker, "--ready-fd", str(_READY_FD), "--portable", "; ".join(reasons)], []
        return
    options = start_options(settings, _READY_FD)
    with keeper_command(home, place.mountpoint, place.created, worker, options) as command:
        yield command


def run_native(
    home: Home,
    place: Place,
    overrides: Mapping[str, Mapping[str, Any]],
    ready: Callable[[MountState], None],
    timeout_s: float = START_S,
) -> int:
    """Keep a native mount in the foreground until a signal or an unmount; returns the exit status.

    ``ready`` is called once it answers. Raises what ``start`` raises.
    """
    worker = _worker(place, overrides)
    read_fd, write_fd = os.pipe()
    with os.fdopen(read_fd, "rb", buffering=0) as pipe:
        try:
            options = start_options(config.load_from_process(overrides).mount, write_fd)
            with keeper_command(home, place.mountpoint, place.created, worker, options) as (command, inherited):
                environ = {**os.environ, "HELIOS_HOME": str(home.root)}
                fds = [write_fd, *inherited]
                keeper = subprocess.Popen(command, env=environ, pass_fds=fds, start_new_session=True)
        finally:
            os.close(write_fd)
        try:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, lambda number, _: keeper.send_signal(number))
            answer = _read_line(pipe.fileno(), timeout_s)
        except BaseException:  # too slow, or interrupted: nothing stays
            keeper.terminate()
            keeper.wait()
            raise
    if "state" in answer:
        ready(converted(answer["state"], MountState))
    status = keeper.wait()
    if "state" in answer or status in (0, 128 + signal.SIGINT):
        return status
    if "error" in answer:
        raise from_code(**answer["error"])
    raise Unavailable(f"the mount ended at start (exit status {status})", hint="The lines above say why.")


def _run_until_ready(
    command: list[str], environ: dict[str, str], log: Path, timeout_s: float, inherited: Sequence[int]
) -> tuple[dict[str, Any], int | None]:
    """Start the daemon and read its one line. The exit status, where it did not stay, comes with it."""
    read_fd, write_fd = os.pipe()
    with os.fdopen(read_fd, "rb", buffering=0) as ready:
        try:
            pid = _spawn(command, environ, log, write_fd, inherited)
        finally:
            os.close(write_fd)
        try:
            answer = _read_line(ready.fileno(), timeout_s)
        except BaseException:
            if process := ProcessId.of(pid):
                process.end(grace_s=5.0)
            os.waitpid(pid, 0)
            raise
    return answer, None if "state" in answer else os.waitpid(pid, 0)[1]


def _explain(answer: dict[str, Any], status: int, log: Path, begin: int) -> NoReturn:
    """Raise what a daemon that did not stay said, or what its log's last lines say."""
    if "error" in answer:
        raise from_code(**answer["error"])
    raise Unavailable(f"the mount ended at start ({_how(status)}):\n{_tail(log, begin)}", hint=f"The whole log: {log}")


def _undo(home: Home, place: Place) -> None:
    """Remove what a daemon that did not come up left."""
    with contextlib.suppress(Conflict):  # somebody else mounts there now
        sweep(home, place.mountpoint)
    if place.created:
        with contextlib.suppress(OSError):  # not empty, or in use: no longer ours alone
            place.mountpoint.rmdir()


def _spawn(command: list[str], environ: dict[str, str], log: Path, ready_fd: int, inherited: Sequence[int] = ()) -> int:
    """Start the daemon: its own session, output to the log, the pipe as descriptor 3, and what is to be inherited."""
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_APPEND, 0),
        (os.POSIX_SPAWN_DUP2, 1, 2),
        (os.POSIX_SPAWN_DUP2, ready_fd, _READY_FD),
    ]
    for fd in inherited:
        os.set_inheritable(fd, True)
    return os.posix_spawn(command[0], command, environ, file_actions=actions, setsid=True)


def _read_line(fd: int, timeout_s: float) -> dict[str, Any]:
    """The daemon's one line, empty when it ended without."""
    end = time.monotonic() + timeout_s
    data = b""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    while not data.endswith(b"\n"):
        left = end - time.monotonic()
        if left <= 0 or not poller.poll(left * 1000):
            raise DeadlineExceeded(f"the mount was not ready after {timeout_s:.0f} seconds")
        part = os.read(fd, 1 << 16)
        if not part:
            return {}
        data += part
    answer: dict[str, Any] = json.loads(data)
    return answer


def _how(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def _tail(log: Path, begin: int, lines: int = 15) -> str:
    with log.open("rb") as file:
        file.seek(max(begin, log.stat().st_size - (32 << 10)))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
