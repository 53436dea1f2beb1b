"""The whole path with real vLLM. A start takes half a minute to two, so the tests share what they start."""

from __future__ import annotations

import os
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import pytest

from helios.home import Home
from tests.conftest import HELIOS, Result, leftovers

VLLM_START_S = 300.0
"""Longest start of vLLM on two busy cores, in seconds."""

SETTLE_S = 0.5


def environment(home: Home, **extra: str) -> dict[str, str]:
    return {**os.environ, "HELIOS_HOME": str(home.root), **extra}


def run(home: Home, *args: str, timeout_s: float = 60, **env: str) -> Result:
    """Run a helios command to its end."""
    done = subprocess.run(
        [str(HELIOS), *args],
        env=environment(home, **env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


@dataclass
class Running:
    """A helios command that stays; its output is read as it comes."""

    process: subprocess.Popen[str]
    out: list[str] = field(default_factory=list)
    err: list[str] = field(default_factory=list)
    _seen: queue.Queue[None] = field(default_factory=queue.Queue)
    _readers: list[threading.Thread] = field(default_factory=list)

    @classmethod
    def start(cls, home: Home, *args: str, **env: str) -> Running:
        process = subprocess.Popen(
            [str(HELIOS), *args],
            env=environment(home, **env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self = cls(process)
        for pipe, lines in ((process.stdout, self.out), (process.stderr, self.err)):
            assert pipe is not None
            self._readers.append(threading.Thread(target=self._read, args=(pipe, lines), daemon=True))
            self._readers[-1].start()
        return self

    def _read(self, pipe: IO[str], lines: list[str]) -> None:
        with pipe:
            for line in pipe:
                lines.append(line.rstrip("\n"))
                self._seen.put(None)

    def wait_for(self, text: str, timeout_s: float = VLLM_START_S) -> str:
        """The first line, of either stream, that holds the text."""
        end = time.monotonic() + timeout_s
        while True:
            for line in [*self.out, *self.err]:
                if text in line:
                    # Two threads read the two streams: what the other one was told before may come a moment later.
                    time.sleep(SETTLE_S)
                    return line
            if self.process.poll() is not None:
                pytest.fail(f"ended with {self.process.returncode} before it printed {text!r}:\n{self.text()}")
            try:
                self._seen.get(timeout=max(0.01, min(1.0, end - time.monotonic())))
            except queue.Empty:
                if time.monotonic() > end:
                    pytest.fail(f"did not print {text!r} within {timeout_s:g} s:\n{self.text()}")

    def text(self) -> str:
        return "\n".join([*self.out, *self.err])

    def wait(self, timeout_s: float = 60) -> int:
        """Wait for its end and that of its output; the exit code."""
        code = self.process.wait(timeout_s)
        for reader in self._readers:
            reader.join(10)
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.wait()


@pytest.fixture(scope="session")
def shared_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """One home for the tests that build on each other; nothing may be left of it at the end."""
    base = tmp_path_factory.mktemp("quickstart")
    home = Home(base / "home")
    yield home
    assert leftovers(home, base) == []


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    """``Running.start`` for what the test itself ends; whatever it has not ended is ended here."""
    started: list[Running] = []

    def begin(home: Home, *args: str, **env: str) -> Running:
        started.append(Running.start(home, *args, **env))
        return started[-1]

    yield begin
    for running in started:
        running.close()


@pytest.fixture
def nothing_left(tmp_path_factory: pytest.TempPathFactory) -> object:
    def check(home: Home, grace_s: float = 5.0) -> None:
        assert leftovers(home, Path(home.root).parent, grace_s) == []

    return check
