"""Long-running children of ``quickstart`` and ``serve``: started under a guard, logged to a file, ended in time.

``Children`` owns them: leaving its context ends all, newest first. What an earlier run that was killed left behind
is found by its records and ended by ``repair``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import msgspec

from helios.decoding import from_json
from helios.errors import Unavailable
from helios.home import Home
from helios.launch import guard
from helios.launch.grace import GUARD_GRACE_S
from helios.process import ProcessId


class Record(msgspec.Struct, frozen=True):
    """What a guard writes down about what it runs."""

    name: str
    guard: ProcessId
    process: ProcessId
    owner: ProcessId
    command: list[str]
    log: str
    since: int


def records_directory(home: Home) -> Path:
    path = home.ensure_run() / "processes"
    path.mkdir(exist_ok=True, mode=0o700)
    return path


def records(home: Home) -> Iterator[tuple[Path, Record]]:
    """The records of a home, of living and of dead processes; unreadable ones are removed."""
    if not home.run.is_dir():
        return
    for path in sorted(records_directory(home).glob("*.json")):
        try:
            yield path, from_json(path.read_bytes(), Record)
        except FileNotFoundError:
            continue  # its guard ended meanwhile
        except msgspec.DecodeError:
            path.unlink(missing_ok=True)


def repair(home: Home) -> list[str]:
    """End what an earlier run left behind: processes whose owner is gone. Returns the names of those ended."""
    ended = []
    for path, record in records(home):
        if record.owner.alive():
            continue
        lived = record.guard.alive() or bool(_group(record.process))
        # A guard whose parent is gone ends by itself; this waits for it, or does its work if it was killed too.
        if not record.guard.wait(0) and not record.guard.end(GUARD_GRACE_S):
            raise Unavailable(f"process {record.guard.pid} ({record.name}) of an earlier run can't be ended")
        if record.process.send(signal.SIGTERM):
            record.process.wait(GUARD_GRACE_S)
        for member in _group(record.process):
            member.send(signal.SIGKILL)
            member.wait(5.0)
        path.unlink(missing_ok=True)
        if lived:
            ended.append(record.name)
    return ended


def _group(leader: ProcessId) -> list[ProcessId]:
    """Living members of the process group that ``leader``, which may be gone, made.

    The kernel gives no new process a pid that still names a group, so the members are the leader's unless a later
    process has its pid.
    """
    now = ProcessId.of(leader.pid)
    if now is not None and now != leader:
        return []
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(ProcessLookupError):
                if os.getpgid(int(entry)) == leader.pid and (member := ProcessId.of(int(entry))):
                    found.append(member)
    return found


@dataclass(slots=True)
class Child:
    """One guarded command. ``log`` holds its output."""

    name: str
    log: Path
    grace_s: float
    guard: subprocess.Popen[bytes]
    started: float

    def poll(self) -> int | None:
        """The command's exit status, or None while it runs."""
        return self.guard.poll()

    def tail(self, lines: int = 20) -> str:
        """The last lines of its log."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 64 * 1024))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])

    def begin_stop(self) -> None:
        """Have it end, without waiting for that: its guard sees that nobody holds the other end."""
        if self.guard.stdin is not None:
            self.guard.stdin.close()

    def kill(self) -> None:
        """End its whole tree now, with SIGKILL, without waiting for that."""
        if self.guard.poll() is None:
            self.guard.send_signal(signal.SIGUSR1)

    def stop(self) -> None:
        """End it: SIGTERM, after the grace SIGKILL for its whole tree."""
        self.begin_stop()
        if self.guard.poll() is None:
            self.guard.terminate()
            try:
                self.guard.wait(self.grace_s + GUARD_GRACE_S)
            except subprocess.TimeoutExpired:
                self.guard.kill()
                self.guard.wait()


class Children:
    """Owner of guarded commands; a context that ends them, newest first."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self._children: list[Child] = []
        self._written: set[Path] = set()

    def __enter__(self) -> Children:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        while self._children:
            self._children.pop().stop()

    def kill(self) -> None:
        """End all now, without waiting for that; a signal's handler may call it."""
        for child in list(self._children):
            child.kill()

    def stop(self, child: Child) -> None:
        """End one before the others; nothing for one that somebody has ended, or is about to."""
        try:
            self._children.remove(child)
        except ValueError:
            return
        child.stop()

    def start(
        self,
        name: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        unset: Sequence[str] = (),
        grace_s: float = 10.0,
        cwd: Path | None = None,
    ) -> Child:
        """Start a command; its output goes to ``$HELIOS_HOME/logs/<name>.log``, replacing that of the run before.

        While another run writes to that file it goes to ``<name>-<pid>.log``. What this run wrote there before is kept
        once, as ``….log.1``.
        """
        self.home.logs.mkdir(parents=True, exist_ok=True)
        log = self.home.logs / f"{name}.log"
        if any(record.log == str(log) and record.guard.alive() for _, record in records(self.home)):
            log = log.with_name(f"{name}-{os.getpid()}.log")
        if log in self._written and log.exists():
            log.replace(log.with_name(f"{log.name}.1"))
        self._written.add(log)
        record = records_directory(self.home) / f"{name}-{os.getpid()}.json"
        head = [sys.executable, "-I", "-S", str(Path(guard.__file__)), str(record), name, str(grace_s), "--"]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*head, *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                cwd=cwd,
                env={k: v for k, v in os.environ.items() if k not in unset} | dict(env or {}),
                start_new_session=True,  # a terminal's Ctrl-C is for the owner, which ends them in order
            )
        child = Child(name, log, grace_s, process, time.monotonic())
        self._children.append(child)
        return child
