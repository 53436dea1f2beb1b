"""The native API over real sockets: docs/native-api.md, call by call."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

from helios.errors import Conflict, EntryNotFound, Forbidden, InvalidInput, NotFound, RepoNotFound, RevisionNotFound
from helios.names import RepoId
from helios.publish import publish
from helios.registry_client import RegistryClient
from heliosfs.store.content import CommitContent
from heliosfs.store.manifest import Manifest
from heliosfs.store.placement import PlacedBlob, Placement
from heliosfs.store.recipe import Recipe
from tests.support.registry import Running, running_registry

pytestmark = pytest.mark.both_databases

ONE = RepoId.parse("org/one")
WEIGHTS = random.Random(7).randbytes(9_000_001)


@pytest.fixture
def registry(helios: Any) -> Iterator[Running]:
    with running_registry(helios) as found:
        yield found


@pytest.fixture
def client(registry: Running) -> Iterator[RegistryClient]:
    with_tcp = registry.client()
    yield with_tcp
    with_tcp.close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    (directory / "config.json").write_text('{"a": 1}')
    (directory / "empty").touch()
    (directory / "sub" / "w.bin").write_bytes(WEIGHTS)
    (directory / "run.sh").write_text("#!/bin/sh\n")
    (directory / "run.sh").chmod(0o755)
    return directory


def ask(
    url: str, method: str, path: str, headers: dict[str, str] | None = None, body: bytes | None = None
) -> tuple[int, dict[str, str], bytes]:
    """One request on a connection of its own."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    try:
        connection.request(method, path, body=body, headers=headers or {})
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def object_path(client: RegistryClient, path: str = "sub/w.bin") -> str:
    at = client.resolve(ONE, "main")
    entry = Manifest.decode(client.manifest(ONE, at.commit), at.manifest).files[path]
    return Placement.decode(client.placement(ONE, entry.sha256)).objects[0].url


def test_a_pushed_model_is_read_back_through_the_api(registry: Running, client: RegistryClient, model: Path) -> None:
    pushed = publish(client, model, ONE, "main", message="first", author="tester")
    assert pushed.logical_bytes == len(WEIGHTS) + 8 + 10
    assert not pushed.unchanged
    assert client.refs(ONE) == {"main": pushed.commit}
    at = client.resolve(ONE, "main")
    assert at.commit == pushed.commit
    manifest = Manifest.decode(client.manifest(ONE, at.commit), at.manifest)
    assert set(manifest.files) == {"config.json", "empty", "sub/w.bin", "run.sh"}
    assert {path for path, entry in manifest.files.items() if entry.executable} == {"run.sh"}
    for path, entry in manifest.files.items():
        recipe = Recipe.decode(client.recipe(ONE, entry.sha256), entry.recipe)
        placed = PlacedBlob(recipe, Placement.decode(client.placement(ONE, entry.sha256)))
        content = b""
        for segment in placed.segments(range(len(recipe))):
            span = f"bytes={segment.offset}-{segment.offset + segment.length - 1}"
            status, headers, part = ask(registry.url, "GET", segment.object.url, {"range": span})
            assert (status, headers["content-length"]) == (206, str(segment.length))
            content += part
        assert content == (model / path).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry.sha256
    record = client.commits(ONE, "main")[0]
    assert (record.commit, record.message, record.author, record.parent) == (pushed.commit, "first", "tester", None)
    assert client.usage(ONE).unique == pushed.logical_bytes
    assert [(r.repo, r.bytes) for r in client.repos()] == [("models/org/one", pushed.logical_bytes)]


def test_what_a_whole_commit_needs_comes_in_one_answer(registry: Running, client: RegistryClient, model: Path) -> None:
    """Recipes and placements as the single calls give them, the largest blob first; empty files need nothing."""
    pushed = publish(client, model, ONE, "main")
    at = client.resolve(ONE, "main")
    entries = Manifest.decode(client.manifest(ONE, at.commit), at.manifest).files.values()
    status, _, body = ask(registry.url, "GET", f"/api/v1/content?repo=models/org/one&commit={pushed.commit}")
    assert status == 200
    told = CommitContent.decode(body).blobs
    wanted = sorted((entry for entry in entries if entry.size), key=lambda entry: -entry.size)
    assert [each.placement.blob for each in told] == [entry.sha256 for entry in wanted]
    for each, entry in zip(told, wanted, strict=True):
        assert each.digest == entry.recipe
        assert each.recipe == client.recipe(ONE, entry.sha256)
        assert each.placement == Placement.decode(client.placement(ONE, entry.sha256))
    for query in (f"repo=models/org/two&commit={pushed.commit}", f"repo=models/org/one&commit={'0' * 40}"):
        assert ask(registry.url, "GET", f"/api/v1/content?{query}")[0] == 404


def test_a_remote_push_gives_the_commit_of_a_local_one(registry: Running, client: RegistryClient, model: Path) -> None:
    remote = publish(client, model, ONE, "main")
    local_client = registry.client(registry.socket)
    local = publish(local_client, model, ONE, "other")
    assert local.commit == remote.commit
    assert (local.new_bytes, local.deduplicated_bytes) == (0, remote.logical_bytes)
    assert publish(local_client, model, ONE, "other").unchanged
    assert publish(local_client, model, RepoId.parse("org/two"), "main").commit != remote.commit
    local_client.close()


def test_unknown_names_are_404_with_the_reason(registry: Running, client: RegistryClient, model: Path) -> None:
    publish(client, model, ONE, "main")
    two = RepoId.parse("org/two")
    with pytest.raises(RepoNotFound, match="org/two"):
        client.refs(two)
    with pytest.raises(RevisionNotFound, match="its refs: main"):
        client.resolve(ONE, "dev")
    with pytest.raises(RevisionNotFound):
        client.manifest(ONE, "0" * 40)
    with pytest.raises(EntryNotFound):
        client.placement(ONE, "0" * 64)
    manifest = client.resolve(ONE, "main").manifest
    for path in (
        "/api/v1/objects/public/blobs/00/" + "0" * 64,
        f"/api/v1/objects/public/manifests/{manifest[:2]}/{manifest}",
        "/api/v1/objects/public/registry/owner",
        "/nothing",
        "/api/v1/nothing",
    ):
        status, headers, body = ask(registry.url, "GET", path)
        assert status == 404
        assert headers["content-type"] == "application/json"
        assert json.loads(body)["error"]["code"]


BAD_REQUESTS = [
    ("GET", "/api/v1/refs", 400),
    ("GET", "/api/v1/refs?repo=org/one", 400),
    ("GET", "/api/v1/refs?repo=models/../etc", 400),
    ("GET", "/api/v1/refs?repo=models/a&repo=models/b", 400),
    ("GET", "/api/v1/resolve?repo=models/org/one&rev=../x", 400),
    ("GET", "/api/v1/manifest?repo=models/org/one&commit=main", 400),
    ("GET", "/api/v1/content?repo=models/org/one&commit=main", 400),
    ("GET", "/api/v1/content?repo=models/org/one", 400),
    ("GET", "/api/v1/commits?repo=models/org/one&rev=main&limit=0", 400),
    ("GET", "/api/v1/objects/../../etc/passwd", 400),
    ("GET", "/api/v1/objects/public/..%2f..%2fetc/passwd", 400),
    ("GET", "/api/v1/objects/public/.staging", 400),
    ("POST", "/api/v1/repos", 405),
    ("PUT", "/api/v1/pushes/nothing/files?path=a", 404),
    ("POST", "/api/v1/pushes/nothing/commit", 404),
]


@pytest.mark.one_database
def test_bad_requests_are_refused_in_json(registry: Running) -> None:
    for method, path, status in BAD_REQUESTS:
        found, _, body = ask(registry.url, method, path)
        assert (found, path) == (status, path)
        assert json.loads(body)["error"]["message"]


def test_bad_bodies_are_refused(registry: Running) -> None:
    good = {"repo": "models/org/one", "files": [{"path": "a", "size": 1}]}
    for body in (
        b"",
        b"not json",
        b"[]",
        json.dumps({**good, "unknown": 1}).encode(),
        json.dumps({**good, "repo": "org/one"}).encode(),
        json.dumps({**good, "files": []}).encode(),
        json.dumps({**good, "ref": "a" * 40}).encode(),
        json.dumps({**good, "message": "x" * 5000}).encode(),
        json.dumps({**good, "files": [{"path": "a", "size": -1}]}).encode(),
        json.dumps({**good, "files": [{"path": "a", "size": 1}, {"path": "a", "size": 1}]}).encode(),
        json.dumps({**good, "files": [{"path": "a", "size": 1}, {"path": "a/b", "size": 1}]}).encode(),
        b"[" * 100_000,
    ):
        status, _, answer = ask(registry.url, "POST", "/api/v1/pushes", body=body)
        assert status == 400, body[:80]
        assert json.loads(answer)["error"]["code"] == "InvalidInput"
    for path in ("../up", "/abs", "a\\b", "a\x00b", "a//b", "./a", "a\nb", "x" * 300):
        bad = json.dumps({**good, "files": [{"path": path, "size": 1}]}).encode()
        status, _, answer = ask(registry.url, "POST", "/api/v1/pushes", body=bad)
        assert status == 400
        assert "path" in json.loads(answer)["error"]["message"]
    assert ask(registry.url, "GET", "/api/v1/repos")[2] == b'{"repos":[]}'


@pytest.mark.one_database
def test_a_huge_json_body_is_refused_without_being_kept(registry: Running) -> None:
    status, _, _ = ask(registry.url, "POST", "/api/v1/pushes", body=b" " * (33 << 20))
    assert status == 400


@pytest.mark.one_database
def test_ranges(registry: Running, client: RegistryClient, model: Path) -> None:
    publish(client, model, ONE, "main")
    path = object_path(client)
    size = len(WEIGHTS)
    for header, status, start, stop in (
        ("bytes=0-0", 206, 0, 1),
        ("bytes=5-", 206, 5, size),
        ("bytes=-7", 206, size - 7, size),
        (f"bytes={size - 3}-{size + 100}", 206, size - 3, size),
        ("bytes=0-1,5-6", 200, 0, size),
        ("items=0-1", 200, 0, size),
    ):
        found, headers, content = ask(registry.url, "GET", path, {"range": header})
        assert (found, content) == (status, WEIGHTS[start:stop]), header
        if status == 206:
            assert headers["content-range"] == f"bytes {start}-{stop - 1}/{size}"
    found, headers, _ = ask(registry.url, "GET", path, {"range": f"bytes={size}-"})
    assert (found, headers["content-range"]) == (416, f"bytes */{size}")
    etag = headers_of(registry, path)["etag"]
    assert ask(registry.url, "GET", path, {"range": "bytes=0-0", "if-range": etag})[0] == 206
    assert ask(registry.url, "GET", path, {"range": "bytes=0-0", "if-range": '"other"'})[0] == 200


def headers_of(registry: Running, path: str) -> dict[str, str]:
    status, headers, body = ask(registry.url, "HEAD", path)
    assert (status, body) == (200, b"")
    return headers


@pytest.mark.one_database
def test_head_says_what_get_would(registry: Running, client: RegistryClient, model: Path) -> None:
    publish(client, model, ONE, "main")
    headers = headers_of(registry, object_path(client))
    assert headers["content-length"] == str(len(WEIGHTS))
    assert headers["accept-ranges"] == "bytes"


@pytest.mark.one_database
def test_a_connection_serves_many_objects(registry: Running, client: RegistryClient, model: Path) -> None:
    publish(client, model, ONE, "main")
    path = object_path(client)
    connection = http.client.HTTPConnection(urlsplit(registry.url).netloc, timeout=20)
    for start in range(0, 4_000_000, 1_000_000):
        connection.request("GET", path, headers={"range": f"bytes={start}-{start + 999_999}"})
        assert connection.getresponse().read() == WEIGHTS[start : start + 1_000_000]
        sock = connection.sock
        connection.request("GET", "/healthz")
        assert connection.getresponse().read() == b"ok\n"
        assert connection.sock is sock
    connection.close()


@pytest.mark.one_database
def test_clients_that_leave_in_the_middle_are_no_trouble(
    registry: Running, client: RegistryClient, model: Path, wait_for: Any
) -> None:
    publish(client, model, ONE, "main")
    request = f"GET {object_path(client)} HTTP/1.1\r\nhost: x\r\n\r\n".encode()
    parts = urlsplit(registry.url)
    for taken in (0, 1, 100_000):
        for linger in (False, True):
            sock = socket.create_connection((parts.hostname, parts.port), timeout=10)
            if linger:  # leave with a reset
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
            sock.sendall(request)
            while taken > 0:
                taken -= len(sock.recv(min(taken, 65536)))
            sock.close()

    def descriptors() -> int:
        links = []
        for fd in os.listdir(f"/proc/{registry.pid}/fd"):
            with contextlib.suppress(FileNotFoundError):  # it closes them as we look
                links.append(os.readlink(f"/proc/{registry.pid}/fd/{fd}"))
        return sum("/store/public/" in link for link in links)

    wait_for(lambda: descriptors() == 0, what="the registry closing the objects")
    assert ask(registry.url, "GET", "/readyz")[0] == 200


@pytest.mark.one_database
def test_slow_clients_hold_nobody_up(registry: Running, client: RegistryClient, model: Path) -> None:
    publish(client, model, ONE, "main")
    parts, path = urlsplit(registry.url), object_path(client)
    slow = []
    for _ in range(32):
        sock = socket.create_connection((parts.hostname, parts.port), timeout=10)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        slow.append(sock)
    assert ask(registry.url, "GET", path)[2] == WEIGHTS
    for sock in slow:
        sock.close()


@pytest.mark.one_database
def test_local_files_only_for_the_own_user_over_the_unix_socket(
    registry: Running, client: RegistryClient, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"12345")
    push = client.start_push(ONE, "main", [{"path": "a", "size": 5}], message="", author="").push
    where = f"/api/v1/pushes/{push}/files"
    with pytest.raises(Forbidden, match="unix socket"):
        client.http.bytes("PUT", where, params={"path": "a", "local": str(secret)})
    local = registry.client(registry.socket)
    (tmp_path / "pipe").touch()
    os.unlink(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe")
    for bad in ("relative", str(tmp_path), str(tmp_path / "pipe"), "/dev/null", str(tmp_path / "missing")):
        with pytest.raises(InvalidInput):
            local.http.bytes("PUT", where, params={"path": "a", "local": bad})
    with pytest.raises(InvalidInput, match="does not list"):
        local.http.bytes("PUT", where, params={"path": "b", "local": str(secret)})
    stored = local.put_file(push, "a", secret, 5)
    assert stored.sha256 == hashlib.sha256(b"12345").hexdigest()
    assert local.push_state(push).bytes == 5
    local.commit_push(push)
    local.close()


def test_a_push_is_all_or_nothing(registry: Running, client: RegistryClient, tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"12345")
    files = [{"path": "a", "size": 5}, {"path": "b", "size": 5}]
    push = client.start_push(ONE, "main", files, message="", author="").push
    client.put_file(push, "a", file, 5)
    with pytest.raises(InvalidInput, match="'b'"):
        client.commit_push(push)
    assert client.repos() == []
    client.put_file(push, "b", file, 5)
    commit = client.commit_push(push).commit
    assert client.refs(ONE) == {"main": commit}
    with pytest.raises(NotFound):
        client.commit_push(push)


@pytest.mark.one_database
def test_bodies_of_the_wrong_length(registry: Running, client: RegistryClient) -> None:
    push = client.start_push(ONE, "main", [{"path": "a", "size": 5}], message="", author="").push
    where = f"/api/v1/pushes/{push}/files?path=a"
    for body in (b"1234", b"123456", b"", b"x" * 5_000_000):
        status, _, answer = ask(registry.url, "PUT", where, body=body)
        assert status == 400, body[:10]
        assert "a:" in json.loads(answer)["error"]["message"]
    assert ask(registry.url, "PUT", where, body=b"12345")[0] == 200
    client.abort_push(push)
    with pytest.raises(NotFound):
        client.push_state(push)


@pytest.mark.one_database
def test_a_sender_that_vanishes_leaves_nothing(
    registry: Running, client: RegistryClient, helios_home: Any, wait_for: Any
) -> None:
    push = client.start_push(ONE, "main", [{"path": "a", "size": 50_000_000}], message="", author="").push
    parts = urlsplit(registry.url)
    sock = socket.create_connection((parts.hostname, parts.port), timeout=10)
    head = f"PUT /api/v1/pushes/{push}/files?path=a HTTP/1.1\r\nhost: x\r\ncontent-length: 50000000\r\n\r\n"
    sock.sendall(head.encode() + random.Random(1).randbytes(9_000_000))
    wait_for(lambda: client.push_state(push).bytes > 0, what="bytes arriving")
    sock.close()

    def staged() -> list[Path]:
        return [p for p in (helios_home.store / ".staging").glob("*/*") if p.name != ".lock"]

    wait_for(lambda: not staged(), what="staging being removed")
    client.abort_push(push)
    assert client.repos() == []


def test_giving_up_interrupts_what_is_under_way(registry: Running, client: RegistryClient) -> None:
    push = client.start_push(ONE, "main", [{"path": "a", "size": 50_000_000}], message="", author="").push
    parts = urlsplit(registry.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as sock:
        head = f"PUT /api/v1/pushes/{push}/files?path=a HTTP/1.1\r\nhost: x\r\ncontent-length: 50000000\r\n\r\n"
        sock.sendall(head.encode() + b"x" * 100_000)
        deadline = time.monotonic() + 10
        while not client.push_state(push).bytes and time.monotonic() < deadline:
            time.sleep(0.02)
        client.abort_push(push)
        assert b"503" in sock.recv(100)
    with pytest.raises(NotFound):
        client.push_state(push)


def test_of_concurrent_pushes_to_one_ref_one_wins(registry: Running, client: RegistryClient, tmp_path: Path) -> None:
    outcomes: list[object] = []
    ready = threading.Barrier(4)

    def push_one(number: int) -> None:
        mine = registry.client()
        file = tmp_path / f"f{number}"
        file.write_bytes(b"%d" % number)
        push = mine.start_push(ONE, "main", [{"path": "f", "size": 1}], message="", author="").push
        mine.put_file(push, "f", file, 1)
        ready.wait(20)
        try:
            outcomes.append(mine.commit_push(push).commit)
        except Conflict as error:
            outcomes.append(error)
        mine.close()

    threads = [threading.Thread(target=push_one, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    commits = [o for o in outcomes if isinstance(o, str)]
    conflicts = [o for o in outcomes if isinstance(o, Conflict)]
    assert (len(commits), len(conflicts)) == (1, 3)
    assert "has moved" in conflicts[0].message
    assert client.refs(ONE) == {"main": commits[0]}


def test_refs_move_by_compare_and_swap(registry: Running, client: RegistryClient, model: Path) -> None:
    first = publish(client, model, ONE, "main").commit
    (model / "config.json").write_text("{}")
    second = publish(client, model, ONE, "main").commit
    client.set_ref(ONE, "champion", first, None)
    with pytest.raises(Conflict):
        client.set_ref(ONE, "champion", second, None)
    client.set_ref(ONE, "champion", second, first)
    assert client.refs(ONE) == {"champion": second, "main": second}
    client.delete(ONE, "champion")
    assert client.refs(ONE) == {"main": second}
    client.delete(ONE)
    with pytest.raises(RepoNotFound):
        client.refs(ONE)


def test_health_and_metrics(registry: Running, client: RegistryClient, model: Path) -> None:
    publish(client, model, ONE, "main")
    assert ask(registry.url, "GET", object_path(client))[2] == WEIGHTS
    assert ask(registry.url, "GET", "/healthz")[:3:2] == (200, b"ok\n")
    assert ask(registry.url, "GET", "/readyz")[0] == 200
    ask(registry.url, "GET", "/api/v1/objects/public/blobs/00/" + "0" * 64)
    ask(registry.url, "GET", "/" + quote("some path that no route knows"))
    text = ask(registry.url, "GET", "/metrics")[2].decode()
    sent = next(line for line in text.splitlines() if line.startswith("helios_registry_sent_bytes_total "))
    assert float(sent.split()[1]) == len(WEIGHTS)
    assert "helios_registry_repositories 1.0" in text
    assert 'helios_registry_requests_total{route="/api/v1/objects/{key:path}",status="404"} 1.0' in text
    assert 'route="other",status="404"' in text
    assert 'helios_registry_ingested_bytes_total{result="new"} ' in text


@pytest.mark.one_database
def test_objects_leave_with_sendfile(registry: Running, client: RegistryClient, model: Path) -> None:
    """What sendfile(2) moves is in the kernel's count of written bytes (wchar); what send(2) moves is not."""
    publish(client, model, ONE, "main")
    path = object_path(client)

    def written() -> int:
        with open(f"/proc/{registry.pid}/io") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("wchar"))

    before = written()
    assert len(ask(registry.url, "GET", "/api/v1/resolve?repo=models/org/one&rev=main")[2]) > 100
    sent = written()
    assert sent - before < 10_000
    assert ask(registry.url, "GET", path)[2] == WEIGHTS
    assert written() - sent >= len(WEIGHTS)
