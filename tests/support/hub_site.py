"""A registry with a few repositories, for tests of the Hub API."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from helios.launch.tiny_model import TinyShape, tiny_llama
from tests.support.command import Command
from tests.support.registry import Running, running_registry

FILES = {
    "README.md": "# A model, grüß Gott\n".encode(),
    "config.json": b'{"hidden": 1}\n' * 20,
    "weights.safetensors": b"",  # made below
    "data/part 1 (ü).txt": b"text\n" * 100,
    "data/deep/er/x.bin": bytes(range(256)) * 40_000,
    "empty": b"",
    "page.html": b"<script>alert(1)</script>",
}


CARD = b"""---
library_name: transformers
pipeline_tag: text-generation
license: apache-2.0
language: [de, en]
base_model: org/m
datasets: [org/d]
released: 2026-01-31
---
# Hello
"""


def safetensors(seed: int) -> bytes:
    header = json.dumps({"w": {"dtype": "U8", "shape": [5_000_000], "data_offsets": [0, 5_000_000]}}).encode()
    return len(header).to_bytes(8, "little") + header + hashlib.shake_256(b"%d" % seed).digest(5_000_000)


@dataclass
class Site:
    """A registry with org/m (v1, then main), one-segment ``solo``, datasets org/d, the tiny Llama org/tiny and
    org/card, whose README has a head."""

    registry: Running
    files: dict[str, bytes]
    v1: str
    main: str
    tiny: Path
    helios: Command

    @property
    def url(self) -> str:
        return self.registry.url

    def ask(self, method: str, path: str, headers=None, body=None):
        """(status, headers in lower case, body) of one request without a library's help."""
        parts = urlsplit(self.url)
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
        try:
            connection.request(method, path, body=body, headers=headers or {})
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read()
        finally:
            connection.close()

    def json(self, path: str):
        status, _, body = self.ask("GET", path)
        assert status == 200, body
        return json.loads(body)


def write(directory: Path, files: dict[str, bytes]) -> Path:
    for path, data in files.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(data)
    return directory


@contextlib.contextmanager
def hub_site(root: Path, errors: str | None = None, **env: str) -> Iterator[Site]:
    """The site, for as long as the block runs; ``env`` are settings of the registry, ``errors`` what it may log."""
    helios = Command(root / "home", **env)
    old = {**FILES, "weights.safetensors": safetensors(1), "old.txt": b"only in v1"}
    new = {**FILES, "weights.safetensors": safetensors(2)}
    tiny = tiny_llama(root / "models", shape=TinyShape(hidden=64, layers=2, intermediate=128))
    with running_registry(helios, errors=errors) as registry:
        v1 = helios("push", str(write(root / "v1", old)), "org/m@v1", "-m", "The first\n\nwith more to say")
        helios("push", str(write(root / "v1", old)), "org/m@main", "-m", "The first\n\nwith more to say")
        main = helios("push", str(write(root / "new", new)), "org/m", "-m", "The second")
        helios("push", str(root / "v1"), "solo")
        helios("push", str(root / "v1"), "org/d", "--kind", "datasets")
        helios("push", str(tiny), "org/tiny")
        helios("push", str(write(root / "card", {"README.md": CARD, "config.json": b"{}"})), "org/card")
        yield Site(registry, new, v1, main, tiny, helios)


def oid_of(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def pointer(data: bytes) -> bytes:
    sha256 = hashlib.sha256(data).hexdigest()
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n".encode()


def expected_tree(files: dict[str, bytes]) -> dict[str, dict]:
    out = {}
    for path, data in files.items():
        lfs = path.endswith((".bin", ".safetensors"))
        out[path] = {"type": "file", "path": path, "size": len(data), "oid": oid_of(pointer(data) if lfs else data)}
        if lfs:
            sha256 = hashlib.sha256(data).hexdigest()
            out[path]["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": len(pointer(data))}
    return out
