"""A real registry for a test: ``helios registry`` on the test's home."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from helios.http.client import HttpClient
from helios.registry_client import RegistryClient


@dataclass
class Running:
    """A registry that answers."""

    process: subprocess.Popen[str]
    record: dict[str, Any]

    @property
    def url(self) -> str:
        return str(self.record["url"])

    @property
    def socket(self) -> str:
        return f"unix:{self.record['socket']}"

    @property
    def pid(self) -> int:
        return int(self.record["pid"])

    def client(self, base: str | None = None) -> RegistryClient:
        """Over TCP, or over the unix socket with ``base=running.socket``."""
        base = base or self.url
        return RegistryClient(HttpClient(base), local=base.startswith("unix:"))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)


@contextlib.contextmanager
def running_registry(helios: Any, *args: str, stderr: int = subprocess.DEVNULL) -> Iterator[Running]:
    """Start one with a free port; at the end it must stop within 15 s of SIGTERM and exit 0, unless it was killed."""
    process = helios.start("registry", "--port", "0", "--json", *args, stderr=stderr)
    line = process.stdout.readline()
    assert line, f"the registry did not start: exit {process.wait(5)}"
    found = Running(process, json.loads(line))
    try:
        yield found
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            code = process.wait(15)
        else:
            code = process.returncode
        process.stdout.close()
    assert code in (0, -signal.SIGKILL)
