"""The Hub's read API of a real registry, over raw HTTP: headers, ranges, errors, shapes, pages."""

from __future__ import annotations

import hashlib
import json
from urllib.parse import quote

import pytest

from tests.support.hub_site import FILES, expected_tree, hub_site, oid_of

pytestmark = pytest.mark.both_databases


@pytest.fixture(scope="module")
def site(tmp_path_factory, databases):
    with hub_site(tmp_path_factory.mktemp("hub-api"), **databases()) as found:
        yield found


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


def test_a_wrong_method_is_told_which_is_right(site):
    for method, path, allowed in (
        ("POST", "/api/models/org/m", "GET, HEAD"),
        ("PUT", "/org/m/resolve/main/x", "GET, HEAD"),
        ("GET", "/api/models/org/m/paths-info/main", "POST"),
    ):
        status, headers, _ = site.ask(method, path, body=b"")
        assert (status, headers["allow"]) == (405, allowed)
        assert method in headers["x-error-message"]


def test_whoami_is_nobody(site):
    """Without a token of the registry's own; who has one is told in the matrix of clients."""
    status, _, body = site.ask("GET", "/api/whoami-v2", {"authorization": "Bearer hf_x"})
    assert status == 401
    assert json.loads(body)["error"]


def test_every_answer_names_its_request(site):
    """huggingface_hub shows the name in its errors; log lines hold it, too."""
    for path in ("/org/m/resolve/main/config.json", "/api/models/org/none", "/healthz", "/nowhere"):
        assert site.ask("GET", path, {"x-amzn-trace-id": "Root=1-ab;x"})[1]["x-request-id"] == "Root=1-ab;x"
        assert site.ask("GET", path, {"x-request-id": "a b"})[1]["x-request-id"].isalnum()
        assert len(site.ask("GET", path)[1]["x-request-id"]) == 16


def test_auth_check(site):
    for path in (
        "/api/models/org/m/auth-check",
        "/api/models/org/m/auth-check/write",
        "/api/datasets/org/d/auth-check",
    ):
        assert site.ask("GET", path)[0] == 200
    status, headers, _ = site.ask("GET", "/api/models/org/none/auth-check")
    assert (status, headers["x-error-code"]) == (404, "RepoNotFound")
    assert site.ask("GET", "/api/models/org/m/auth-check/sudo")[0] == 400


def test_an_error_message_fits_into_a_header(site):
    _, headers, _ = site.ask("GET", "/org/m/resolve/main/" + quote("ü\r\nx-evil: 1"))
    assert "x-evil" not in headers
    assert headers["x-error-message"].isascii()


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

    assert ids("") == ["org/card", "org/m", "org/tiny", "solo"]
    assert ids("", "datasets") == ["org/d"]
    assert ids("?search=TIN") == ["org/tiny"]
    assert ids("?author=org") == ["org/card", "org/m", "org/tiny"]
    assert ids("?author=org&search=m") == ["org/m"]
    assert ids("?filter=text-classification") == []
    assert site.json("/api/models?full=true&search=solo")[0]["siblings"]
    _, headers, body = site.ask("GET", "/api/models?limit=3&author=org")
    assert [i["id"] for i in json.loads(body)] == ["org/card", "org/m", "org/tiny"]
    assert "link" not in headers
    _, headers, _ = site.ask("GET", "/api/models?limit=3")
    following = headers["link"][1:].split(">")[0]
    assert following.startswith(site.url)
    assert [i["id"] for i in site.json(following.removeprefix(site.url))] == ["solo"]


def test_lists_are_filtered_and_sorted_by_what_cards_say(site):
    def ids(query: str) -> list[str]:
        return [item["id"] for item in site.json(f"/api/models?{query}")]

    carded = site.json("/api/models?search=card")[0]
    assert (carded["pipeline_tag"], carded["library_name"]) == ("text-generation", "transformers")
    assert {"license:apache-2.0", "de", "base_model:org/m", "dataset:org/d"} <= set(carded["tags"])
    assert ids("filter=license:apache-2.0&filter=de") == ids("filter=license:apache-2.0,de") == ["org/card"]
    assert ids("pipeline_tag=text-generation") == ids("filter=text-generation") == ["org/card"]
    assert ids("pipeline_tag=fill-mask") == ids("gated=true") == ids("inference=warm") == []
    times = {item["id"]: item["lastModified"] for item in site.json("/api/models?gated=false")}
    assert ids("sort=lastModified") == sorted(sorted(times), key=times.__getitem__, reverse=True)
    assert ids("sort=createdAt&direction=1") == sorted(sorted(times), key=times.__getitem__)
    assert ids("sort=downloads") == sorted(times)
    assert site.ask("GET", "/api/models?sort=beauty")[0] == 400
    for order in ("sort=lastModified", "sort=lastModified&direction=1", "sort=likes"):
        path, seen = f"/api/models?limit=1&{order}", []
        while path:
            _, headers, body = site.ask("GET", path)
            seen += [item["id"] for item in json.loads(body)]
            path = headers["link"][1:].split(">")[0].removeprefix(site.url) if "link" in headers else None
        assert seen == ids(order)
    item = site.json("/api/models?search=card&expand=sha&expand=siblings&expand=cardData")[0]
    assert set(item) == {"_id", "id", "modelId", "sha", "siblings", "cardData"}
    assert item["cardData"]["released"] == "2026-01-31"
    assert set(site.json("/api/models/org/card?expand[]=tags&expand[]=spaces")) == {"_id", "id", "modelId", "tags"}
    assert site.json("/api/models?search=card&cardData=true")[0]["cardData"]["license"] == "apache-2.0"


def test_no_sign_of_xet_in_what_is_too_small_for_it(site):
    """A client that sees a Xet hash in one place takes the whole way over Xet."""
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


def test_requests_are_counted_by_call(site):
    site.ask("HEAD", "/org/m/resolve/main/config.json")
    metrics = site.ask("GET", "/metrics")[2].decode()
    assert 'helios_registry_requests_total{route="/hub/resolve",status="200"}' in metrics
    assert "org/m" not in metrics, "a label for each repository would never end"
