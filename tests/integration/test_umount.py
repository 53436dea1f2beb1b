"""``helios umount`` ends, and leaves nothing, whatever waits for the mount and whatever serves it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from helios.config import Config
from helios.embedded import attach
from helios.errors import Conflict, HeliosError, NotFound, Unavailable
from helios.home import Home
from helios.mounts import find_mount, states
from helios.process import ProcessId
from helios.unmounting import stop
from tests.support.front import Front, Strike
from tests.support.mounts import MODES, push, run, write
from tests.support.reading import within

pytestmark = pytest.mark.fuse

LONGEST_S = 60.0
"""Several times what the deadlines inside add up to, for a busy machine."""

READERS = {
    "read": "os.pread(fd, 1, 0)",
    "map": "mmap.mmap(fd, 0, prot=mmap.PROT_READ)[0]",
}


@dataclass(frozen=True)
class Silent:
    """A registry that sends no bytes of any file, and where mounts of it may be."""

    home: Home
    url: str
    mountpoint: Path


@pytest.fixture(scope="module")
def silent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Silent]:
    base = tmp_path_factory.mktemp("umount")
    home = Home(base / "home")
    with attach(Config(), home, {**os.environ, "HELIOS_HOME": str(home.root)}) as registry:
        push(home, write(base / "model", {"data.txt": b"x" * 100_000}), "org/name")
        with Front(registry.urls[0], lambda asked: Strike("silent") if "/objects/" in asked.path else None) as front:
            yield Silent(home, front.url, base / "mnt")


def mount(silent: Silent, mode: str) -> dict[str, Any]:
    environ = {"HELIOS_MOUNT__MODE": mode, "HELIOS_MOUNT__REQUEST_DEADLINE_S": "600"}
    shown = run(silent.home, "mount", silent.mountpoint, "--json", "--registry", silent.url, **environ).stdout
    state: dict[str, Any] = json.loads(shown)
    return state


@contextlib.contextmanager
def blocked(mountpoint: str, how: str, wait_for: Callable[..., None]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits for a byte of the mount; in the end it must have been let go."""
    code = f"import mmap, os, sys; fd = os.open(sys.argv[1], os.O_RDONLY); os.write(1, b'.'); {READERS[how]}"
    file = f"{mountpoint}/org/name/@main/data.txt"
    process = subprocess.Popen([sys.executable, "-c", code, file], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    try:
        assert process.stdout.read(1) == b"."
        wait_for(lambda: waits(process.pid), what="the reader to wait")
        yield process
        assert process.wait(LONGEST_S) != 0, "the reader got bytes that nobody had"
    finally:
        process.kill()
        process.wait(LONGEST_S)
        process.stdout.close()


def waits(pid: int) -> bool:
    """Whether the process is inside a request to a FUSE filesystem."""
    where = Path(f"/proc/{pid}/wchan").read_text()
    return "request_wait" in where or "folio_wait" in where or Path(f"/proc/{pid}/stat").read_text().split()[2] == "D"


def is_gone(home: Home, state: dict[str, Any]) -> None:
    assert find_mount(Path(state["mountpoint"])) is None
    assert states(home) == []
    assert not any(process.alive() for process in serving(state))
    assert not Path(state["mountpoint"]).exists(), "it was made for the mount"


def hangs(path: str) -> bool:
    """Whether looking at it waits for an answer. The kernel may know one for a moment yet."""
    asker = subprocess.Popen(["stat", path], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        asker.wait(0.5)
    except subprocess.TimeoutExpired:
        return waits(asker.pid)
    finally:
        asker.kill()
        threading.Thread(target=asker.wait, daemon=True).start()  # where it waits even SIGKILL may have to
    return False


def serving(state: dict[str, Any]) -> list[ProcessId]:
    found = [ProcessId(state["pid"], state["start"])]
    return found + ([ProcessId(**state["worker"])] if state["worker"] else [])


@pytest.mark.parametrize(("mode", "how"), [(mode, how) for mode in MODES for how in READERS])
def test_a_reader_that_waits_for_a_silent_store(
    silent: Silent, mode: str, how: str, wait_for: Callable[..., None]
) -> None:
    state = mount(silent, mode)
    with blocked(state["mountpoint"], how, wait_for):
        run(silent.home, "umount", silent.mountpoint)
        is_gone(silent.home, state)


@pytest.mark.parametrize(
    ("mode", "who"),
    [(mode, who) for mode in MODES for who in ("first", "last", "all") if mode == "native" or who == "all"],
)
def test_a_reader_that_waits_for_processes_that_are_stopped(
    silent: Silent, mode: str, who: str, wait_for: Callable[..., None]
) -> None:
    """The keeper, its worker, or whatever serves the mount. ``helios umount`` waits for 15 s before it uses force."""
    state = mount(silent, mode)
    stopped = {"first": serving(state)[:1], "last": serving(state)[-1:], "all": serving(state)}[who]
    with blocked(state["mountpoint"], "map", wait_for):
        for process in stopped:
            process.send(signal.SIGSTOP)
        within(LONGEST_S, lambda: stop(silent.home, silent.mountpoint, timeout_s=1.0))
        is_gone(silent.home, state)


@pytest.mark.parametrize("mode", MODES)
def test_commands_whose_mount_point_does_not_answer(
    silent: Silent, tmp_path: Path, mode: str, wait_for: Callable[..., None]
) -> None:
    """They don't look at it themselves. ``helios umount`` gives the processes 15 s before it uses force."""
    state, other = mount(silent, mode), Home(tmp_path / "other")
    for process in serving(state):
        process.send(signal.SIGSTOP)
    wait_for(lambda: hangs(state["mountpoint"]), 30, "the mount to hang")
    below = f"{state['mountpoint']}/org"
    assert "is mounted already" in run(silent.home, "mount", silent.mountpoint, code=1).stderr
    assert "is a mount point already" in run(other, "mount", silent.mountpoint, code=1).stderr
    for command in (["umount"], ["pin", "org/name", "--mount"], ["verify", "--mount"], ["drain", "--mount"]):
        for place in (silent.mountpoint, below):
            assert str(place) in run(other, *command, place, code=1).stderr
    run(silent.home, "umount", silent.mountpoint)
    is_gone(silent.home, state)


@pytest.mark.parametrize(
    ("mode", "who"),
    [(mode, who) for mode in MODES for who in ("first", "all") if mode == "native" or who == "all"],
)
def test_a_reader_that_waits_for_processes_that_nothing_can_end(
    silent: Silent, mode: str, who: str, wait_for: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those in a system call of a disk that hangs: SIGKILL comes back, and they stay. The reader is let go."""
    state = mount(silent, mode)
    immortal, send = serving(state)[:1] if who == "first" else serving(state), ProcessId.send
    with monkeypatch.context() as patched, blocked(state["mountpoint"], "map", wait_for):
        for process in immortal:
            process.send(signal.SIGSTOP)
        patched.setattr(ProcessId, "send", lambda self, sig: self.alive() if self in immortal else send(self, sig))
        with pytest.raises(Unavailable) as said:
            within(LONGEST_S, lambda: stop(silent.home, silent.mountpoint, timeout_s=1.0))
        assert find_mount(silent.mountpoint) is None
    assert all(f"process {process.pid}" in str(said.value) for process in immortal)
    assert "is unmounted" in str(said.value)
    for process in immortal:  # the disk answers
        process.send(signal.SIGKILL)
        assert process.wait(LONGEST_S)
    run(silent.home, "umount", silent.mountpoint)
    is_gone(silent.home, state)


@pytest.mark.parametrize("mode", MODES)
def test_several_unmount_at_once(silent: Silent, mode: str, wait_for: Callable[..., None]) -> None:
    """One at least succeeds; the others say that there is nothing any more, or succeed too."""
    state = mount(silent, mode)
    failures: list[HeliosError] = []

    def unmount() -> None:
        try:
            stop(silent.home, silent.mountpoint)
        except HeliosError as error:
            failures.append(error)

    with blocked(state["mountpoint"], "read", wait_for):
        threads = [threading.Thread(target=unmount, daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONGEST_S)
            assert not thread.is_alive()
        is_gone(silent.home, state)
    assert len(failures) < len(threads)
    assert all(isinstance(error, (NotFound, Conflict)) for error in failures), failures


@pytest.mark.parametrize("mode", MODES)
def test_a_mount_where_a_dead_one_still_has_a_waiting_reader(
    silent: Silent, mode: str, wait_for: Callable[..., None]
) -> None:
    state = mount(silent, mode)
    with blocked(state["mountpoint"], "map", wait_for):
        for process in serving(state):  # neither may start the other again
            process.send(signal.SIGSTOP)
        for process in serving(state):
            process.send(signal.SIGKILL)
        for process in serving(state):
            assert process.wait(10)
        again = mount(silent, mode)
    assert os.listdir(silent.mountpoint / "org") == ["name"]
    run(silent.home, "umount", silent.mountpoint)
    is_gone(silent.home, again)
