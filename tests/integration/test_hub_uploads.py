"""The Hub's upload calls of a real registry: the clients' matrix, and by raw HTTP what clients don't do."""

from __future__ import annotations

import hashlib
import http.client
import json
import signal
import socket
import threading
import time
from base64 import b64encode
from collections.abc import Callable
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.support.command import Command
from tests.support.hub_matrix import cases, run_cases
from tests.support.hub_site import Site
from tests.support.registry import running_registry

pytestmark = pytest.mark.both_databases

CASES = "hub_upload_cases.py"
TOKEN = "hls_" + "k" * 32
AUTH = {"authorization": f"Bearer {TOKEN}"}
RUNS = [
    # version, tenant, whether hf-xet may be used where the client has it
    ("0.36.2", None, True),
    ("0.36.2", "acme", True),
    ("1.33.0", None, False),
    ("1.33.0", "acme", True),
    ("2.4.0", None, True),
    ("2.4.0", "acme", False),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory, databases):
    """acme needs a token and owns acme/*; reader may write nothing."""
    root = tmp_path_factory.mktemp("uploads")
    (root / "tokens").write_text(hashlib.sha256(TOKEN.encode()).hexdigest())
    tenants = {"acme": {"owns": ["acme/*"], "tokens": str(root / "tokens")}, "reader": {}}
    # Outside tenants, too, its owner may remove repositories.
    admins = {"HELIOS_REGISTRY__ADMIN_TOKENS": str(root / "tokens")}
    helios = Command(root / "home", HELIOS_REGISTRY__TENANTS=json.dumps(tenants), **admins, **databases())
    with running_registry(helios) as registry:
        yield Site(registry, {}, "", "", root, helios)


@pytest.fixture(scope="module")
def report(site, tmp_path_factory):
    """Runs a version in one way, once; then tells how a case went."""

    @cache
    def run(version: str, tenant: str | None, xet: bool) -> dict[str, str | None]:
        endpoint = site.url if tenant is None else f"{site.url}/t/{tenant}"
        facts = {"endpoint": endpoint, "tenant": tenant, "org": tenant or "open", "run": version}
        env = {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "0" if xet else "1"}
        return run_cases(version, CASES, facts, tmp_path_factory.mktemp("hub") / "home", env)

    return run


def matrix(runs):
    """Every case of each run."""
    found = [
        pytest.param(case, run, id="-".join(map(str, (case, *run)))) for run in runs for case in cases(CASES, run[0])
    ]
    return pytest.mark.parametrize(("case", "run"), found)


@matrix(RUNS[-2:])
def test_a_user_uploads(report, case, run):
    problem = report(*run)[case]
    assert problem is None, problem


@pytest.mark.one_database
@matrix(RUNS[:-2])
def test_a_user_of_an_older_version_uploads(report, case, run):
    """What differs between versions of the client differs in what they ask, not in what the database is told."""
    problem = report(*run)[case]
    assert problem is None, problem


# --- by raw HTTP ---


def body(*lines: tuple[str, dict], summary: str = "x", **header: object) -> bytes:
    items = [{"key": "header", "value": {"summary": summary, **header}}, *({"key": k, "value": v} for k, v in lines)]
    return b"".join(json.dumps(item).encode() + b"\n" for item in items)


def file(path: str, data: bytes) -> tuple[str, dict]:
    return "file", {"path": path, "content": b64encode(data).decode(), "encoding": "base64"}


def lfs(path: str, data: bytes) -> tuple[str, dict]:
    return "lfsFile", {"path": path, "algo": "sha256", "oid": hashlib.sha256(data).hexdigest(), "size": len(data)}


def wait(condition: Callable[[], object], timeout_s: float = 20) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


class Repo:
    """A repository made through the API, under a prefix."""

    def __init__(self, site: Site, id_: str, prefix: str = "", headers: dict | None = None) -> None:
        self.site, self.id, self.prefix, self.headers = site, id_, prefix, headers or {}
        org, name = id_.split("/")
        self.ask("POST", "/api/repos/create", json.dumps({"name": name, "organization": org}).encode())

    def ask(self, method: str, path: str, data: bytes | None = None, headers: dict | None = None):
        return self.site.ask(method, self.prefix + path, {**self.headers, **(headers or {})}, data)

    def json(self, method: str, path: str, data: object = None):
        status, headers, answer = self.ask(method, path, None if data is None else json.dumps(data).encode())
        return status, json.loads(answer), headers

    def commit(self, data: bytes, branch: str = "main", query: str = ""):
        status, headers, answer = self.ask("POST", f"/api/models/{self.id}/commit/{branch}{query}", data)
        return status, headers.get("x-error-code"), json.loads(answer)

    def batch(self, *objects: tuple[bytes | str, int]) -> list[dict]:
        wanted = [
            {"oid": o if isinstance(o, str) else hashlib.sha256(o).hexdigest(), "size": size} for o, size in objects
        ]
        status, answer, _ = self.json(
            "POST", f"/{self.id}.git/info/lfs/objects/batch",
            {"operation": "upload", "transfers": ["basic", "multipart"], "objects": wanted, "hash_algo": "sha256"},
        )  # fmt: skip
        assert status == 200, answer
        return answer["objects"]

    def put(self, href: str, data: bytes):
        """As clients do: to the address that the batch call gave, with no token."""
        return self.site.ask("PUT", href.removeprefix(self.site.url), None, data)

    def upload(self, data: bytes) -> None:
        (found,) = self.batch((data, len(data)))
        status, _, answer = self.put(found["actions"]["upload"]["href"], data)
        assert status == 200, answer

    def head(self) -> str:
        return self.json("GET", f"/api/models/{self.id}")[1]["sha"]

    def files(self, revision: str = "main") -> set[str]:
        return {f["path"] for f in self.json("GET", f"/api/models/{self.id}/tree/{revision}?recursive=1")[1]}


def test_commits_at_the_same_time_one_wins(site):
    """Both start from one state of the branch; the other is told what happened, and nothing of it is visible."""
    repo = Repo(site, "raw/race")
    parts = urlsplit(site.url)
    slow = socket.create_connection((parts.hostname, parts.port), timeout=30)
    data = body(file("slow", b"1"), file("other", b"1"))
    head = f"POST /api/models/raw/race/commit/main HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n"
    slow.sendall(head.encode() + data[:-40])
    time.sleep(0.3)  # its first operations are being applied
    status, _, fast = repo.commit(body(file("fast", b"2")))
    assert status == 200
    slow.sendall(data[-40:])
    answer = http.client.HTTPResponse(slow)
    answer.begin()
    text = answer.read().decode()
    slow.close()
    assert (answer.status, answer.headers["x-error-code"]) == (412, "PreconditionFailed")
    assert "A commit has happened since" in text
    assert repo.head() == fast["commitOid"]
    assert repo.files() == {".gitattributes", "fast"}


def test_many_commits_at_the_same_time_lose_nothing(site):
    repo = Repo(site, "raw/many")
    done: list[tuple[int, str]] = []

    def work(number: int) -> None:
        while True:
            status, code, _ = repo.commit(body(file(f"f{number}", b"%d" % number)))
            if status == 200:
                done.append((number, ""))
                return
            assert (status, code) == (412, "PreconditionFailed")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(done) == 8
    assert repo.files() == {".gitattributes", *(f"f{number}" for number in range(8))}
    assert len(repo.json("GET", "/api/models/raw/many/commits/main")[1]) == 9


def test_a_stale_parent_is_refused_before_anything_is_stored(site):
    repo = Repo(site, "raw/parent")
    start = repo.head()
    assert repo.commit(body(file("a", b"1"), parentCommit=start))[0] == 200
    assert repo.commit(body(file("b", b"1"), parentCommit=start))[:2] == (412, "PreconditionFailed")
    assert repo.commit(body(file("b", b"1"), parentCommit="0" * 40))[:2] == (412, "PreconditionFailed")
    assert repo.files() == {".gitattributes", "a"}


@pytest.fixture(scope="module")
def bad(site):
    repo = Repo(site, "raw/bad")
    assert repo.commit(body(file("a", b"1"), file("d/x", b"2")))[0] == 200
    return repo


UNKNOWN = ("lfsFile", {"path": "w", "algo": "sha256", "oid": "5" * 64, "size": 3})
BAD_COMMITS = [
    (b"", 400, "InvalidInput"),
    (b"no json\n", 400, "InvalidInput"),
    (body(("chmod", {"path": "a"})), 400, "InvalidInput"),
    (body(("file", {"path": "a", "content": "!", "encoding": "base64"})), 400, "InvalidInput"),
    (body(file("../../etc/passwd", b"x")), 400, "InvalidInput"),
    (body(file("a/b", b"x")), 400, "InvalidInput"),
    (body(file("new.safetensors", b"none")), 400, "InvalidInput"),
    (body(UNKNOWN), 404, "EntryNotFound"),
    (body(("deletedFile", {"path": "nope"})), 404, "EntryNotFound"),
    (body(("deletedFile", {"path": "d"})), 404, "EntryNotFound"),
    (body(("deletedFolder", {"path": "a"})), 404, "EntryNotFound"),
    (body(("copyFile", {"path": "b", "srcPath": "nope"})), 404, "EntryNotFound"),
    (body(("copyFile", {"path": "b", "srcPath": "a", "srcRevision": "v9"})), 404, "RevisionNotFound"),
    (body(*(("deletedFile", {"path": p}) for p in ("a", "d/x", ".gitattributes"))), 400, "InvalidInput"),
    (body(("file", {"path": "a", "content": "x" * (23 << 20)})), 400, "InvalidInput"),
]


@pytest.mark.parametrize(("data", "status", "code"), BAD_COMMITS, ids=range(len(BAD_COMMITS)))
def test_commits_that_are_wrong_change_nothing(bad, data, status, code):
    before = bad.head()
    got, error, answer = bad.commit(data)
    assert (got, error) == (status, code), answer
    assert answer["error"]
    assert bad.head() == before


def test_where_no_commit_can_go(site, bad):
    good = body(file("a", b"1"))
    assert bad.commit(good, "none")[:2] == (404, "RevisionNotFound")
    assert bad.commit(good, bad.head())[:2] == (400, "InvalidInput")
    assert bad.commit(good, "main", "?create_pr=1")[:2] == (400, "InvalidInput")
    assert site.ask("POST", "/api/models/raw/none/commit/main", None, good)[0] == 404
    assert site.ask("POST", "/api/spaces/raw/bad/commit/main", None, good)[0] == 404


BAD_CALLS = [
    ("/api/repos/create", {}, 400), ("/api/repos/create", {"name": "a/../b"}, 400),
    ("/api/repos/create", {"name": "x", "organization": "raw", "type": "space"}, 400),
    ("/api/repos/create", {"name": "x", "organization": "raw", "visibility": "private"}, 400),
    ("/api/models/raw/bad/preupload/main", {"files": [{"path": "a"}]}, 400),
    ("/api/models/raw/bad/preupload/main", {"files": [{"path": "../a", "size": 1}]}, 400),
    ("/api/models/raw/bad/preupload/none", {"files": []}, 404),
    ("/api/models/raw/none/preupload/main", {"files": []}, 404),
    ("/api/models/raw/bad/branch/..", {}, 400), ("/api/models/raw/bad/branch/main", {}, 409),
    ("/api/models/raw/bad/branch/x", {"startingPoint": "none"}, 404),
    ("/api/models/raw/bad/tag/main", {}, 400), ("/api/models/raw/bad/tag/main", {"tag": "a b"}, 400),
    ("/api/models/raw/bad/tag/none", {"tag": "v1"}, 404),
    ("/raw/bad.git/info/lfs/objects/batch", {"operation": "download", "objects": []}, 400),
    ("/raw/bad.git/info/lfs/objects/batch", {"operation": "upload", "objects": [], "hash_algo": "md5"}, 400),
    ("/raw/bad.git/info/lfs/objects/batch", {"operation": "upload", "objects": [], "transfers": ["xet"]}, 400),
    ("/raw/bad.git/info/lfs/objects/batch", {"operation": "upload", "objects": [{}]}, 400),
    ("/raw/none.git/info/lfs/objects/batch", {"operation": "upload", "objects": []}, 404),
    ("/raw/bad.git/info/lfs/objects/verify", {"oid": "5" * 64, "size": 3}, 404),
    ("/api/validate-yaml", {"content": "---\na: [\n---\n"}, 400), ("/api/validate-yaml", {}, 400),
]  # fmt: skip


@pytest.mark.parametrize(("path", "data", "status"), BAD_CALLS, ids=[f"{p} {s}" for p, _, s in BAD_CALLS])
def test_calls_that_are_wrong(bad, path, data, status):
    got, answer, headers = bad.json("POST", path, data)
    assert got == status, answer
    assert answer.get("error") or answer.get("errors")
    if "error" in answer:
        assert headers["x-error-code"]
    assert bad.ask("POST", path, b"{")[0] in (400, 404)


def test_the_branch_main_stays(bad):
    assert bad.ask("DELETE", "/api/models/raw/bad/branch/main")[0] == 403


def test_an_lfs_object_must_be_what_was_announced(site):
    repo, data = Repo(site, "raw/lfs"), hashlib.shake_256(b"o").digest(300_000)
    (found,) = repo.batch((data, len(data)))
    href = found["actions"]["upload"]["href"]
    assert href.startswith(f"{site.url}/raw/lfs.git/info/lfs/objects/")
    for wrong in (data[:-1], data + b"x", data[:-1] + b"x"):
        status, headers, _ = repo.put(href, wrong)
        assert (status, headers["x-error-code"]) == (400, "InvalidInput")
    assert repo.commit(body(lfs("w.bin", data)))[:2] == (404, "EntryNotFound")
    assert repo.put(href, data)[0] == 200
    assert repo.batch((data, len(data))) == [{"oid": hashlib.sha256(data).hexdigest(), "size": len(data)}]
    assert "422" in json.dumps(repo.batch((data, 5), ("XYZ", 5), (data, -1)))
    assert repo.commit(body(("lfsFile", {"path": "w", "oid": hashlib.sha256(data).hexdigest(), "size": 7})))[0] == 400
    assert repo.commit(body(lfs("w.bin", data)))[0] == 200
    assert repo.ask("GET", "/raw/lfs/resolve/main/w.bin")[2] == data


def test_the_address_of_an_upload_is_for_one_object_of_one_repository(site):
    repo, other = Repo(site, "raw/one"), Repo(site, "raw/two")
    (found,) = repo.batch((b"abc", 3))
    grant = found["actions"]["upload"]["href"].rpartition("/")[2]
    for path, status in (
        (f"/raw/two.git/info/lfs/objects/{grant}", 403),
        (f"/raw/one.git/info/lfs/objects/{grant[:-4]}AAAA", 401),
        ("/raw/one.git/info/lfs/objects/x", 401),
    ):
        assert site.ask("PUT", path, None, b"abc")[0] == status
    assert other.commit(body(lfs("a", b"abc")))[0] == 404


def test_an_interrupted_upload_leaves_nothing(site):
    repo, data = Repo(site, "raw/broken"), hashlib.shake_256(b"b").digest(4_000_000)
    (found,) = repo.batch((data, len(data)))
    parts = urlsplit(found["actions"]["upload"]["href"])
    head = f"PUT {parts.path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n"
    sock = socket.create_connection((parts.hostname, parts.port), timeout=30)
    sock.sendall(head.encode() + data[:999_999])

    def staged() -> list[Path]:
        return [p for p in (site.helios.home / "store" / ".staging").rglob("*") if p.is_file() and p.name != ".lock"]

    wait(staged)
    sock.close()
    wait(lambda: not staged())
    assert repo.commit(body(lfs("w.bin", data)))[0] == 404
    repo.upload(data)
    assert repo.commit(body(lfs("w.bin", data)))[0] == 200


def test_who_knows_only_a_hash_gets_no_content(site):
    """What a tenant owns can't be had by naming its sha256 in a repository of one's own."""
    secret = hashlib.shake_256(b"secret").digest(50_000)
    acme = Repo(site, "acme/secret", "/t/acme", AUTH)
    acme.upload(secret)
    assert acme.commit(body(lfs("w.bin", secret)))[0] == 200
    thief = Repo(site, "raw/thief")
    assert thief.commit(body(lfs("w.bin", secret)))[:2] == (404, "EntryNotFound")
    assert "actions" in thief.batch((secret, len(secret)))[0], "it has to be uploaded"
    thief.upload(secret)
    assert thief.commit(body(lfs("w.bin", secret)))[0] == 200, "who has it may have it"
    # What everybody may read need not be sent again.
    acme_too = Repo(site, "acme/copy", "/t/acme", AUTH)
    assert "actions" not in acme_too.batch((secret, len(secret)))[0]
    assert acme_too.commit(body(lfs("w.bin", secret)))[0] == 200


def test_who_may_write(site):
    Repo(site, "acme/owned", "/t/acme", AUTH)
    create = lambda prefix, org, headers=None: site.ask(  # noqa: E731
        "POST", f"{prefix}/api/repos/create", headers, json.dumps({"name": "new", "organization": org}).encode()
    )[0]
    assert create("/t/acme", "acme") == 401
    assert create("/t/acme", "acme", {"authorization": "Bearer hf_x"}) == 401
    assert create("/t/acme", "other", AUTH) == 403
    assert create("/t/reader", "other") == 403
    assert create("", "acme") == 404
    commit = body(file("a", b"1"))
    tries = (("/t/acme", None, 401), ("/t/acme", AUTH, 200), ("", None, 404), ("/t/reader", None, 404))
    for prefix, headers, status in tries:
        assert site.ask("POST", f"{prefix}/api/models/acme/owned/commit/main", headers, commit)[0] == status
    Repo(site, "raw/open")
    for path in (
        "/api/models/raw/open/commit/main",
        "/api/models/raw/open/branch/x",
        "/raw/open.git/info/lfs/objects/batch",
    ):
        status, headers, _ = site.ask("POST", f"/t/reader{path}", None, b'{"operation": "upload", "objects": []}')
        assert (status, headers["x-error-code"]) == (403, "Forbidden")
    assert site.ask("GET", "/t/reader/api/models/raw/open/xet-write-token/main")[0] == 403
    assert site.ask("DELETE", "/t/acme/api/models/raw/open/branch/x", AUTH)[0] == 403


# --- over Xet ---


def test_what_is_wrong_over_xet(site):
    repo = Repo(site, "raw/xet")
    _, token, headers = repo.json("GET", "/api/models/raw/xet/xet-write-token/main")
    assert token["casUrl"] == headers["x-xet-cas-url"]
    assert int(headers["x-xet-token-expiration"]) > time.time() + 3600
    cas = token["casUrl"].removeprefix(site.url)
    auth = {"authorization": f"Bearer {token['accessToken']}"}
    xorb, chunk = f"{cas}/v1/xorbs/default/{'ab' * 32}", b"\0\3\0\0\0\3\0\0abc"
    ask = lambda path, data, headers=auth: site.ask("POST", path, headers, data)[0]  # noqa: E731
    assert ask(xorb, chunk, {}) == 401
    assert ask(xorb, chunk, {"authorization": "Bearer x"}) == 401
    assert ask(f"{cas}/v1/xorbs/default/XYZ", chunk) == 400
    assert ask(f"{cas}/v1/xorbs/default/..%2F..%2Fx", chunk) in (400, 404)
    assert ask(xorb, b"no xorb") == 400
    assert ask(f"/xet-upload/{'0' * 32}/v1/shards", b"") == 400
    assert ask(f"{cas}/v1/shards", b"no shard") == 400
    assert ask(f"{cas}/v1/shards", b"x" * (81 << 20)) == 400
    assert ask(f"{cas}/v1/chunks/default/{'ab' * 32}", b"") in (404, 405)
    assert ask(xorb, chunk) == 200
    assert (site.helios.home / "registry" / "uploads" / cas.rpartition("/")[2] / ("ab" * 32)).read_bytes() == chunk
    assert repo.json("GET", "/api/models/raw/xet/xet-write-token/main")[1]["casUrl"] == token["casUrl"]
    assert repo.commit(body(file("a", b"1")))[0] == 200
    assert repo.json("GET", "/api/models/raw/xet/xet-write-token/main")[1]["casUrl"] != token["casUrl"]
    assert ask(xorb, chunk) == 200, "who is at work goes on where he was"
    assert site.ask("GET", "/api/models/raw/none/xet-write-token/main")[0] == 404


@pytest.mark.one_database
def test_a_restart_forgets_what_was_not_committed(tmp_path):
    """Where processes share a database it waits for its commit at another one: test_hub_uploads_shared.py."""
    helios = Command(tmp_path / "home")
    data = hashlib.shake_256(b"kill").digest(500_000)

    def stored() -> list[Path]:
        return [p for p in (helios.home / "store").rglob("*") if p.is_file() and p.stat().st_size == len(data)]

    with running_registry(helios) as registry:
        site = Site(registry, {}, "", "", tmp_path, helios)
        repo = Repo(site, "org/m")
        assert repo.commit(body(file("a", b"1")))[0] == 200
        repo.upload(data)
        assert stored()
        registry.kill()
    with running_registry(helios) as registry:
        site = Site(registry, {}, "", "", tmp_path, helios)
        repo = Repo(site, "org/m")
        assert repo.files() == {".gitattributes", "a"}
        assert not [
            p for p in (tmp_path / "home" / "store").rglob("*") if p.is_file() and p.stat().st_size == len(data)
        ]
        assert repo.commit(body(lfs("w", data)))[:2] == (404, "EntryNotFound")
        repo.upload(data)
        registry.process.send_signal(signal.SIGTERM)
        assert registry.process.wait(15) == 0
    assert not stored()
    assert not (helios.home / "registry" / "uploads").exists()
