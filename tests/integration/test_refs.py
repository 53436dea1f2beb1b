"""Branches, tags and aliases, on the command line and as the Hub's clients see them."""

import contextlib
import json

from tests.support.mounts import write
from tests.support.registry import running_registry


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
