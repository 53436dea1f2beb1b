"""Which call a path of the Hub API means."""

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.errors import InvalidInput
from registry.hub.paths import HubCall, parse, parse_tenant

SHA = "a" * 40

TABLE = [
    ("/api/models/org/name", HubCall("info", "models", "org/name")),
    ("/api/models/gpt2", HubCall("info", "models", "gpt2")),
    ("/api/models/org/name/", HubCall("info", "models", "org/name")),
    ("/api/datasets/org/name", HubCall("info", "datasets", "org/name")),
    ("/api/models/org/name/revision/main", HubCall("info", "models", "org/name", "main")),
    ("/api/models/gpt2/revision/main", HubCall("info", "models", "gpt2", "main")),
    ("/api/models/o/m/revision/refs%2Fpr%2F1", HubCall("info", "models", "o/m", "refs/pr/1")),
    ("/api/models/o/m/revision/refs/pr/1", HubCall("info", "models", "o/m", "refs/pr/1")),
    ("/api/models/o/m/tree/main", HubCall("tree", "models", "o/m", "main")),
    ("/api/models/o/m/tree/main/", HubCall("tree", "models", "o/m", "main")),
    ("/api/models/gpt2/tree/main/a/b", HubCall("tree", "models", "gpt2", "main", "a/b")),
    ("/api/models/o/m/tree/main/a%2Fb%20c", HubCall("tree", "models", "o/m", "main", "a/b c")),
    (f"/api/models/o/m/tree/{SHA}/tree/x", HubCall("tree", "models", "o/m", SHA, "tree/x")),
    ("/api/models/o/m/paths-info/v1", HubCall("paths-info", "models", "o/m", "v1")),
    ("/api/models/o/m/refs", HubCall("refs", "models", "o/m")),
    ("/api/models/gpt2/refs", HubCall("refs", "models", "gpt2")),
    ("/api/models/o/m/commits/main", HubCall("commits", "models", "o/m", "main")),
    ("/api/whoami-v2", HubCall("whoami", "")),
    ("/api/models", HubCall("list", "models")),
    ("/api/datasets/", HubCall("list", "datasets")),
    ("/o/m/resolve/main/config.json", HubCall("resolve", "models", "o/m", "main", "config.json")),
    ("/gpt2/resolve/main/config.json", HubCall("resolve", "models", "gpt2", "main", "config.json")),
    ("/datasets/o/d/resolve/v1/data/x.csv", HubCall("resolve", "datasets", "o/d", "v1", "data/x.csv")),
    ("/datasets/d/resolve/v1/x.csv", HubCall("resolve", "datasets", "d", "v1", "x.csv")),
    ("/spaces/o/s/resolve/main/app.py", HubCall("resolve", "spaces", "o/s", "main", "app.py")),
    ("/o/m/resolve/refs%2Fpr%2F1/x", HubCall("resolve", "models", "o/m", "refs/pr/1", "x")),
    ("/o/m/resolve/main/resolve/main/x", HubCall("resolve", "models", "o/m", "main", "resolve/main/x")),
    ("/api/models/o/m/auth-check", HubCall("auth-check", "models", "o/m")),
    ("/api/datasets/d/auth-check/write", HubCall("auth-check", "datasets", "d", None, "write")),
    (
        "/api/models/o/m/safetensors-metadata/a/b.json",
        HubCall("safetensors-metadata", "models", "o/m", None, "a/b.json"),
    ),
    ("/api/models/o/m/preupload/refs%2Fpr%2F1", HubCall("preupload", "models", "o/m", "refs/pr/1")),
    ("/api/models/o/m/branch/a%2Fb", HubCall("branch", "models", "o/m", "a/b")),
    ("/api/repos/create", HubCall("create", "")),
    ("/o/m.git/info/lfs/objects/batch", HubCall("lfs", "models", "o/m", None, "batch")),
    ("/datasets/d.git/info/lfs/objects/verify", HubCall("lfs", "datasets", "d", None, "verify")),
    ("/o/m/resolve/main/%E2%82%AC%2520", HubCall("resolve", "models", "o/m", "main", "€%20")),
]


@pytest.mark.parametrize(("path", "call"), TABLE, ids=[path for path, _ in TABLE])
def test_the_likeliest_reading(path, call):
    assert parse(path)[0] == call


@pytest.mark.parametrize(("path", "call"), TABLE, ids=[path for path, _ in TABLE])
def test_a_prefix_changes_nothing(path, call):
    assert parse(f"/t/acme{path}", "/t/acme") == parse(path)


@pytest.mark.parametrize(("path", "call"), TABLE, ids=[path for path, _ in TABLE])
def test_a_tenant_is_named_by_a_prefix(path, call):
    assert parse_tenant(f"/t/acme{path}") == ("acme", parse(path))
    assert parse_tenant(f"/hub/t/acme{path}", "/hub") == ("acme", parse(path))
    assert parse_tenant(path) is None


def test_an_organisation_may_be_called_like_the_prefix_of_tenants():
    assert parse_tenant("/t/m/resolve/main/config.json") is None
    assert parse("/t/m/resolve/main/config.json") == [HubCall("resolve", "models", "t/m", "main", "config.json")]


def test_repositories_called_like_a_marker_have_a_second_reading():
    assert HubCall("resolve", "models", "o/resolve", "main", "x") in parse("/o/resolve/resolve/main/x")
    assert HubCall("tree", "models", "tree/tree", "main") in parse("/api/models/tree/tree/tree/main")
    assert HubCall("info", "models", "o/refs") in parse("/api/models/o/refs")
    assert HubCall("resolve", "models", "o/m", "refs", "pr/1/x") in parse("/o/m/resolve/refs/pr/1/x")


@pytest.mark.parametrize(
    "path",
    [
        "/", "", "/api", "/api/v1/repos", "/healthz", "/o/m", "/o/m/blob/main/x", "/o/m/resolve/main",
        "/o/m/resolve/main/", "/a/b/c/resolve/main/x", "/api/models/a/b/c", "/api/models/o/m/revision",
        "/api/models/o/m/refs/x",
        "/api/models/o/m/paths-info/main/x", "/api/whoami-v2/x", "/api/agent-harnesses",
        "/api/models/o/m/xet-read-token", "/api/repos", "/api/repos/create/x", "/api/models/o/m/auth-check/a/b",
        "/o/m.git/info/lfs/objects", "/o/m/info/lfs/objects/batch", "/.git/info/lfs/objects/batch", "/t/acme",
    ],
)  # fmt: skip
def test_what_is_no_call_has_no_reading(path):
    assert parse(path) == []


def test_a_path_that_is_not_utf8_is_refused():
    with pytest.raises(InvalidInput, match="UTF-8"):
        parse("/o/m/resolve/main/%ff")


SEGMENT = st.text(st.characters(exclude_characters="/", exclude_categories=("Cs",)), min_size=1, max_size=8)


@given(SEGMENT, SEGMENT, st.lists(SEGMENT, min_size=1, max_size=3), st.lists(SEGMENT, min_size=1, max_size=4))
def test_what_a_client_quotes_is_among_the_readings(org, name, revision, path):
    """huggingface_hub quotes a revision whole and a file path by segments."""
    revision, path = "/".join(revision), "/".join(path)
    url = f"/{quote(org)}/{quote(name)}/resolve/{quote(revision, safe='')}/{quote(path)}"
    if org not in ("api", "datasets", "spaces", "kernels"):
        assert HubCall("resolve", "models", f"{org}/{name}", revision, path) in parse(url)
    url = f"/api/models/{quote(org)}/{quote(name)}/tree/{quote(revision, safe='')}/{quote(path, safe='')}"
    assert HubCall("tree", "models", f"{org}/{name}", revision, path) in parse(url)


@given(st.text(max_size=60))
def test_no_path_breaks_it(path):
    try:
        readings = parse("/" + path)
    except InvalidInput:
        return
    assert all(call.verb for call in readings)
