"""Branches, tags and aliases, on the command line and as the Hub's clients see them."""

import contextlib
import json

import pytest

from helios.names import RepoId
from tests.support.mounts import write
from tests.support.registry import running_registry

pytestmark = pytest.mark.both_databases


def test_tags_stay_aliases_move_and_everybody_sees_who_did_it(helios, tmp_path):
    with running_registry(helios) as registry, contextlib.closing(registry.client()) as client:
        where = ("--registry", registry.url)

        def push(content):
            return helios("push", write(tmp_path / content, {"a": content.encode()}), "org/m", *where).out.strip()

        first = push("one")
        assert helios("ref", "set", "org/m", "v1", "--tag", *where).out.strip() == first
        helios("ref", "set", "org/m@v1", "champion", "--alias", *where)
        second = push("two")
        assert "tags don't move" in helios("ref", "set", "org/m", "v1", *where, code=1).err
        assert "no alias" in helios("ref", "set", "org/m", "v1", "--alias", *where, code=2).err
        assert "expected" in helios("ref", "set", "org/m", "champion", "--expect", second, *where, code=1).err
        helios("ref", "set", "org/m", "champion", *where)
        listed = json.loads(helios("ref", "ls", "org/m", "--json", *where).out)["refs"]
        assert [(r["ref"], r["kind"], r["commit"]) for r in listed] == [
            ("champion", "alias", second),
            ("main", "branch", second),
            ("v1", "tag", first),
        ]
        moves = json.loads(helios("ref", "log", "org/m@champion", "--json", *where).out)["moves"]
        assert [(m["old"], m["new"]) for m in moves] == [(first, second), (None, first)]
        assert helios("ref", "log", "org/m", *where).out.count("\n") == 6
        told = client.http.json("GET", "/api/models/org/m/refs")
        assert [tag["name"] for tag in told["tags"]] == ["v1"]
        assert [branch["name"] for branch in told["branches"]] == ["champion", "main"]


def test_a_ref_is_removed_from_where_it_was_seen(helios, tmp_path):
    with running_registry(helios) as registry, contextlib.closing(registry.client()) as client:
        where = ("--registry", registry.url)

        def push(content):
            return helios("push", write(tmp_path / content, {"a": content.encode()}), "org/m", *where).out.strip()

        first, second = push("one"), push("two")
        told = helios("rm", "org/m@main", "--yes", "--expect", first, *where, code=1).err
        assert f"it is {second}, expected {first}" in told
        assert client.refs(RepoId.parse("org/m")) == {"main": second}
        assert "--expect is about a ref" in helios("rm", "org/m", "--yes", "--expect", second, *where, code=2).err
        for query, problem in (("&ref=main&expect=main", "not a commit"), (f"&expect={second}", "no ref is named")):
            with client.http.request("DELETE", f"/api/v1/repos?repo=models/org/m{query}") as response:
                assert (response.status, problem in response.read().decode()) == (400, True)
        helios("rm", "org/m@main", "--yes", "--expect", second, *where)
        assert client.refs(RepoId.parse("org/m")) == {}


def test_what_is_deprecated_warns_and_what_is_retired_is_refused(helios, tmp_path):
    with running_registry(helios) as registry, contextlib.closing(registry.client()) as client:
        where = ("--registry", registry.url)

        def push(content):
            return helios("push", write(tmp_path / content, {"a": content.encode()}), "org/m", *where).out.strip()

        def ask(path):
            with client.http.request("GET", path) as response:
                return response.status, response.headers, response.read()

        first, second = push("one"), push("two")
        helios("deprecate", "org/m", "-m", "old\u00e9", "--use", "org/new", *where)
        status, headers, body = ask("/org/m/resolve/main/a")
        assert (status, body) == (200, b"two")
        assert headers["x-hf-warning"] == "deprecated; org/m is deprecated: old?; use org/new"
        assert "deprecated: old\u00e9; use org/new" in helios("show", "org/m", *where).out
        helios("deprecate", f"org/m@{first}", "-m", "leaks", "--retire", *where)
        status, headers, _ = ask(f"/org/m/resolve/{first}/a")
        assert (status, headers["x-error-code"]) == (410, "Retired")
        assert "leaks" in headers["x-error-message"]
        assert "leaks" in helios("show", f"org/m@{first}", *where, code=1).err
        assert ask("/org/m/resolve/main/a")[0] == 200
        assert client.resolve(RepoId.parse("org/m"), "main").commit == second
        helios("deprecate", "org/m", "-m", "gone", "--retire", *where)
        status, _, body = ask("/api/models")
        assert (status, body) == (200, b"[]"), "a list goes on without it"
        helios("deprecate", "org/m", "--undo", *where)
        helios("deprecate", f"org/m@{first}", "--undo", *where)
        assert "x-hf-warning" not in ask(f"/org/m/resolve/{first}/a")[1]
        assert helios("deprecate", "org/m", "--undo", *where, code=1).err
        assert helios("deprecate", "org/m@main", "-m", "x", *where, code=2).err
        assert helios("deprecate", "org/m", *where, code=2).err
