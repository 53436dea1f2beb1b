"""Manifests and commit records: one content, one encoding; everything else is refused."""

from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.errors import HeliosError, IntegrityError, InvalidInput
from helios.names import RepoId, check_path
from heliosfs.store.manifest import (
    COMMIT_MAGIC,
    MANIFEST_MAGIC,
    CommitRecord,
    FileEntry,
    Manifest,
    canonical,
    check_tree,
    git_blob_oid,
    lfs_pointer,
    local_commit,
)
from tests.support.mutation import mutate


def hexadecimal(digits: int) -> st.SearchStrategy[str]:
    return st.text("0123456789abcdef", min_size=digits, max_size=digits)


def is_path(text: str) -> bool:
    try:
        check_path(text)
    except InvalidInput:
        return False
    return True


entries = st.builds(
    FileEntry,
    hexadecimal(64),
    st.integers(0, (1 << 63) - 1),
    hexadecimal(40),
    hexadecimal(64),
    lfs=st.booleans(),
    executable=st.booleans(),
)
names = st.text(min_size=1, max_size=12).filter(lambda t: "/" not in t and is_path(t))
trees = st.dictionaries(names, entries, max_size=6)
commits = st.builds(
    CommitRecord,
    st.sampled_from(["models/org/name", "models/gpt2", "datasets/org/name"]),
    hexadecimal(40),
    hexadecimal(64),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.integers(0, (1 << 63) - 1),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.none() | hexadecimal(40),
    st.dictionaries(names, names, max_size=3),
)


@given(trees)
def test_a_manifest_survives_the_round_trip(files: dict[str, FileEntry]) -> None:
    manifest = Manifest(files)
    assert Manifest.decode(manifest.encode(), manifest.digest) == manifest


@given(trees)
def test_the_order_of_files_does_not_matter(files: dict[str, FileEntry]) -> None:
    assert Manifest(dict(reversed(files.items()))).encode() == Manifest(files).encode()


@given(commits)
def test_a_commit_record_survives_the_round_trip(record: CommitRecord) -> None:
    assert CommitRecord.decode(record.encode()) == record


@given(st.one_of(trees.map(Manifest), commits), st.data())
def test_a_mutated_record_is_refused_or_canonical(record: Manifest | CommitRecord, data: st.DataObject) -> None:
    encoded = mutate(data, record.encode())
    try:
        again = type(record).decode(encoded)
    except IntegrityError:
        return
    assert again.encode() == encoded


@given(st.binary(max_size=120))
@pytest.mark.parametrize(("kind", "magic"), [(Manifest, MANIFEST_MAGIC), (CommitRecord, COMMIT_MAGIC)])
def test_any_bytes_are_refused(kind: type[Manifest] | type[CommitRecord], magic: bytes, data: bytes) -> None:
    for record in (data, magic + data):
        with pytest.raises(IntegrityError):
            kind.decode(record)


def changed(**values: object) -> bytes:
    entry = {"sha256": "0" * 64, "size": 1, "git_oid": "0" * 40, "recipe": "0" * 64, "lfs": False, "executable": False}
    return MANIFEST_MAGIC + canonical({"files": {"a": {**entry, **values}}})


@pytest.mark.parametrize(
    "record",
    [
        changed(size=-1),
        changed(size=1 << 63),
        changed(size=1.0),
        changed(sha256="0" * 63),
        changed(sha256="g" * 64),
        changed(sha256="A" * 64),
        changed(git_oid=""),
        changed(recipe=None),
        changed(lfs=1),
        changed(unknown=1),
        MANIFEST_MAGIC + b'{"files":{},"more":1}',
        MANIFEST_MAGIC + b'{"files": {}}',
        MANIFEST_MAGIC + b'{"files":{}}\n',
        MANIFEST_MAGIC + b'{"files":{},"files":{}}',
        MANIFEST_MAGIC + b'{"more":' + b"[" * 100_000 + b"]" * 100_000 + b',"files":{}}',
        MANIFEST_MAGIC[:-1],
        b"",
    ],
)
def test_malformed_manifests_are_refused(record: bytes) -> None:
    with pytest.raises(IntegrityError):
        Manifest.decode(record)


@pytest.mark.parametrize("path", ["../a", "/a", "a\\b", "a//b", "a/./b", "a\0b", "", "a/", "x" * 256])
def test_a_manifest_with_an_unsafe_path_is_refused(path: str) -> None:
    entry = FileEntry("0" * 64, 1, "0" * 40, "0" * 64)
    with pytest.raises(IntegrityError, match="bad path"):
        Manifest.decode(Manifest({path: entry}).encode())


def test_a_path_is_a_file_or_a_directory_but_not_both() -> None:
    check_tree({"a/b": 1, "a/c": 1, "b": 1})
    with pytest.raises(InvalidInput, match="'a' is both a file and a directory"):
        check_tree({"a": 1, "a/b/c": 1})


@pytest.mark.parametrize("magic", [b"helios-manifest 2\n", b"helios-manifest 10\n"])
def test_a_newer_manifest_asks_for_an_upgrade(magic: bytes) -> None:
    with pytest.raises(IntegrityError, match="upgrade"):
        Manifest.decode(magic + b"{}")


@pytest.mark.parametrize(
    "values", [{"repo": "models/../x"}, {"commit": "x"}, {"manifest": ""}, {"parent": "main"}, {"time": -1}]
)
def test_malformed_commit_records_are_refused(values: dict[str, object]) -> None:
    good = {"repo": "models/o/n", "commit": "0" * 40, "manifest": "0" * 64, "author": "", "time": 0, "message": ""}
    good |= {"parent": None, "lineage": {}}
    CommitRecord.decode(COMMIT_MAGIC + canonical(good))
    with pytest.raises(IntegrityError):
        CommitRecord.decode(COMMIT_MAGIC + canonical({**good, **values}))


def test_local_commits_depend_on_the_repository_and_the_content() -> None:
    one, two = RepoId.parse("org/one"), RepoId.parse("org/two")
    digest = hashlib.sha256(b"manifest").hexdigest()
    assert local_commit(one, digest) == local_commit(one, digest)
    assert len({local_commit(one, digest), local_commit(two, digest), local_commit(one, "0" * 64)}) == 3
    assert local_commit(one, digest) == hashlib.sha256(f"models/org/one\n{digest}".encode()).hexdigest()[:40]


def test_git_ids_are_those_of_git() -> None:
    # `echo hello | git hash-object --stdin`
    assert git_blob_oid(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"
    # `printf '' | git hash-object --stdin`
    assert git_blob_oid(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    pointer = lfs_pointer("4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393", 12345)
    assert pointer == (  # the example of the git-lfs specification
        b"version https://git-lfs.github.com/spec/v1\n"
        b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
        b"size 12345\n"
    )


@given(st.text(max_size=20))
def test_any_path_is_refused_or_survives(path: str) -> None:
    manifest = Manifest({path: FileEntry("0" * 64, 1, "0" * 40, "0" * 64)})
    try:
        record = manifest.encode()
    except UnicodeEncodeError:
        with pytest.raises(InvalidInput):
            check_path(path)
        return
    try:
        again = Manifest.decode(record)
    except HeliosError:
        assert not is_path(path)
        return
    assert is_path(path)
    assert again == manifest
    assert json.loads(record.partition(b"\n")[2])["files"].keys() == {path}
