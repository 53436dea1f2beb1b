"""A real registry for a test: ``helios registry`` on the test's home."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from helios.http.client import HttpClient
from helios.registry_client import RegistryClient
from tests.conftest import error_lines

_CRASH = re.compile(
    r"^(?!\{).*(?:Fatal Python error|Traceback \(most recent call last\)|Exception ignored).*(?:\n(?!\{).*)*",
    re.MULTILINE,
)
"""What Python prints of an error that nobody caught, up to the next record."""


@dataclass
class Running:
    """A registry that answers."""

    process: subprocess.Popen[str]
    record: dict[str, Any]
    logs_to: Path | None = None
    expected: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return str(self.record["url"])

    @property
    def socket(self) -> str:
        return f"unix:{self.record['socket']}"

    @property
    def pid(self) -> int:
        return int(self.record["pid"])

    @property
    def log(self) -> Path:
        """The log of one that ``running_registry`` has started."""
        assert self.logs_to is not None, "its log is kept by whoever started it"
        return self.logs_to

    def expect_errors(self, pattern: str) -> None:
        """From what is done next its log may have errors in which the regular expression is found."""
        self.expected.append(pattern)

    def problems(self) -> list[str]:
        """What its log tells of errors that nobody has said to expect."""
        return [line for line in log_problems(self.log) if not any(re.search(each, line) for each in self.expected)]

    def client(self, base: str | None = None) -> RegistryClient:
        """Over TCP, or over the unix socket with ``base=running.socket``."""
        base = base or self.url
        return RegistryClient(HttpClient(base), local=base.startswith("unix:"))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)


Start = Callable[[int], "subprocess.Popen[str]"]
"""Starts ``helios registry --json``, whose standard error is this descriptor."""


class Registries:
    """Registries that log to files beside ``home``, and end together: within 20 s of SIGTERM, with exit 0 unless they
    were killed. In the end their logs may hold no error and no traceback, but for those in which the regular expression
    ``errors`` is found, or one given to ``expect_errors``."""

    def __init__(self, home: Path, errors: str | None = None) -> None:
        self._home, self._errors = home, errors
        self._running: list[Running] = []

    def start(self, *starts: Start) -> list[Running]:
        """Start processes, all at the same time."""
        for start in starts:
            log = _new_log(self._home)
            with log.open("wb") as file:
                process = start(file.fileno())
            self._running.append(Running(process, {}, log, [] if self._errors is None else [self._errors]))
        for one in self._running[-len(starts) :]:
            assert one.process.stdout is not None
            line = one.process.stdout.readline()
            if not line:
                code = one.process.wait(5)
                pytest.fail(f"the registry did not start: exit {code}\n{one.log.read_text(errors='replace')}")
            one.record = json.loads(line)
        return self._running[-len(starts) :]

    def __enter__(self) -> Registries:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        codes = self._end()
        found = [f"{one.log.name}: {problem}" for one in self._running for problem in one.problems()]
        if error is not None:
            for problem in found:
                error.add_note(problem)
            return
        assert all(code in (0, -signal.SIGKILL) for code in codes), codes
        if found:
            pytest.fail("registries have logged what no test expects:\n" + "\n".join(found), pytrace=False)

    def _end(self) -> list[int]:
        for one in self._running:
            if one.process.poll() is None:
                one.process.send_signal(signal.SIGTERM)
        codes = []
        for one in self._running:
            codes.append(one.process.wait(20))
            assert one.process.stdout is not None
            one.process.stdout.close()
        return codes


@contextlib.contextmanager
def running_registry(helios: Any, *args: str, errors: str | None = None) -> Iterator[Running]:
    """Start one with a free port, as ``Registries`` does."""
    with Registries(helios.home, errors) as registries:
        yield from registries.start(lambda log: helios.start("registry", "--port", "0", "--json", *args, stderr=log))


def _new_log(home: Path) -> Path:
    """An empty file beside the home, whose number tells how many registries were started on it before."""
    home.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        path = home.with_name(f"{home.name}-registry-{number}.log")
        with contextlib.suppress(FileExistsError):
            path.touch(exist_ok=False)
            return path
    raise AssertionError("numbers do not end")


def log_problems(path: Path) -> list[str]:
    """What a daemon's log tells of errors: its own records, and what Python prints of one that nobody caught."""
    return error_lines(path) + [crash.strip() for crash in _CRASH.findall(path.read_text(errors="replace"))]
