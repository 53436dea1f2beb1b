"""Directory listings, and git's ids for directories: git itself is the judge."""

import os
import subprocess

from hypothesis import given
from hypothesis import strategies as st

from heliosfs.store.manifest import FileEntry, Manifest, git_blob_oid
from registry.hub.tree import Directory, Tree

FILES = {
    "README.md": b"# hello\n",
    "config.json": b"{}",
    "a/b/c.txt": b"deep",
    "a/b.txt": b"sorts before a/b in git's order",
    "a-b/x": b"- sorts before /",
    "a.b/x": b"",
    "run.sh": b"#!/bin/sh\n",
    "ünïcode/ß.json": b"[]",
}


def entry(data: bytes, executable: bool = False) -> FileEntry:
    return FileEntry("0" * 64, len(data), git_blob_oid(data), "0" * 64, False, executable)


def tree() -> Tree:
    return Tree(Manifest({path: entry(data, path.endswith(".sh")) for path, data in FILES.items()}))


def test_directory_ids_are_those_of_git(tmp_path):
    for path, data in FILES.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    (tmp_path / "run.sh").chmod(0o755)
    env = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=tmp_path, env=env, check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init", "-q")
    git("add", ".")
    root = git("write-tree")
    ours = tree()
    assert ours.root == Directory(root)
    for line in git("-c", "core.quotePath=off", "ls-tree", "-r", "-t", root).splitlines():
        meta, path = line.split("\t")
        _, kind, oid = meta.split()
        node = ours.get(path)
        assert (node.oid if isinstance(node, Directory) else node.git_oid) == oid, path
        assert isinstance(node, Directory) == (kind == "tree")


def names(page):
    return [path for path, _ in page]


def test_listings():
    ours = tree()
    top, more = ours.listing("", recursive=False, after="", limit=100)
    assert names(top) == ["README.md", "a", "a-b", "a.b", "config.json", "run.sh", "ünïcode"]
    assert not more
    assert names(ours.listing("a", recursive=False, after="", limit=100)[0]) == ["a/b", "a/b.txt"]
    assert names(ours.listing("a", recursive=True, after="", limit=100)[0]) == ["a/b", "a/b.txt", "a/b/c.txt"]
    assert ours.get("a/nope") is None
    assert ours.get("") == ours.root


SEGMENT = st.text("ab.-", min_size=1, max_size=3).filter(lambda s: s not in (".", ".."))
PATHS = st.lists(st.lists(SEGMENT, min_size=1, max_size=3).map("/".join), min_size=1, max_size=15, unique=True)


@given(PATHS, st.integers(1, 5), st.booleans())
def test_pages_put_together_are_the_whole_listing(paths, limit, recursive):
    files = {p: entry(p.encode()) for p in paths if not any(q.startswith(p + "/") for q in paths)}
    ours = Tree(Manifest(files))
    whole, more = ours.listing("", recursive=recursive, after="", limit=10_000)
    assert not more
    assert len(ours) == len(
        set(files) | {"/".join(p.split("/")[:n]) for p in files for n in range(1, p.count("/") + 1)}
    )
    if recursive:
        assert {path for path, node in whole if isinstance(node, FileEntry)} == set(files)
    pages, after, more = [], "", True
    while more:
        page, more = ours.listing("", recursive=recursive, after=after, limit=limit)
        assert len(page) <= limit
        pages += page
        after = page[-1][0]
    assert pages == whole
