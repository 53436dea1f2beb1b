"""A registry on a store in the cloud, with a proxy between the two that sees every request."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from helios.http.client import HttpClient
from tests.support.cloud_proxy import CloudProxy, Seen
from tests.support.cloud_servers import Server, some_prefix
from tests.support.command import Command
from tests.support.hub_site import write
from tests.support.postgres import Databases
from tests.support.registry import Running

LARGE = random.Random(3).randbytes((17 << 20) + 12_345)
"""More than goes up with one request."""
MIDDLE = random.Random(4).randbytes(5 << 20)
SMALL = b'{"hidden": 1}\n' * 20

FILES = {"config.json": SMALL, "data/part 1 (ü).bin": LARGE, "middle.bin": MIDDLE, "empty": b""}


@dataclass
class CloudSite:
    """A registry with ``org/m``; ``proxy`` stands before the store, for the registry and for its clients."""

    registry: Running
    proxy: CloudProxy
    helios: Command
    server: Server
    prefix: str
    commit: str
    log: Path

    @property
    def url(self) -> str:
        return self.registry.url

    def direct(self) -> list[Seen]:
        """Requests of those who have a signed address and nothing else."""
        return [s for s in self.proxy.find("GET") if "authorization" not in s.headers]

    def metric(self, name: str) -> float:
        with contextlib.closing(HttpClient(self.url)) as client:
            text = client.bytes("GET", "/metrics").decode()
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(f"{name} "))


@contextlib.contextmanager
def cloud_site(root: Path, server: Server, databases: Databases = dict, **settings: Any) -> Iterator[CloudSite]:
    """The site, for as long as the block runs; ``settings`` are the registry's."""
    prefix = some_prefix()
    with CloudProxy(server.url) as proxy:
        made = server.settings(endpoint=proxy.url, prefix=prefix)
        environ = {
            "HELIOS_REGISTRY__STORE": made.store,
            "HELIOS_REGISTRY__STORE_OPTIONS": msgspec.json.encode(made.store_options).decode(),
            **{f"HELIOS_REGISTRY__{name.upper()}": str(value) for name, value in settings.items()},
            **server.environ,
            **databases(),
        }
        helios = Command(root / "home", **environ)
        with running(helios, root / "registry.log") as registry:
            commit = helios("push", str(write(root / "model", FILES)), "org/m")
            yield CloudSite(registry, proxy, helios, server, prefix, commit, root / "registry.log")


@contextlib.contextmanager
def running(helios: Command, log: Path) -> Iterator[Running]:
    """A registry whose log goes to a file."""
    with log.open("ab") as out:
        process = helios.start("registry", "--port", "0", "--json", stderr=out.fileno())
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, log.read_text()
            yield Running(process, json.loads(line))
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                code = process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
            process.stdout.close()
        assert code in (0, -signal.SIGKILL)
