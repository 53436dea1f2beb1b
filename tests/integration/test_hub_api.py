"""The Hub's read API of a real registry: the protocol's details over raw HTTP, then huggingface_hub of three majors."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest

from helios.launch.tiny_model import TinyShape, tiny_llama
from tests.support.hub_clients import ROOT, VERSIONS, run_client
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


def safetensors(seed: int) -> bytes:
    header = json.dumps({"w": {"dtype": "U8", "shape": [5_000_000], "data_offsets": [0, 5_000_000]}}).encode()
    return len(header).to_bytes(8, "little") + header + hashlib.shake_256(b"%d" % seed).digest(5_000_000)


@dataclass
class Site:
    """A registry with org/m (v1, then main), one-segment ``solo``, datasets org/d and the tiny Llama org/tiny."""

    registry: Running
    files: dict[str, bytes]
    v1: str
    main: str
    tiny: Path

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


class Command:
    """``helios`` on one home, for a fixture that outlives a test."""

    def __init__(self, home: Path) -> None:
        self.env = {**os.environ, "HELIOS_HOME": str(home)}
        self.path = str(Path(sys.executable).parent / "helios")

    def start(self, *args: str, stderr: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
        return subprocess.Popen([self.path, *args], env=self.env, stdout=subprocess.PIPE, stderr=stderr, text=True)

    def __call__(self, *args: str) -> str:
        done = subprocess.run([self.path, *args], env=self.env, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


def write(directory: Path, files: dict[str, bytes]) -> Path:
    for path, data in files.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(data)
    return directory


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub-api")
    helios = Command(root / "home")
    old = {**FILES, "weights.safetensors": safetensors(1), "old.txt": b"only in v1"}
    new = {**FILES, "weights.safetensors": safetensors(2)}
    tiny = tiny_llama(root / "models", shape=TinyShape(hidden=64, layers=2, intermediate=128))
    with running_registry(helios) as registry:
        v1 = helios("push", str(write(root / "v1", old)), "org/m@v1", "-m", "The first\n\nwith more to say")
        helios("push", str(write(root / "v1", old)), "org/m@main", "-m", "The first\n\nwith more to say")
        main = helios("push", str(write(root / "new", new)), "org/m", "-m", "The second")
        helios("push", str(root / "v1"), "solo")
        helios("push", str(root / "v1"), "org/d", "--kind", "datasets")
        helios("push", str(tiny), "org/tiny")
        yield Site(registry, new, v1, main, tiny)


# --- the protocol, over raw HTTP -------------------------------------------------------------------------------------


def oid_of(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def pointer(data: bytes) -> bytes:
    sha256 = hashlib.sha256(data).hexdigest()
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n".encode()


@pytest.mark.parametrize("path", ["README.md", "config.json", "data/part 1 (ü).txt", "empty"])
def test_head_of_a_regular_file(site, path):
    data = site.files[path]
    status, headers, body = site.ask("HEAD", f"/org/m/resolve/main/{quote(path)}")
    assert (status, body) == (200, b"")
    assert headers["content-length"] == str(len(data))
    assert headers["etag"] == f'"{oid_of(data)}"'
    assert headers["x-repo-commit"] == site.main
    assert headers["accept-ranges"] == "bytes"
    assert "x-linked-etag" not in headers
    assert "location" not in headers
    assert f"filename*=UTF-8''{quote(path.rpartition('/')[2], safe='')}" in headers["content-disposition"]


@pytest.mark.parametrize("path", ["weights.safetensors", "data/deep/er/x.bin"])
def test_head_of_a_large_file(site, path):
    data = site.files[path]
    _, headers, _ = site.ask("HEAD", f"/org/m/resolve/{site.main}/{path}")
    sha256 = hashlib.sha256(data).hexdigest()
    assert headers["x-linked-etag"] == headers["etag"] == f'"{sha256}"'
    assert headers["x-linked-size"] == headers["content-length"] == str(len(data))
    assert headers["x-repo-commit"] == site.main
    assert "immutable" in headers["cache-control"]


@pytest.mark.parametrize("path", FILES)
def test_get_is_the_file_and_nothing_else(site, path):
    status, headers, body = site.ask("GET", f"/org/m/resolve/main/{quote(path)}", {"accept-encoding": "gzip, deflate"})
    assert (status, body) == (200, site.files[path])
    assert "content-encoding" not in headers


@pytest.mark.parametrize(
    ("wanted", "status", "span"),
    [
        ("bytes=0-0", 206, (0, 1)),
        ("bytes=1000-2999999", 206, (1000, 3_000_000)),
        ("bytes=4194300-4194310", 206, (4194300, 4194311)),
        ("bytes=5-", 206, (5, None)),
        ("bytes=-100", 206, (-100, None)),
        ("bytes=0-99999999999", 206, (0, None)),
        ("bytes=99999999-", 416, None),
        ("bytes=a-b", 200, (0, None)),
    ],
)
def test_ranges(site, wanted, status, span):
    data = site.files["weights.safetensors"]
    got, headers, body = site.ask("GET", "/org/m/resolve/main/weights.safetensors", {"range": wanted})
    assert got == status
    if span is None:
        assert headers["content-range"] == f"bytes */{len(data)}"
        return
    assert body == data[slice(*span)]
    if status == 206:
        start, stop, _ = slice(*span).indices(len(data))
        assert headers["content-range"] == f"bytes {start}-{stop - 1}/{len(data)}"
    assert headers["content-length"] == str(len(body))


def test_conditional_requests(site):
    path = "/org/m/resolve/main/config.json"
    etag = f'"{oid_of(site.files["config.json"])}"'
    status, headers, body = site.ask("GET", path, {"if-none-match": etag})
    assert (status, body, headers["etag"], headers["x-repo-commit"]) == (304, b"", etag, site.main)
    assert site.ask("HEAD", path, {"if-none-match": f"W/{etag}"})[0] == 304
    assert site.ask("GET", path, {"if-none-match": '"other"'})[0] == 200
    assert site.ask("GET", path, {"if-range": etag, "range": "bytes=0-1"})[0] == 206
    assert site.ask("GET", path, {"if-range": '"other"', "range": "bytes=0-1"})[0] == 200
    assert site.ask("HEAD", path, {"range": "bytes=0-1"})[1]["content-length"] == str(len(site.files["config.json"]))


def test_what_a_repository_holds_does_not_run_in_a_browser(site):
    _, headers, _ = site.ask("GET", "/org/m/resolve/main/page.html")
    assert headers["content-type"].startswith("text/plain")
    assert "sandbox" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"


ERRORS = [
    ("GET", "/org/none/resolve/main/x", 404, "RepoNotFound", None),
    ("HEAD", "/org/none/resolve/main/x", 404, "RepoNotFound", None),
    ("GET", "/api/models/org/none", 404, "RepoNotFound", None),
    ("GET", "/api/models/org/none/tree/main", 404, "RepoNotFound", None),
    ("GET", "/api/models/org/none/refs", 404, "RepoNotFound", None),
    ("GET", "/api/models/none/revision/main", 404, "RepoNotFound", None),
    ("GET", "/api/models/..%2Fx/..", 404, "RepoNotFound", None),
    ("GET", "/api/spaces/org/m", 404, "RepoNotFound", None),
    ("GET", "/spaces/org/m/resolve/main/x", 404, "RepoNotFound", None),
    ("GET", "/api/datasets/org/m", 404, "RepoNotFound", None),
    ("GET", "/org/m/resolve/v9/config.json", 404, "RevisionNotFound", None),
    ("GET", f"/org/m/resolve/{'0' * 40}/config.json", 404, "RevisionNotFound", None),
    ("GET", "/org/m/resolve/..%2F..%2Fx/config.json", 404, "RevisionNotFound", None),
    ("GET", "/api/models/org/m/revision/v9", 404, "RevisionNotFound", None),
    ("GET", "/api/models/org/m/commits/v9", 404, "RevisionNotFound", None),
    ("GET", "/org/m/resolve/main/nope", 404, "EntryNotFound", "main"),
    ("HEAD", "/org/m/resolve/v1/nope", 404, "EntryNotFound", "v1"),
    ("GET", "/org/m/resolve/main/data", 404, "EntryNotFound", "main"),
    ("GET", "/org/m/resolve/main/..%2F..%2Fetc%2Fpasswd", 404, "EntryNotFound", "main"),
    ("GET", "/api/models/org/m/tree/main/nope", 404, "EntryNotFound", "main"),
    ("GET", "/api/models/org/m/tree/main/config.json", 404, "EntryNotFound", "main"),
    ("GET", "/org/m/resolve/main/%ff", 400, "InvalidInput", None),
    ("GET", "/api/models/org/m/tree/main?limit=-1", 400, "InvalidInput", None),
    ("GET", "/api/models/org/m/tree/main?limit=x", 400, "InvalidInput", None),
    ("GET", "/api/models/org/m/tree/main?cursor=%ff", 400, "InvalidInput", None),
]


@pytest.mark.parametrize(("method", "path", "status", "code", "commit"), ERRORS, ids=[f"{e[0]} {e[1]}" for e in ERRORS])
def test_errors(site, method, path, status, code, commit):
    got, headers, body = site.ask(method, path)
    assert (got, headers["x-error-code"]) == (status, code)
    assert headers["x-error-message"]
    assert headers.get("x-repo-commit") == {"main": site.main, "v1": site.v1}.get(commit)
    if method == "GET":
        assert json.loads(body)["error"]


def test_writes_are_refused_with_the_way_to_publish(site):
    for method, path in (
        ("POST", "/api/models/org/m"),
        ("PUT", "/org/m/resolve/main/x"),
        ("GET", "/api/models/org/m/paths-info/main"),
    ):
        status, headers, _ = site.ask(method, path, body=b"")
        assert status == 405
        assert "helios push" in headers["x-error-message"]
        assert headers["allow"]


def test_whoami_is_nobody(site):
    status, _, body = site.ask("GET", "/api/whoami-v2", {"authorization": "Bearer hf_x"})
    assert status == 401
    assert json.loads(body)["error"]


def test_an_error_message_fits_into_a_header(site):
    _, headers, _ = site.ask("GET", "/org/m/resolve/main/" + quote("ü\r\nx-evil: 1"))
    assert "x-evil" not in headers
    assert headers["x-error-message"].isascii()


def expected_tree(files: dict[str, bytes]) -> dict[str, dict]:
    out = {}
    for path, data in files.items():
        lfs = path.endswith((".bin", ".safetensors"))
        out[path] = {"type": "file", "path": path, "size": len(data), "oid": oid_of(pointer(data) if lfs else data)}
        if lfs:
            sha256 = hashlib.sha256(data).hexdigest()
            out[path]["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": len(pointer(data))}
    return out


def test_the_tree(site):
    items = site.json("/api/models/org/m/tree/main?recursive=true&expand=false")
    wanted = expected_tree(site.files)
    assert {item["path"]: item for item in items if item["type"] == "file"} == wanted
    directories = [item for item in items if item["type"] == "directory"]
    assert [d["path"] for d in directories] == ["data", "data/deep", "data/deep/er"]
    assert all(len(d["oid"]) == 40 and d["size"] == 0 for d in directories)
    top = site.json("/api/models/org/m/tree/main")
    assert {item["path"] for item in top} == {path.split("/")[0] for path in site.files}
    below = site.json("/api/models/org/m/tree/main/data")
    assert [item["path"] for item in below] == ["data/deep", "data/part 1 (ü).txt"]
    assert site.json("/api/models/org/m/tree/main/data%2Fdeep?recursive=True") == [
        item for item in items if item["path"].startswith("data/deep/")
    ]


def test_pages_of_the_tree_are_linked_absolutely_and_show_one_commit(site):
    whole = site.json("/api/models/org/m/tree/main?recursive=true")
    path, seen = "/api/models/org/m/tree/main?recursive=true&limit=3", []
    while path:
        _, headers, body = site.ask("GET", path)
        page = json.loads(body)
        assert 0 < len(page) <= 3
        seen += page
        link = headers.get("link")
        if link is None:
            break
        assert link.endswith('>; rel="next"')
        assert link.startswith(f"<{site.url}/api/models/org/m/tree/{site.main}?")
        path = link[1:].split(">")[0].removeprefix(site.url)
    assert seen == whole


def test_expand_tells_when_a_file_last_changed(site):
    items = {i["path"]: i for i in site.json("/api/models/org/m/tree/main?recursive=true&expand=true")}
    assert items["weights.safetensors"]["lastCommit"] == {
        "id": site.main,
        "title": "The second",
        "date": items["weights.safetensors"]["lastCommit"]["date"],
    }
    assert items["config.json"]["lastCommit"]["id"] == site.v1
    assert items["data"]["lastCommit"]["id"] == site.v1
    assert items["config.json"]["securityFileStatus"]["status"] == "unscanned"
    assert "securityFileStatus" not in items["data"]


def test_info(site):
    info = site.json("/api/models/org/m")
    assert (info["id"], info["modelId"], info["sha"]) == ("org/m", "org/m", site.main)
    assert (info["private"], info["gated"], info["disabled"]) == (False, False, False)
    assert info["lastModified"].endswith(".000Z")
    assert info["siblings"] == [{"rfilename": path} for path in sorted(site.files)]
    wanted = expected_tree(site.files)
    blobs = site.json(f"/api/models/org/m/revision/{site.main}?blobs=true")["siblings"]
    assert {s["rfilename"]: (s["blobId"], s["size"]) for s in blobs} == {
        p: (e["oid"], e["size"]) for p, e in wanted.items()
    }
    assert {s["rfilename"]: s["lfs"]["sha256"] for s in blobs if "lfs" in s} == {
        p: e["lfs"]["oid"] for p, e in wanted.items() if "lfs" in e
    }
    assert site.json("/api/models/org/m/revision/v1?securityStatus=true&expand=downloads")["securityRepoStatus"] == {
        "scansDone": False,
        "filesWithIssues": [],
    }
    assert site.json("/api/models/solo")["id"] == "solo"
    assert "modelId" not in site.json("/api/datasets/org/d")


def test_paths_info_by_form_and_by_json(site):
    path = "/api/models/org/m/paths-info/main"
    form = "paths=config.json&paths=data&paths=nope&paths=data%2Fpart+1+%28%C3%BC%29.txt&expand=False"
    _, _, body = site.ask("POST", path, {"content-type": "application/x-www-form-urlencoded"}, form)
    found = json.loads(body)
    assert [item["path"] for item in found] == ["config.json", "data", "data/part 1 (ü).txt"]
    wanted = json.dumps({"paths": ["config.json", "data", "nope", "data/part 1 (ü).txt"]})
    assert json.loads(site.ask("POST", path, {"content-type": "application/json"}, wanted)[2]) == found
    for bad, kind in (
        ("{", "json"),
        ("[]", "json"),
        ('{"paths": [1]}', "json"),
        ("paths=%ff", "x-www-form-urlencoded"),
    ):
        status, headers, _ = site.ask("POST", path, {"content-type": f"application/{kind}"}, bad)
        assert (status, headers["x-error-code"]) == (400, "InvalidInput")
    assert site.ask("POST", path, {"content-type": "application/json"}, b" " * (9 << 20))[0] == 400


def test_refs_and_history(site):
    assert site.json("/api/models/org/m/refs") == {
        "branches": [
            {"name": "main", "ref": "refs/heads/main", "targetCommit": site.main},
            {"name": "v1", "ref": "refs/heads/v1", "targetCommit": site.v1},
        ],
        "converts": [],
        "tags": [],
    }
    assert site.json("/api/models/org/m/refs?include_prs=1")["pullRequests"] == []
    commits = site.json("/api/models/org/m/commits/main")
    assert [(c["id"], c["title"], c["message"]) for c in commits] == [
        (site.main, "The second", ""),
        (site.v1, "The first", "with more to say"),
    ]
    _, headers, body = site.ask("GET", "/api/models/org/m/commits/main?limit=1")
    assert [c["id"] for c in json.loads(body)] == [site.main]
    following = headers["link"][1:].split(">")[0].removeprefix(site.url)
    _, headers, body = site.ask("GET", following)
    assert [c["id"] for c in json.loads(body)] == [site.v1]
    assert "link" not in headers


def test_the_list_of_repositories(site):
    def ids(query: str, kind: str = "models") -> list[str]:
        return [item["id"] for item in site.json(f"/api/{kind}{query}")]

    assert ids("") == ["org/m", "org/tiny", "solo"]
    assert ids("", "datasets") == ["org/d"]
    assert ids("?search=TIN") == ["org/tiny"]
    assert ids("?author=org") == ["org/m", "org/tiny"]
    assert ids("?author=org&search=m") == ["org/m"]
    assert ids("?filter=text-generation") == []
    assert site.json("/api/models?full=true&search=solo")[0]["siblings"]
    _, headers, body = site.ask("GET", "/api/models?limit=2&author=org")
    assert [i["id"] for i in json.loads(body)] == ["org/m", "org/tiny"]
    assert "link" not in headers
    _, headers, _ = site.ask("GET", "/api/models?limit=2")
    following = headers["link"][1:].split(">")[0]
    assert following.startswith(site.url)
    assert [i["id"] for i in site.json(following.removeprefix(site.url))] == ["solo"]


def test_no_sign_of_xet_anywhere(site):
    """A client that sees a Xet hash goes looking for a Xet service, and fails."""
    for path in (
        "/api/models/org/m?blobs=true",
        "/api/models/org/m/tree/main?recursive=true&expand=true",
        "/api/models/org/m/commits/main",
        "/api/models/org/m/refs",
        "/org/m/resolve/main/weights.safetensors",
    ):
        _, headers, body = site.ask("HEAD" if "resolve" in path else "GET", path)
        assert b"xet" not in body.lower()
        assert not [name for name in headers if "xet" in name]
        assert "xet" not in headers.get("link", "")
    assert site.ask("GET", "/api/models/org/m/xet-read-token/main")[0] == 404


def test_requests_are_counted_by_call(site):
    site.ask("HEAD", "/org/m/resolve/main/config.json")
    metrics = site.ask("GET", "/metrics")[2].decode()
    assert 'helios_registry_requests_total{route="/hub/resolve",status="200"}' in metrics
    assert "org/m" not in metrics, "a label for each repository would never end"


# --- the real clients ------------------------------------------------------------------------------------------------

READ = """
calls = lambda: sum(
    float(line.rsplit(" ", 1)[1]) for line in urllib.request.urlopen(ENDPOINT + "/metrics").read().decode().splitlines()
    if line.startswith("helios_registry_requests_total{") and '"/hub/' in line
)
first = snapshot_download("org/m")
result = {"snapshot": tree(first), "name": Path(first).name}
before = calls(); snapshot_download("org/m"); result["warm by ref"] = calls() - before
before = calls(); snapshot_download("org/m", revision=MAIN); result["warm by commit"] = calls() - before
result["v1"] = sorted(tree(snapshot_download("org/m", revision="v1")))
result["commit"] = sorted(tree(snapshot_download("org/m", revision=V1, allow_patterns=["*.txt"], cache_dir="c2")))
result["local_dir"] = tree(snapshot_download("org/m", local_dir="here"))
result["solo"] = Path(hf_hub_download("solo", "config.json")).read_text()
result["dataset"] = Path(hf_hub_download("org/d", "old.txt", repo_type="dataset")).read_text()
result["nested"] = Path(hf_hub_download("org/m", "data/part 1 (ü).txt", revision="v1")).read_text()
result["exists"] = [
    api.file_exists("org/m", "config.json"), api.file_exists("org/m", "nope"), api.repo_exists("org/m"),
    api.repo_exists("org/none"), api.revision_exists("org/m", "v1"), api.revision_exists("org/m", "v9"),
]
result["tree"] = {
    f.path: [f.size, f.blob_id, f.lfs.sha256 if f.lfs else None]
    for f in api.list_repo_tree("org/m", recursive=True) if hasattr(f, "size")
}
result["paths"] = [p.path for p in api.get_paths_info("org/m", ["config.json", "data", "nope"], expand=True)]
info = api.model_info("org/m", revision="v1", files_metadata=True)
result["info"] = [info.id, info.sha, len(info.siblings), info.siblings[0].size]
refs = api.list_repo_refs("org/m", include_pull_requests=True)
result["refs"] = {ref.name: ref.target_commit for ref in refs.branches}
result["commits"] = [[c.commit_id, c.title, c.message] for c in api.list_repo_commits("org/m")]
result["models"] = [m.id for m in api.list_models(author="org")]
fs = HfFileSystem()
result["ls"] = sorted(fs.ls("org/m", detail=False))
result["glob"] = fs.glob("org/m@v1/data/**/*.bin")
with fs.open("org/m/weights.safetensors", "rb", block_size=1 << 20) as file:
    file.seek(4_194_000); middle = file.read(1000)
    file.seek(-10, 2); end = file.read()
result["ranges"] = [middle.hex(), end.hex(), fs.cat_file("org/m/weights.safetensors", 5, 105).hex()]
found = api.get_safetensors_metadata("org/tiny")
result["safetensors"] = [len(found.files_metadata), sum(len(f.tensors) for f in found.files_metadata.values())]
result["errors"] = {
    "repo": raised(hf_hub_download, "org/none", "x"),
    "revision": raised(hf_hub_download, "org/m", "config.json", revision="v9"),
    "entry": raised(hf_hub_download, "org/m", "nope"),
    "info": raised(api.model_info, "org/none"),
    "tree": raised(lambda: list(api.list_repo_tree("org/m", "nope"))),
    "snapshot": raised(snapshot_download, "org/m", revision="v9"),
    "whoami": raised(api.whoami, token="hf_x"),
}
result["no_exist"] = [str(p.relative_to(p.parents[1])) for p in Path(os.environ["HF_HOME"]).rglob(".no_exist/*/*")]
"""


@pytest.mark.parametrize("version", VERSIONS)
def test_huggingface_hub_reads_everything(site, version, tmp_path):
    script = f"MAIN, V1 = {site.main!r}, {site.v1!r}\nos.chdir({str(tmp_path)!r})\n{READ}"
    result = run_client(version, script, site.url, tmp_path / "hf")
    files = site.files
    sums = {path: hashlib.sha256(data).hexdigest() for path, data in files.items()}
    assert result["snapshot"] == result["local_dir"] == sums
    assert result["name"] == site.main
    assert result["warm by ref"] == 1
    assert result["warm by commit"] == (1 if version.startswith("0.") else 0)  # the old one always asks
    assert result["v1"] == sorted([*files, "old.txt"])
    assert result["commit"] == ["data/part 1 (ü).txt", "old.txt"]
    assert result["solo"].encode() == files["config.json"]
    assert result["dataset"] == "only in v1"
    assert result["nested"].encode() == files["data/part 1 (ü).txt"]
    assert result["exists"] == [True, False, True, False, True, False]
    wanted = expected_tree(files)
    assert result["tree"] == {p: [e["size"], e["oid"], e.get("lfs", {}).get("oid")] for p, e in wanted.items()}
    assert result["paths"] == ["config.json", "data"]
    assert result["info"] == ["org/m", site.v1, len(files) + 1, len(files["README.md"])]
    assert result["refs"] == {"main": site.main, "v1": site.v1}
    assert result["commits"] == [[site.main, "The second", ""], [site.v1, "The first", "with more to say"]]
    assert result["models"] == ["org/m", "org/tiny"]
    assert result["ls"] == sorted({f"org/m/{path.split('/')[0]}" for path in files})
    assert result["glob"] == ["org/m@v1/data/deep/er/x.bin"]
    weights = files["weights.safetensors"]
    assert [bytes.fromhex(text) for text in result["ranges"]] == [
        weights[4_194_000:4_195_000],
        weights[-10:],
        weights[5:105],
    ]
    shards = list(site.tiny.glob("*.safetensors"))
    assert result["safetensors"][0] == len(shards)
    assert result["safetensors"][1] > len(shards)
    errors = result["errors"]
    assert "RepositoryNotFoundError" in errors["repo"]
    assert "RepositoryNotFoundError" in errors["info"]
    assert "RevisionNotFoundError" in errors["revision"]
    assert "RevisionNotFoundError" in errors["snapshot"]
    assert "EntryNotFoundError" in errors["entry"]
    assert "EntryNotFoundError" in errors["tree"]
    assert "HTTPError" in errors["whoami"]
    assert f"{site.main}/nope" in result["no_exist"], "the client may stop asking for a file this commit does not have"


def test_the_command_line_downloads(site, tmp_path):
    hf = ROOT / ".venvs" / "hub-2.4.0" / "bin" / "hf"
    done = subprocess.run(
        [hf, "download", "org/m", "--revision", "v1", "--local-dir", tmp_path / "here"],
        env={**os.environ, "HF_ENDPOINT": site.url, "HF_HOME": str(tmp_path / "hf")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "here" / "old.txt").read_text() == "only in v1"


@pytest.mark.slow
def test_transformers_loads_a_model(site, tmp_path):
    script = """
        import sys, torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        answers = []
        for source in sys.argv[1:]:
            inputs = AutoTokenizer.from_pretrained(source)("the quick river", return_tensors="pt")
            answers.append(AutoModelForCausalLM.from_pretrained(source)(**inputs).logits)
        assert torch.equal(*answers), answers
        print("equal", answers[0].shape)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), "org/tiny", str(site.tiny)],
        env={**os.environ, "HF_ENDPOINT": site.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("equal")


# --- damage ----------------------------------------------------------------------------------------------------------


def largest_object(home: Path) -> Path:
    objects = [
        path for path in (home / "store" / "public").rglob("*") if path.is_file() and "recipes" not in path.parts
    ]
    return max(objects, key=lambda path: path.stat().st_size)


def flip(path: Path, offset: int) -> None:
    mode = path.stat().st_mode
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))
    path.chmod(mode)


def test_a_record_that_is_gone_is_no_missing_file(tmp_path):
    """A client that hears 404 with a commit remembers for ever that the file does not exist."""
    helios = Command(tmp_path / "home")
    with running_registry(helios) as registry:
        commit = helios("push", str(write(tmp_path / "m", {"config.json": b"{}"})), "org/m")
    for path in (tmp_path / "home" / "store" / "public" / "recipes").rglob("*"):
        if path.is_file():
            path.unlink()
    with running_registry(helios) as registry:
        site = Site(registry, {}, "", commit, tmp_path)
        status, headers, _ = site.ask("GET", "/org/m/resolve/main/config.json")
        assert (status, headers["x-error-code"]) == (502, "Integrity")
        assert "x-repo-commit" not in headers


def test_a_damaged_chunk_never_leaves(tmp_path, expected_log_errors):
    """At the start: a clean 502. Behind data that was sent: the connection breaks, and the resumed request gets 502."""
    helios = Command(tmp_path / "home")
    weights = hashlib.shake_256(b"w").digest(40 << 20)
    with running_registry(helios) as registry:
        helios("push", str(write(tmp_path / "m", {"w.bin": weights, "config.json": b"{}"})), "org/m")
        site = Site(registry, {}, "", "", tmp_path)
        target = largest_object(tmp_path / "home")
        assert target.stat().st_size == len(weights)
        assert site.ask("GET", "/org/m/resolve/main/w.bin")[2] == weights  # passed once, and remembered as such
        damaged = 33 << 20
        flip(target, damaged)
        with pytest.raises((http.client.IncompleteRead, ConnectionError)) as caught:
            site.ask("GET", "/org/m/resolve/main/w.bin")
        if isinstance(caught.value, http.client.IncompleteRead):
            got = caught.value.partial
            assert got == weights[: len(got)]
            assert len(got) <= 32 << 20
        chunk = range(32 << 20, 36 << 20)
        for wanted in (damaged, chunk[0], chunk[-1]):
            status, headers, body = site.ask(
                "GET", "/org/m/resolve/main/w.bin", {"range": f"bytes={wanted}-{wanted + 9}"}
            )
            assert (status, headers["x-error-code"]) == (502, "Integrity")
            assert "chunk 8" in headers["x-error-message"]
            assert weights[wanted : wanted + 9] not in body
        # What is whole is still served, the neighbours in the same object included.
        for wanted in (chunk[0] - 10, chunk[-1] + 1):
            status, _, body = site.ask("GET", "/org/m/resolve/main/w.bin", {"range": f"bytes={wanted}-{wanted + 8}"})
            assert (status, body) == (206, weights[wanted : wanted + 9])
        assert site.ask("GET", "/org/m/resolve/main/config.json")[2] == b"{}"
        assert "helios_registry_verify_failures_total 4.0" in site.ask("GET", "/metrics")[2].decode()
        script = """
        result = raised(hf_hub_download, "org/m", "w.bin")
        whole = [p for p in Path(os.environ["HF_HOME"]).rglob("*") if p.is_file() and p.stat().st_size >= 40 << 20]
        assert result and not whole, (result, whole)
        """
        with ThreadPoolExecutor() as threads:
            runs = [threads.submit(run_client, v, script, registry.url, tmp_path / f"hf-{v}") for v in VERSIONS]
            assert all(run.result() for run in runs), "no client may take it for whole"
