"""A real registry for a test: ``helios registry`` on the test's home."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
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

UNWATCHED = ""
"""For ``errors``, and found in every line: where nobody has yet seen what the registries of a module log."""


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


@contextlib.contextmanager
def running_registry(helios: Any, *args: str, errors: str | None = None) -> Iterator[Running]:
    """Start one with a free port; at the end it must stop within 15 s of SIGTERM and exit 0, unless it was killed.

    It logs to a file of its own beside ``helios.home``. In the end that may hold no error and no traceback, but for
    those in which the regular expression ``errors`` is found, or one given to ``expect_errors``.
    """
    log = _new_log(helios.home)
    with log.open("wb") as file:
        process = helios.start("registry", "--port", "0", "--json", *args, stderr=file.fileno())
    line = process.stdout.readline()
    assert line, f"the registry did not start: exit {process.wait(5)}\n{log.read_text(errors='replace')}"
    found = Running(process, json.loads(line), log, [] if errors is None else [errors])
    try:
        yield found
    except Exception as error:
        for problem in found.problems():
            error.add_note(f"{log.name}: {problem}")
        raise
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            code = process.wait(15)
        else:
            code = process.returncode
        process.stdout.close()
    assert code in (0, -signal.SIGKILL)
    if problems := found.problems():
        pytest.fail(f"{log} has what no test expects:\n" + "\n".join(problems), pytrace=False)


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
