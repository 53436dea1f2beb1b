"""A mount as in a cluster: keeper and worker are started by somebody else, with process ids of their own each."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from helios.home import Home
from helios.mounts import find_mount
from heliosfs.fuse.attach import NAME
from heliosfs.keeper.wire import ENVIRON
from tests.support.keeper import NAMESPACE, Rounds, inner
from tests.support.mounts import MODES, push, write

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif("native" not in MODES, reason="native mounts need root and Linux 6.9"),
]

FILES = {"config.json": b"{}", "weights.bin": os.urandom(20 << 20)}


class Pods:
    """What a kubelet would run on a node."""

    def __init__(self, home: Home, directory: Path) -> None:
        self._home, self._directory = home, directory
        self.mountpoint = directory / "mnt"
        self.mountpoint.mkdir()
        self._started: list[subprocess.Popen[bytes]] = []

    def _start(self, module: str, options: Sequence[str], **environ: str) -> subprocess.Popen[bytes]:
        command = [*NAMESPACE, sys.executable, "-P", "-m", module, str(self.mountpoint), *options]
        home = {"HELIOS_HOME": str(self._home.root)}
        with (self._directory / f"{module}.log").open("ab") as log:
            process = subprocess.Popen(command, env={**os.environ, **home, **environ}, stderr=log)
        self._started.append(process)
        return process

    def keeper(self) -> subprocess.Popen[bytes]:
        return self._start("heliosfs.keeper", ["--external", "--socket", str(self._directory / "keeper.sock")])

    def worker(self, name: str) -> subprocess.Popen[bytes]:
        return self._start("heliosfs", [], **{ENVIRON: str(self._directory / "keeper.sock"), NAME: name})

    def close(self) -> None:
        for process in reversed(self._started):
            if process.poll() is None:
                process.kill()
            process.wait()


def end(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    os.kill(inner(process), number)
    process.wait(30)


@pytest.fixture
def pods(helios_home: Home, tmp_path: Path) -> Iterator[Pods]:
    pods = Pods(helios_home, tmp_path)
    yield pods
    pods.close()


def test_a_reader_sees_nothing_of_restarts_and_upgrades_of_the_pods(
    pods: Pods, helios: Any, helios_home: Home, tmp_path: Path, wait_for: Any
) -> None:
    commit = push(helios_home, write(tmp_path / "model", FILES), "org/name")
    path = pods.mountpoint / "org/name" / commit / "weights.bin"
    keeper = pods.keeper()
    worker = pods.worker("pod-1")
    wait_for(lambda: find_mount(pods.mountpoint), 30, what="the mount")
    with ExitStack() as stack:
        rounds = Rounds(path)
        stack.callback(rounds.close)
        rounds.next()
        assert [mount["mountpoint"] for mount in helios("status", "--json").json()["mounts"]] == [str(pods.mountpoint)]

        end(worker, signal.SIGKILL)
        worker = pods.worker("pod-1")
        rounds.next()

        successor = pods.worker("pod-2")  # an upgrade
        assert worker.wait(30) == 0
        worker = successor
        rounds.next()

        end(keeper, signal.SIGTERM)
        rounds.next()
        keeper = pods.keeper()
        wait_for(lambda: "another keeper holds" in (tmp_path / "heliosfs.log").read_text(), 30, what="the takeover")
        end(worker, signal.SIGTERM)
        worker = pods.worker("pod-3")
        rounds.next()
        assert len(rounds.digests(60)) == 1
    end(keeper, signal.SIGINT)
    assert worker.wait(30) == 0
    assert find_mount(pods.mountpoint) is None
