"""Runs one command and leaves nothing of it behind, however its parent ends.

A parent that is killed can't clean up, and vLLM is a tree of processes. So a long-running child is started as

    python -I -S guard.py RECORD NAME GRACE_S -- COMMAND...

with a pipe from the parent as standard input. The guard is the tree's subreaper: whatever detaches inside the tree
becomes its child. When the command ends, SIGTERM or SIGINT comes, or the pipe closes because the parent is gone, the
command gets SIGTERM, and after GRACE_S seconds every process left in the tree gets SIGKILL; SIGUSR1 has that done at
once. The guard then exits with the command's status (128 + signal for a signal).

RECORD is a JSON file that exists while the guard runs and says what runs: what a later start needs to clean up after a
guard that was itself killed. Standard library only; it imports nothing of Helios, so that it stays small (about
10 MB) and starts in 30 ms.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
ORPHAN_GRACE_S = 1.0
"""How long processes may outlive the command by themselves, in seconds."""


def main() -> int:
    record, name, grace_s, dashes, *command = sys.argv[1:]
    if dashes != "--" or not command:
        raise SystemExit("usage: guard.py RECORD NAME GRACE_S -- COMMAND...")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "PR_SET_CHILD_SUBREAPER")
    wake, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker)
    for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD):
        signal.signal(sig, lambda *_: None)
    parent = os.getppid()

    # Should the guard itself be killed, the kernel sends the command SIGTERM.
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0),  # noqa: PLW1509 - no threads here
    )
    try:
        write_record(Path(record), name, parent, child.pid, command)
        return supervise(child.pid, wake, float(grace_s))
    finally:
        end_tree(ORPHAN_GRACE_S)
        Path(record).unlink(missing_ok=True)


def supervise(child: int, wake: int, grace_s: float) -> int:
    """Wait for the command to end or for a reason to end it; return its status."""
    poller = select.poll()
    poller.register(wake, select.POLLIN)
    poller.register(0, select.POLLIN)
    deadline: float | None = None
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        events = dict(poller.poll(left))
        stop = now = False
        if 0 in events and not os.read(0, 4096):
            poller.unregister(0)
            stop = True
        if wake in events:
            signals = os.read(wake, 256)
            stop = stop or any(sig != signal.SIGCHLD for sig in signals)
            now = signal.SIGUSR1 in signals
        status = reap(child)
        if status is not None:
            return status
        if now:
            kill_tree()
            deadline = time.monotonic() + ORPHAN_GRACE_S
        elif stop and deadline is None:
            os.kill(child, signal.SIGTERM)
            deadline = time.monotonic() + grace_s
        elif deadline is not None and time.monotonic() >= deadline:
            kill_tree()
            deadline = time.monotonic() + ORPHAN_GRACE_S


def reap(child: int) -> int | None:
    """Reap every process that ended; the command's status if it was among them."""
    result = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return result
        if pid == 0:
            return result
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            result = code if code >= 0 else 128 - code


def end_tree(grace_s: float) -> None:
    """Let what outlived the command end by itself, then kill it; returns when no process of the tree is left."""
    end = time.monotonic() + grace_s
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0]:
                continue
        except ChildProcessError:
            return
        if time.monotonic() >= end:
            kill_tree()
        time.sleep(0.02)


def kill_tree() -> None:
    """SIGKILL every descendant. What is orphaned meanwhile becomes the guard's child and is found by the next call."""
    for pid in descendants(os.getpid()):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def descendants(root: int) -> list[int]:
    """Pids of the processes below ``root``."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path(f"/proc/{entry}/stat").read_bytes()
            except OSError:
                continue
            parent = int(stat[stat.rindex(b")") + 2 :].split()[1])
            children.setdefault(parent, []).append(int(entry))
    found: list[int] = []
    todo = [root]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def write_record(path: Path, name: str, owner: int, child: int, command: list[str]) -> None:
    """Say what runs, whole or not at all; each process with its start time, because pids are reused."""
    document = {
        "name": name,
        "guard": identity(os.getpid()),
        "process": identity(child),
        "owner": identity(owner),
        "command": command,
        "log": os.readlink("/proc/self/fd/1"),
        "since": int(time.time()),
    }
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(document, indent=1) + "\n")
    part.replace(path)


def identity(pid: int) -> dict[str, object]:
    """As ``helios.process.ProcessId``: the pid and ``<boot id>:<start ticks>``."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return {"pid": pid, "start": ""}  # it ended before it could be written down
    return {"pid": pid, "start": f"{boot}:{int(stat[stat.rindex(b')') + 2 :].split()[19])}"}


if __name__ == "__main__":
    sys.exit(main())
