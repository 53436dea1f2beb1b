"""A registry that mirrors a simulated Hub, for tests of pull-through."""

from __future__ import annotations

import hashlib
import http.client
import itertools
import json
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

from helios.errors import RepoNotFound
from helios.names import RepoId
from tests.support.command import Command
from tests.support.postgres import Databases
from tests.support.registry import Running, running_registry
from tests.support.upstream import Upstream

BLOCK = 1 << 20
PIECE = 8 << 20
MB = 1_000_000
TTL_S = 1.0

_numbers = itertools.count()


def blob(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


def weights(size: int) -> bytes:
    """A safetensors file that no registry of this module has seen."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header + blob(next(_numbers), size)


def fresh_files(size: int = 3 * MB) -> dict[str, bytes]:
    number = next(_numbers)
    return {
        "README.md": f"# Grüße {number}\n".encode(),
        "config.json": b'{"number": %d}\n' % number,
        "model.safetensors": weights(size),
        "empty": b"",
    }


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str | None:
        return self.headers.get("x-error-code")


def ask(
    url: str,
    path: str,
    method: str = "GET",
    token: str | None = None,
    timeout: float = 30,
    body: bytes | None = None,
    **headers,
) -> Answer:
    """One request, whose body must have the length that the head says."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout)
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    if token is not None:
        sent["authorization"] = f"Bearer {token}"
    try:
        connection.request(method, path, body=body, headers=sent)
        answer = connection.getresponse()
        return Answer(answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read())
    finally:
        connection.close()


@dataclass
class Site:
    """A registry that mirrors a Hub, and a repository that is new to it."""

    hub: Upstream
    registry: Running
    helios: Command
    repo: str
    files: dict[str, bytes]

    def commit(self, files=None, **options) -> str:
        return self.hub.commit(self.repo, self.files if files is None else files, **options)

    def get(self, path: str, revision: str = "main", **options) -> Answer:
        return ask(self.registry.url, f"/{self.repo}/resolve/{revision}/{path}", **options)

    def head(self, path: str, revision: str = "main", **options) -> Answer:
        return self.get(path, revision, method="HEAD", **options)

    def api(self, path: str = "", **options) -> Answer:
        return ask(self.registry.url, f"/api/models/{self.repo}{path}", **options)

    def native(self, path: str) -> Answer:
        return ask(self.registry.url, f"/api/v1/{path}")

    def held(self) -> dict[str, str]:
        """The refs that nodes of this machine see; none as long as nothing is published."""
        client = self.registry.client(self.registry.socket)
        try:
            return client.refs(RepoId.parse(self.repo))
        except RepoNotFound:
            return {}
        finally:
            client.close()


RULES = [
    {"repo": "pinned/*", "policy": "pin"},
    {"repo": "slow/*", "ref": "main", "policy": "approve", "ttl_s": 0.5},
    {"repo": "ours/*", "policy": "local"},
    {"repo": "brief/*", "ttl_s": TTL_S},
]


@contextmanager
def mirror(root: Path, hub_url: str, **env: str) -> Iterator[tuple[Command, Running]]:
    settings = {
        "HELIOS_REGISTRY__UPSTREAM": hub_url,
        "HELIOS_REGISTRY__MIRROR": "on",
        "HELIOS_REGISTRY__PULL_STALL_S": "3",
        "HELIOS_REGISTRY__MIRROR_RULES": json.dumps(RULES),
    }
    helios = Command(root, **(settings | env))
    with running_registry(helios) as registry:
        yield helios, registry


def fresh_name(org: str = "org") -> str:
    """A repository that no test has used; ``RULES`` has organisations whose refs are followed in other ways."""
    return f"{org}/m{next(_numbers)}"


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextmanager
def shared_site(root: Path, **env: str) -> Iterator[Site]:
    """A Hub and a registry that many tests use one after the other; see ``renewed``."""
    with Upstream() as hub, mirror(root / "home", hub.url, **env) as (helios, registry):
        yield Site(hub, registry, helios, "", {})


@contextmanager
def renewed(shared: Site, files: dict[str, bytes]) -> Iterator[Site]:
    """The shared site with a repository of its own, without the faults and requests of other tests."""
    hub = shared.hub
    with hub.lock:
        hub.seen, hub.faults, hub.bytes_per_s = [], [], None
    yield replace(shared, repo=fresh_name(), files=files)
    hub.faults, hub.bytes_per_s = [], None
    assert hub.violations == []


@contextmanager
def own_site(root: Path, size: int, databases: Databases = dict) -> Iterator[tuple[Upstream, Callable[..., Site]]]:
    """A Hub and a home of the test's own; the second value starts a registry there, with a database for each home."""
    with Upstream() as hub, ExitStack() as stack:
        database = cache(lambda _name: databases())

        def open_(name: str = "home", files: dict[str, bytes] | None = None, **env: str) -> Site:
            helios, registry = stack.enter_context(mirror(root / name, hub.url, **{**database(name), **env}))
            return Site(hub, registry, helios, "org/m", files or fresh_files(size))

        yield hub, open_
        assert hub.violations == []
