"""Every call of the OpenAPI document, asked with what makes no sense: each answers with a clear 4xx.

The calls are those of the document, and test_openapi.py holds that there are no others: a new one is in here by itself.
"""

from __future__ import annotations

import json
import os
import select
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

import pytest

from registry.api.openapi.describe import Operation, Param
from registry.api.openapi.document import GROUPS
from tests.integration.test_bad_requests import DEEP, MIB, raw, request, rss, status
from tests.support.command import Command
from tests.support.hub_site import Site, write
from tests.support.registry import running_registry

pytestmark = pytest.mark.both_databases

CALLS = [op for table in GROUPS.values() for op in table]
WITH_BODY = [op for op in CALLS if op.body is not None]
SIZE = 7777
"""Of the file that is announced and never comes."""

WRONG = ["%2e%2e%2f%2e%2e%2fetc%2fpasswd", "a%00b", "a%0d%0ab", "%ff", "x" * 5000]
NAMES = {"RepoName", "CommitId", "RevisionName", "RefName", "Sha256", "Path"}
"""Parameters for which none of these is good; others may be any text, or are read with forbearance, as the Hub does."""


@dataclass
class Scene:
    """``known`` are names that there are, for what a call asks for beside the one that is wrong."""

    site: Site
    known: dict[str, str]

    def path(self, op: Operation, wrong: str = "", text: str = "") -> str:
        """A call with ``text`` for the placeholder or parameter ``wrong``; the others are good."""
        values = self.known | ({wrong: text} if wrong else {})
        path = op.path
        for name, value in values.items():
            path = path.replace(f"{{{name}}}", value)
        asked = [p.name for p in op.params if p.where == "query" and (p.required or p.name == wrong)]
        return path + "".join(f"{'&' if n else '?'}{name}={values[name]}" for n, name in enumerate(asked))


@pytest.fixture(scope="module")
def scene(tmp_path_factory, databases) -> Iterator[Scene]:
    root = tmp_path_factory.mktemp("everywhere")
    settings = {"HELIOS_REGISTRY__OFFLINE": "true", "HELIOS_LOG__FORMAT": "json", **databases()}
    helios = Command(root / "home", **settings)
    with running_registry(helios) as registry:
        files = write(root / "m", {"config.json": b"{}", "w.bin": os.urandom(200_000)})
        commit = helios("push", str(files), "org/m")
        site = Site(registry, {}, "", commit, root, helios)
        wanted = {"repo": "models/org/new", "files": [{"path": "config.json", "size": SIZE}]}
        push = json.loads(site.ask("POST", "/api/v1/pushes", None, json.dumps(wanted).encode())[2])["push"]
        batch = {"operation": "upload", "objects": [{"oid": "ab" * 32, "size": SIZE}]}
        answer = site.ask("POST", "/org/m.git/info/lfs/objects/batch", None, json.dumps(batch).encode())[2]
        grant = json.loads(answer)["objects"][0]["actions"]["upload"]["href"].rpartition("/")[2]
        placement = site.json(f"/api/v1/content?repo=models/org/m&commit={commit}")["blobs"][0]["placement"]
        known = {
            "kind": "models", "org": "org", "name": "m", "revision": "main", "path": "config.json", "what": "write",
            "key": placement["objects"][0]["key"], "push": push, "grant": grant, "file": "0" * 64, "xorb": "0" * 64,
            "spool": "0" * 32, "repo": "models/org/m", "ref": "main", "rev": "main", "commit": commit,
            "blob": placement["blob"], "content": "sha256-" + "0" * 64, "namespace": "default",
        }  # fmt: skip
        yield Scene(site, known)
        assert site.json("/api/models/org/m")["sha"] == commit
        assert site.json(f"/api/v1/pushes/{push}") == {"files": 0, "bytes": 0}, "it can be gone on with"


def check(op: Operation, path: str, found: bytes, *, strict: bool) -> None:
    """It is a 4xx that says something; where any text is fine it is at least no 5xx."""
    said = (op.method, path[:300], found[:400])
    assert status(found) < 500, said
    if strict:
        assert status(found) >= 400, said
    head, _, body = found.partition(b"\r\n\r\n")
    if status(found) >= 400 and op.method != "HEAD" and b"application/json" in head:
        assert json.loads(body)["error"], said


def exact(parameter: Param) -> bool:
    """Whether no wrong text is good for the parameter."""
    if isinstance(parameter.schema, str):
        return parameter.schema in NAMES
    return parameter.schema.get("type") in ("integer", "number") or "pattern" in parameter.schema


@pytest.mark.parametrize("op", CALLS, ids=lambda op: f"{op.method} {op.path}")
def test_names_and_numbers(scene: Scene, op: Operation) -> None:
    """In the path and in the query, one at a time, with all others as they should be."""
    places = {name: True for name in scene.known if f"{{{name}}}" in op.path}
    places |= {p.name: exact(p) for p in op.params if p.where == "query"}
    for place, strict in places.items():
        for text in WRONG:
            path = scene.path(op, place, text)
            body = b"{}" if op.body is not None else b""
            check(op, path, raw(scene.site, request(op.method, path, body=body)), strict=strict)


NONSENSE = [DEEP, b'{"a":' * 100_000, b"\xff\xfe{}", b"nul", b"[]", b"1", b'"text"', b"\0" * 100, b'{"a": 1e999']


@pytest.mark.one_database
@pytest.mark.parametrize("op", WITH_BODY, ids=lambda op: f"{op.method} {op.path}")
def test_bodies(scene: Scene, op: Operation) -> None:
    path = scene.path(op)
    for body in [*NONSENSE, *([b'{"unknown": 1}'] if path.startswith("/api/v1/") else [])]:
        found = raw(scene.site, request(op.method, path, "content-type: application/json", body=body))
        check(op, f"{path} {body[:40]!r}", found, strict=True)


@pytest.mark.one_database
@pytest.mark.parametrize("op", WITH_BODY, ids=lambda op: f"{op.method} {op.path}")
def test_bodies_that_are_too_long(scene: Scene, op: Operation) -> None:
    """More is announced than anything may have, and sent until somebody says something: nothing of it is kept."""
    before = rss(scene.site)
    parts = urlsplit(scene.site.url)
    head = f"{op.method} {scene.path(op)} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    found = bytearray()
    with socket.create_connection((parts.hostname, parts.port), timeout=30) as sock:
        sock.sendall(head.encode() + b"content-length: %d\r\n\r\n" % (1 << 50))
        try:
            for _ in range(100):
                if select.select([sock], [], [], 0)[0]:
                    break
                sock.sendall(b"x" * MIB)
            while b"\r\n\r\n" not in found and (part := sock.recv(65536)):
                found += part
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has closed the connection while more was coming; then its answer may be lost
    assert not found or 400 <= status(bytes(found)) < 500, bytes(found[:400])
    assert rss(scene.site) - before < 120 * MIB
    assert scene.site.ask("GET", "/readyz")[0] == 200


@pytest.mark.one_database
def test_other_methods(scene: Scene) -> None:
    """405, and which ones there are."""
    for op in CALLS:
        path = scene.path(op)
        found = raw(scene.site, request("PATCH", path))
        head = found.partition(b"\r\n\r\n")[0].decode("latin-1").lower()
        (allowed,) = [line for line in head.splitlines() if line.startswith("allow:")] or [""]
        assert (status(found), op.method.lower() in allowed) == (405, True), (op.method, path, found[:300])
