"""What no well-behaved client sends gets a clear 4xx, costs no memory, and leaves no error in the log."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest

from heliosfs.store.recipe import MAX_BLOB
from tests.support.command import Command
from tests.support.hub_site import Site, write
from tests.support.registry import running_registry

pytestmark = pytest.mark.both_databases

BIG = 2**64
HUGE = 10**400
MIB = 1 << 20


@pytest.fixture(scope="module")
def site(tmp_path_factory, databases):
    root = tmp_path_factory.mktemp("bad")
    settings = {"HELIOS_REGISTRY__OFFLINE": "true", "HELIOS_LOG__FORMAT": "json", **databases()}
    helios = Command(root / "home", **settings)
    with running_registry(helios) as registry:
        files = write(root / "m", {"config.json": b"{}", "w.bin": os.urandom(200_000)})
        yield Site(registry, {}, "", helios("push", str(files), "org/m"), root, helios)


def raw(site: Site, data: bytes, *, finish: bool = False, timeout_s: float = 20) -> bytes:
    """What comes back for these bytes, until the server closes the connection or a head is here and no more to come.

    ``finish``: no more is sent, and the server is told so.
    """
    parts = urlsplit(site.url)
    out = bytearray()
    with socket.create_connection((parts.hostname, parts.port), timeout=timeout_s) as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has heard enough
            sock.sendall(data)
            if finish:
                sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while part := sock.recv(65536):
                out += part
                if b"\r\n\r\n" in out and b"connection: close" not in data:
                    break
    return bytes(out)


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def request(method: str, path: str, *headers: str, body: bytes = b"") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: x", "connection: close", *headers]
    if body and not any(line.lower().startswith(("content-length", "transfer-encoding")) for line in headers):
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join(lines).encode("utf-8", "surrogateescape") + b"\r\n\r\n" + body


LONG = "x" * 5000
IDS = [
    "..",
    ".",
    "%2e%2e",
    "a%2fb",
    "a%00",
    "a%0a",
    "a%ff",
    "%E2%80%AE",
    quote("ü"),
    LONG,
    "-a",
    "a--b",
    "_",
    "@a",
    "%25",
]
REVISIONS = [*IDS, "refs%2f..%2fmain", "main%2f", "%2fmain", "main.lock", "0" * 41, "G" * 40, "main@{1}"]
READS = [
    "/api/v1/refs?repo=models/{}", "/api/v1/resolve?repo=models/org/m&rev={}", "/api/v1/usage?repo={}",
    "/api/v1/manifest?repo=models/org/m&commit={}", "/api/v1/recipe?repo=models/org/m&blob={}",
    "/api/v1/placements?repo=models/org/m&blob={}", "/api/v1/refs/history?repo=models/org/m&limit={}",
    "/api/v1/objects/{}", "/api/v1/objects/public/{}", "/api/v1/pushes/{}", "/api/v1/bundles?rev={}",
    "/api/v1/bundles?rev=models/org/m@{}", "/api/v1/quarantine?released={}",
    "/api/v1/signature?repo=models/org/m&commit={}",
    "/api/models/{}/x", "/api/models/org/{}", "/api/models/org/m/revision/{}", "/api/models/org/m/tree/{}",
    "/api/models/org/m/tree/main/{}", "/api/models/org/m/tree/main?cursor={}", "/api/models/org/m/tree/main?limit={}",
    "/api/models/org/m/commits/main?p={}", "/api/models?sort={}", "/api/models?cursor={}", "/api/models?limit={}",
    "/org/m/resolve/{}/config.json", "/org/m/resolve/main/{}", "/{}/m/resolve/main/config.json",
    "/api/models/org/m/auth-check/{}", "/api/models/org/m/safetensors-metadata/{}", "/t/{}/api/models/org/m",
    "/xet/v1/reconstructions/{}", "/xet/v1/xorbs/{}?grant={}", "/api/models/org/m/refs?include_prs={}",
]  # fmt: skip
MAY_PASS = ("include_prs", "cursor=")


@pytest.mark.parametrize("template", READS)
def test_malformed_names(site, template):
    for text in REVISIONS:
        path = template.replace("{}", text)
        found = raw(site, request("GET", path))
        assert 400 <= status(found) < 500 or (status(found) == 200 and acceptable(template, text)), (
            path[:200],
            found[:300],
        )
        head, _, body = found.partition(b"\r\n\r\n")
        if b"application/json" in head and status(found) >= 400:
            assert json.loads(body)["error"], path


def acceptable(template: str, text: str) -> bool:
    """Whether the text is a fine value there after all."""
    return any(word in template for word in MAY_PASS) or (text in (".", "..", "%2e%2e") and "tree/main/" in template)


@pytest.mark.one_database
@pytest.mark.parametrize("header", [
    "bytes=", "bytes=-", "bytes=a-b", "bytes=5-1", "bytes=--1", "bytes=0-0,", "bytes=1-2-3", "bytes = 0-1", "=0-1",
    f"bytes=0-{BIG}", f"bytes={BIG}-", f"bytes=-{BIG}", f"bytes={HUGE}-{HUGE}", "bytes=-0", "bytes=0-0,0-0,0-0",
    "bytes=" + ",".join(["0-0"] * 5000), "bytes=١-٢", "bytes=+1-2", "bytes=0x1-0x2", "bytes=1e3-", "lines=1-2", "bytes",
])  # fmt: skip
def test_malformed_ranges(site, header):
    """As RFC 9110 has it: what is no range counts as none, one that lies outside is 416."""
    placed = site.json(f"/api/v1/content?repo=models/org/m&commit={site.main}")["blobs"][0]["placement"]
    for path in (placed["objects"][0]["url"], "/org/m/resolve/main/w.bin"):
        found = raw(site, request("GET", path, f"range: {header}"))
        assert status(found) in (200, 206, 416, 400), found[:300]
        assert len(found.partition(b"\r\n\r\n")[2]) in (0, 200_000, 1, 2) or status(found) == 400


PUSHES = b"POST /api/v1/pushes HTTP/1.1\r\nhost: x\r\n"
CHUNKED = PUSHES + b"transfer-encoding: chunked\r\n\r\n"
HEADS = {
    "no host": b"GET /healthz HTTP/1.1\r\n\r\n",
    "two lengths": PUSHES + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}",
    "length and chunks": PUSHES + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "negative length": PUSHES + b"content-length: -2\r\n\r\n{}",
    "huge length": PUSHES + b"content-length: %d\r\n\r\n{}" % HUGE,
    "chunked garbage": CHUNKED + b"zz\r\n{}\r\n0\r\n\r\n",
    "huge chunk": CHUNKED + b"ffffffffffffffffff\r\n{}",
    "unknown coding": PUSHES + b"transfer-encoding: gzip\r\n\r\n{}",
    "short body": PUSHES + b"content-length: 100\r\n\r\n{}",
    "line feeds in a header": b"GET /healthz HTTP/1.1\r\nhost: x\r\nx: a\nb: c\r\n\r\n",
    "NUL in a header": b"GET /healthz HTTP/1.1\r\nhost: x\r\nx: a\0b\r\n\r\n",
    "bytes that are no text": b"GET /\xff\xfe HTTP/1.1\r\nhost: \xff\r\nx: \xff\r\n\r\n",
    "another protocol": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(300),
    "another version": b"GET /healthz HTTP/9.9\r\nhost: x\r\n\r\n",
    "no method": b" /healthz HTTP/1.1\r\nhost: x\r\n\r\n",
    "a strange method": b"BREW /healthz HTTP/1.1\r\nhost: x\r\n\r\n",
    "a long method": b"A" * 100_000 + b" / HTTP/1.1\r\nhost: x\r\n\r\n",
    "a long path": b"GET /" + b"a" * 10 * MIB + b" HTTP/1.1\r\nhost: x\r\n\r\n",
    "a long header": b"GET /healthz HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 10 * MIB + b"\r\n\r\n",
    "a million headers": b"GET /healthz HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 1_000_000 + b"\r\n",
    "an absolute target": b"GET http://169.254.169.254/latest HTTP/1.1\r\nhost: x\r\n\r\n",
    "an upgrade": b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
    "two authorizations": b"GET /api/v1/repos HTTP/1.1\r\nhost: x\r\n" + b"authorization: Bearer a\r\n" * 2 + b"\r\n",
    "an empty host": b"GET /api/models?limit=1 HTTP/1.1\r\nhost:\r\n\r\n",
}  # fmt: skip


@pytest.mark.one_database
@pytest.mark.parametrize("name", HEADS)
def test_requests_that_are_hardly_http(site, name):
    before = rss(site)
    found = raw(site, HEADS[name], finish=name in ("short body", "huge length", "huge chunk"))
    if found:  # some are worth no answer, only a closed connection
        assert status(found) < 500, found[:300]
    assert site.ask("GET", "/readyz")[0] == 200
    assert rss(site) - before < 64 * MIB


@pytest.mark.one_database
def test_heads_that_never_end_are_cut_off(site):
    """A connection may not make the registry keep what it sends for ever."""
    parts, before = urlsplit(site.url), rss(site)
    with socket.create_connection((parts.hostname, parts.port), timeout=30) as sock:
        sock.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\n")
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            sock.sendall((b"x: " + b"a" * 60_000 + b"\r\n") * 4000)
    assert rss(site) - before < 64 * MIB
    assert site.ask("GET", "/readyz")[0] == 200


NUMBERS = [BIG, -BIG, 2**63, 2**62, -1, HUGE, 1.5, 1e308, -0.0]
PUSH = {"repo": "models/org/new", "files": [{"path": "a", "size": 1}]}
DEEP = b"[" * 200_000 + b"]" * 200_000
JSON_CALLS = [
    ("POST", "/api/v1/pushes"), ("PUT", "/api/v1/refs?repo=models/org/m&ref=x"), ("PUT", "/api/v1/notices"),
    ("PUT", "/api/v1/leases"), ("POST", "/api/v1/gc"), ("POST", "/api/v1/verify"), ("POST", "/api/v1/pulls"),
    ("POST", "/api/v1/compress"),
    ("POST", "/api/v1/replications"), ("POST", "/api/v1/mirror/approve"), ("POST", "/api/v1/quarantine/release"),
    ("POST", "/api/repos/create"), ("DELETE", "/api/repos/delete"), ("POST", "/api/validate-yaml"),
    ("POST", "/api/models/org/m/preupload/main"), ("POST", "/api/models/org/m/commit/main"),
    ("POST", "/api/models/org/m/branch/new"), ("POST", "/api/models/org/m/tag/main"),
    ("POST", "/org/m.git/info/lfs/objects/batch"), ("POST", "/org/m.git/info/lfs/objects/verify"),
    ("POST", "/api/models/org/m/paths-info/main"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), JSON_CALLS)
def test_bodies_that_make_no_sense(site, method, path):
    for body in (
        DEEP, b'{"a":' * 100_000, b"\xff\xfe{}", b'"', b"nul", b"NaN", b'{"repo": NaN}', b"[]", b"1", b'"text"',
        b"null", b'{"repo": "\\ud800"}', b"\0" * 100, b"\xef\xbb\xbf{}", b'{"repo": "a", "repo": "b"}',
        b'{"seconds": 1e999, "sample": 1e999, "holder": "x", "repo": "models/org/m", "commit": "' + b"0" * 40 + b'"}',
    ):  # fmt: skip
        found = raw(site, request(method, path, "content-type: application/json", body=body))
        jobs = ("/api/v1/gc", "/api/v1/verify", "/api/v1/compress")
        accepted = path in (*jobs, "/api/models/org/m/branch/new", "/api/validate-yaml")
        assert 400 <= status(found) < 500 or (accepted and status(found) == 200), (path, body[:50], found[:300])


@pytest.mark.parametrize("number", NUMBERS)
def test_numbers_that_no_database_holds(site, number):
    """Beyond 64 bits, negative, or no integers at all."""
    lease = {"holder": "h", "repo": "models/org/m", "commit": site.main}
    batch = {"operation": "upload", "objects": [{"oid": "0" * 64, "size": number}]}
    header = json.dumps({"key": "header", "value": {"summary": "s"}}) + "\n"
    lfs = json.dumps({"key": "lfsFile", "value": {"path": "n", "oid": "0" * 64, "size": number}})
    for method, path, body in (
        ("POST", "/api/v1/pushes", json.dumps(PUSH | {"files": [{"path": "a", "size": number}]})),
        ("PUT", "/api/v1/leases", json.dumps(lease | {"seconds": number})),
        ("POST", "/api/v1/verify", json.dumps({"repo": "models/org/m", "sample": number})),
        ("POST", "/api/v1/compress", json.dumps({"repo": "models/org/m", "unread_s": number, "dry_run": True})),
        ("POST", "/org/m.git/info/lfs/objects/batch", json.dumps(batch)),
        ("POST", "/org/m.git/info/lfs/objects/verify", json.dumps({"oid": "0" * 64, "size": number})),
        ("POST", "/api/models/org/m/preupload/main", json.dumps({"files": [{"path": "a", "size": number}]})),
        ("POST", "/api/models/org/m/commit/main", header + lfs),
        ("GET", f"/api/v1/commits?repo=models/org/m&rev=main&limit={number}", ""),
        ("GET", f"/api/models/org/m/commits/main?p={number}", ""),
        ("GET", f"/api/v1/placements?repo=models/org/m&blob={'0' * 64}&doubt={number}", ""),
        ("PUT", f"/api/v1/pushes/{number}/files?path=a", "x"),
    ):  # fmt: skip
        found = raw(site, request(method, path, "content-type: application/json", body=body.encode()))
        # A batch answers for each object; a lease of 0 s ends one, and nothing of a sample of 0 is looked at.
        fine = (
            path.endswith("batch")
            or (path.endswith("preupload/main") and number == 2**62)
            or (number in (1.5, -0.0) and "json" in found.decode("latin-1"))
        )
        assert 400 <= status(found) < 500 or (fine and status(found) == 200), (path[:100], found[:400])


NUL = "a\0b"
NOTICE = {"repo": "models/org/m", "state": "deprecated", "message": "old"}
PRIORITY = {"repo": "models/org/m", "priority": "normal"}
LEASE = {"repo": "models/org/m", "commit": "COMMIT", "holder": "h", "seconds": 1}
RELEASE = {"repo": "models/org/m", "sha256": "0" * 64, "by": "me"}
REPORT = {"node": "n", "reporter": "ab" * 8, "sequence": 1, "rows": []}
TEXTS = [
    ("POST", "/api/v1/pushes", PUSH | {"message": NUL}),
    ("POST", "/api/v1/pushes", PUSH | {"files": [{"path": NUL, "size": 1}]}),
    ("PUT", "/api/v1/refs?repo=models/org/m&ref=main", {"commit": "COMMIT", "expect": "COMMIT", "author": NUL}),
    ("PUT", "/api/v1/refs?repo=models/org/m&ref=main", {"commit": "COMMIT", "expect": NUL}),
    *(("PUT", "/api/v1/notices", NOTICE | {name: NUL}) for name in ("message", "author", "replacement", "commit")),
    *(("PUT", "/api/v1/priorities", PRIORITY | {name: NUL}) for name in ("ref", "author")),
    *(("PUT", "/api/v1/leases", LEASE | {name: NUL}) for name in ("holder", "commit")),
    *(("POST", "/api/v1/quarantine/release", RELEASE | {name: NUL}) for name in ("sha256", "by")),
    *(("POST", "/api/v1/usage/reads", REPORT | {name: NUL}) for name in ("node", "reporter")),
    ("POST", "/api/models/org/m/tag/main", {"tag": "t", "message": NUL}),
    ("POST", "/api/models/org/m/tag/main", {"tag": NUL}),
    ("POST", "/api/models/org/m/paths-info/main", {"paths": [NUL], "expand": False}),
    ("POST", "/org/m.git/info/lfs/objects/batch", {"operation": "upload", "objects": [{"oid": NUL, "size": 1}]}),
    ("DELETE", "/api/v1/refs?repo=models/org/m&ref=a%00b", None),
    ("DELETE", "/api/v1/refs?repo=models/org/m&ref=main&expect=a%00b", None),
    ("DELETE", "/api/v1/priorities?repo=models/org/m&ref=a%00b", None),
    ("GET", "/api/v1/refs/history?repo=models/org/m&ref=a%00b", None),
    ("PUT", "/api/v1/pushes/a%00b/files?path=a", None),
    ("POST", "/api/v1/pushes/a%00b/commit", None),
    ("DELETE", "/api/v1/pushes/a%00b", None),
]


@pytest.mark.parametrize(("method", "path", "wanted"), TEXTS, ids=range(len(TEXTS)))
def test_texts_that_not_every_database_holds(site, method, path, wanted):
    """PostgreSQL keeps no NUL character. SQLite does, and may."""
    body = b"" if wanted is None else json.dumps(wanted).replace("COMMIT", site.main).encode()
    found = raw(site, request(method, path, body=body))
    assert status(found) < 500, found[:300]
    assert site.json("/api/models/org/m")["sha"] == site.main


def test_sizes_that_no_store_has_are_told_for_each_object(site):
    """Whoever could announce them could have a list of their chunks made, which no memory holds."""
    sizes = [2**62, 2**63 - 1, MAX_BLOB + 1, -1]
    objects = [{"oid": "0" * 64, "size": size} for size in sizes]
    body = json.dumps({"operation": "upload", "objects": objects}).encode()
    answer = raw(site, request("POST", "/org/m.git/info/lfs/objects/batch", body=body)).partition(b"\r\n\r\n")[2]
    assert [each["error"]["code"] for each in json.loads(answer)["objects"]] == [422] * 4
    for size in sizes:
        body = json.dumps(PUSH | {"files": [{"path": "a", "size": size}]}).encode()
        assert status(raw(site, request("POST", "/api/v1/pushes", body=body))) == 400


@pytest.mark.one_database
@pytest.mark.parametrize(("method", "path"), JSON_CALLS[::4])
def test_a_body_that_is_too_long_is_not_kept(site, method, path):
    before = rss(site)
    found = raw(site, request(method, path, body=b'{"x": "' + b"x" * (33 * MIB) + b'"}'), timeout_s=60)
    assert not found or status(found) in (400, 413), found[:300]
    assert rss(site) - before < 120 * MIB


def test_commits_with_lines_without_end(site):
    header = json.dumps({"key": "header", "value": {"summary": "s"}}).encode() + b"\n"
    many = b'{"key": "deletedFile", "value": {"path": "config.json"}}\n'
    before = rss(site)
    for body in (
        header + b"x" * (30 * MIB),
        header + json.dumps({"key": "file", "value": {"path": "a", "content": "x" * (20 * MIB)}}).encode(),
        header + many * 120_000,
        header * 3,
        b"\n" * 5_000_000,
        header + b'{"key": "file", "value": {"path": "../a", "content": ""}}',
        header + b'{"key": "file", "value": {"path": "a", "content": "\\ud800"}}',
        header + b'{"key": "file", "value": {"path": "a", "content": "!!", "encoding": "base64"}}',
        header + b'{"key": "copyFile", "value": {"path": "a", "srcPath": "config.json", "srcRevision": "../x"}}',
        header + b'{"key": "copyFile", "value": {"path": "a", "srcPath": "config.json", "srcRevision": "\\u0000"}}',
        b'{"key": "header", "value": {"summary": "\\u0000\\ud800", "parentCommit": "x"}}\n' + many,
    ):
        found = raw(site, request("POST", "/api/models/org/m/commit/main", body=body), timeout_s=60)
        assert not found or 400 <= status(found) < 500, (body[:200], found[:300])
    assert rss(site) - before < 200 * MIB
    assert site.json("/api/models/org/m")["sha"] == site.main


def rss(site: Site) -> int:
    """Resident memory of the registry, in bytes."""
    text = Path(f"/proc/{site.registry.pid}/status").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith("VmRSS"))) * 1024
