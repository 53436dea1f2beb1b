"""What a user of huggingface_hub uploads to a registry: the cases of the matrix (see hub_driver)."""

from __future__ import annotations

import array
import hashlib
import io
import json
import math
import os
from pathlib import Path
from typing import Any

from hub_driver import Client, case, majors

LARGE = hashlib.shake_256(b"large").digest(700_000) + b"z" * 400_000


def named(c: Client, name: str) -> str:
    """A name of this run's own, in the namespace that the client may write."""
    return f"{c.site.org}/{c.site.run}-{name}"


def repo(c: Client, name: str, **kwargs: Any) -> str:
    """A new repository."""
    id_ = named(c, name)
    c.api.create_repo(id_, **kwargs)
    return id_


def content(c: Client, id_: str, revision: str | None = None, repo_type: str | None = None) -> dict[str, bytes]:
    """What a snapshot holds, but for .gitattributes."""
    found = Path(c.hub.snapshot_download(id_, revision=revision, repo_type=repo_type, cache_dir=c.cache))
    files = {str(p.relative_to(found)): p.read_bytes() for p in found.rglob("*") if p.is_file()}
    files.pop(".gitattributes", None)
    return files


def write(root: Path, files: dict[str, bytes]) -> Path:
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    return root


FILES = {
    "README.md": b"---\nlicense: mit\n---\n# Hi\n",
    "config.json": b"{}",
    "empty": b"",
    "data/x.bin": LARGE,
    "data/y.bin": b"tiny",
    "data/grüße 1.txt": "grüße\n".encode(),
}


@case
def repositories_are_made_and_removed(c: Client) -> None:
    id_ = named(c, "made")
    url = c.api.create_repo(id_)
    assert url.repo_id == id_
    assert url == (f"hf://{id_}" if c.major == 0 and c.site.tenant else f"{c.endpoint}/{id_}")
    assert c.api.create_repo(id_, exist_ok=True).repo_id == id_
    error = c.raises("HfHubHTTPError", c.api.create_repo, id_)
    assert error.response.status_code == 409
    assert "already created" in str(error)
    assert c.api.list_repo_files(id_) == [".gitattributes"]
    url = c.api.create_repo(id_, repo_type="dataset")
    assert url.repo_type == "dataset"
    c.api.delete_repo(id_, repo_type="dataset")
    assert not c.api.repo_exists(id_, repo_type="dataset")
    assert c.api.repo_exists(id_)
    c.api.delete_repo(id_)
    c.raises("RepositoryNotFoundError", c.api.delete_repo, id_)
    c.api.delete_repo(id_, missing_ok=True)
    c.raises("BadRequestError", c.api.create_repo, id_, repo_type="space", space_sdk="static")


@case
def private_is_what_a_tenant_owns(c: Client) -> None:
    id_ = named(c, "private")
    if c.site.tenant is None:
        error = c.raises("BadRequestError", c.api.create_repo, id_, private=True)
        assert "tenant" in str(error)
    else:
        c.api.create_repo(id_, private=True)
        c.api.delete_repo(id_)
        error = c.raises("HfHubHTTPError", c.api.create_repo, "other/m")
        assert error.response.status_code == 403


@case
def one_file_after_the_other(c: Client) -> None:
    id_ = repo(c, "files")
    first = c.api.upload_file(path_or_fileobj=b"one", path_in_repo="a.txt", repo_id=id_, commit_message="First")
    assert first.oid == c.api.model_info(id_).sha
    assert f"/{id_}/commit/{first.oid}" in first.commit_url
    second = c.api.upload_file(
        path_or_fileobj=io.BytesIO(LARGE), path_in_repo="w.bin", repo_id=id_, commit_message="Second",
        commit_description="Large",
    )  # fmt: skip
    path = write(c.directory, {"local.bin": LARGE[::-1]}) / "local.bin"
    c.api.upload_file(path_or_fileobj=path, path_in_repo="deep/v.bin", repo_id=id_)
    assert content(c, id_) == {"a.txt": b"one", "w.bin": LARGE, "deep/v.bin": LARGE[::-1]}
    history = [(x.title, x.message) for x in c.api.list_repo_commits(id_)]
    assert history[1:] == [("Second", "Large"), ("First", ""), ("initial commit", "")]
    (info,) = c.api.get_paths_info(id_, ["w.bin"], revision=second.oid)
    assert (info.size, info.lfs.sha256) == (len(LARGE), hashlib.sha256(LARGE).hexdigest())


@case
def a_folder_comes_back_as_it_was(c: Client) -> None:
    for repo_type in (None, "dataset"):
        id_ = repo(c, "folder", repo_type=repo_type)
        c.api.upload_folder(repo_id=id_, repo_type=repo_type, folder_path=write(c.directory / "f", FILES))
        assert content(c, id_, repo_type=repo_type) == FILES
    before = c.api.model_info(id_).sha
    if c.major == 0 and c.site.tenant:  # makes the commit's address itself, and can't read it below a prefix
        c.raises(ValueError, c.api.upload_folder, repo_id=id_, folder_path=c.directory / "f")
    else:
        c.api.upload_folder(repo_id=id_, folder_path=c.directory / "f")
    assert c.api.model_info(id_).sha == before, "nothing changed, so there is no commit"
    info = c.api.model_info(id_)
    assert info.card_data.license == "mit"


@case
def parts_of_a_folder(c: Client) -> None:
    id_ = repo(c, "parts")
    folder = write(c.directory / "f", {**FILES, ".gitignore": b"*.log\n/build\n", "x.log": b"", "build/y": b""})
    c.api.upload_folder(repo_id=id_, folder_path=folder, ignore_patterns=["data/*"])
    assert set(content(c, id_)) == {"README.md", "config.json", "empty", ".gitignore"}
    (folder / "config.json").write_bytes(b'{"new": 1}')
    c.api.upload_folder(
        repo_id=id_, folder_path=folder, path_in_repo="sub", allow_patterns=["config.json", "*.log"],
        commit_message="Below",
    )  # fmt: skip
    assert set(content(c, id_)) == {"README.md", "config.json", "empty", ".gitignore", "sub/config.json"}
    c.api.upload_folder(repo_id=id_, folder_path=folder, allow_patterns="README.md", delete_patterns=["*.json"])
    assert set(content(c, id_)) == {"README.md", "empty", ".gitignore"}


@case
def operations_of_one_commit(c: Client) -> None:
    add, delete, copy = c.hub.CommitOperationAdd, c.hub.CommitOperationDelete, c.hub.CommitOperationCopy
    id_ = repo(c, "operations")
    c.api.create_commit(id_, [add("a", b"1"), add("w.bin", LARGE), add("d/x", b"2"), add("d/e/y", b"3")],
                        commit_message="one")  # fmt: skip
    found = c.api.create_commit(
        id_, [copy("w.bin", "copy.bin"), copy("a", "b"), delete("d/"), add("a", b"new")], commit_message="two"
    )
    assert content(c, id_) == {"a": b"new", "b": b"1", "w.bin": LARGE, "copy.bin": LARGE}
    c.api.create_commit(id_, [delete("w.bin"), add("w.bin/now/a/directory", b"4")], commit_message="three")
    assert set(content(c, id_)) == {"a", "b", "copy.bin", "w.bin/now/a/directory"}
    assert set(content(c, id_, found.oid)) == {"a", "b", "copy.bin", "w.bin"}
    c.api.delete_file("b", id_)
    c.api.delete_folder("w.bin", id_)
    c.api.delete_files(id_, ["cop*"])
    assert set(content(c, id_)) == {"a"}
    c.raises(c.entry, c.api.delete_file, "b", id_)


@case
def a_commit_on_what_has_moved_is_refused(c: Client) -> None:
    add = c.hub.CommitOperationAdd
    id_ = repo(c, "moved")
    start = c.api.model_info(id_).sha
    first = c.api.create_commit(id_, [add("a", b"1")], commit_message="one", parent_commit=start)
    error = c.raises("HfHubHTTPError", c.api.create_commit, id_, [add("b", b"2")], commit_message="two",
                     parent_commit=start)  # fmt: skip
    assert error.response.status_code == 412
    assert "A commit has happened since" in str(error)
    c.api.create_commit(id_, [add("b", b"2")], commit_message="two", parent_commit=first.oid)
    assert set(content(c, id_)) == {"a", "b"}


@case
def branches_and_tags(c: Client) -> None:
    id_ = repo(c, "refs")
    c.api.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id=id_)
    c.api.create_branch(id_, branch="feature/x")
    c.api.create_branch(id_, branch="feature/x", exist_ok=True)
    assert c.raises("HfHubHTTPError", c.api.create_branch, id_, branch="feature/x").response.status_code == 409
    c.api.upload_file(path_or_fileobj=b"2", path_in_repo="b", repo_id=id_, revision="feature/x")
    assert set(content(c, id_)) == {"a"}
    assert set(content(c, id_, "feature/x")) == {"a", "b"}
    c.api.create_tag(id_, tag="v1.0", revision="feature/x", tag_message="The first")
    c.api.create_tag(id_, tag="v1.0", exist_ok=True)
    assert set(content(c, id_, "v1.0")) == {"a", "b"}
    c.raises("RevisionNotFoundError", c.api.create_tag, id_, tag="v2", revision="none")
    c.raises("RevisionNotFoundError", c.api.create_branch, id_, branch="y", revision="none")
    c.api.delete_branch(id_, branch="feature/x")
    assert set(content(c, id_, "v1.0")) == {"a", "b"}
    c.api.delete_tag(id_, tag="v1.0")
    refs = c.api.list_repo_refs(id_)
    assert [ref.name for ref in [*refs.branches, *refs.tags]] == ["main"]
    c.raises("RevisionNotFoundError", c.api.delete_tag, id_, tag="v1.0")


@case
def what_can_not_be_written_to(c: Client) -> None:
    add = [c.hub.CommitOperationAdd("a", b"1")]
    c.raises("RepositoryNotFoundError", c.api.create_commit, named(c, "none"), add, commit_message="x")
    id_ = repo(c, "errors")
    c.raises("RevisionNotFoundError", c.api.create_commit, id_, add, commit_message="x", revision="none")
    sha = c.api.model_info(id_).sha
    error = c.raises("BadRequestError", c.api.create_commit, id_, add, commit_message="x", revision=sha)
    assert "never changes" in str(error)
    error = c.raises("BadRequestError", c.api.create_commit, id_, add, commit_message="x", create_pr=True)
    assert "pull requests" in str(error)


@case
def a_file_that_is_called_safetensors_is_one(c: Client) -> None:
    id_ = repo(c, "tensors")
    header = json.dumps({"w": {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}}).encode()
    good = len(header).to_bytes(8, "little") + header + b"123456789"
    c.api.upload_file(path_or_fileobj=good, path_in_repo="m.safetensors", repo_id=id_)
    assert set(c.api.parse_safetensors_file_metadata(id_, "m.safetensors").tensors) == {"w"}
    c.raises("BadRequestError", c.api.upload_file, path_or_fileobj=good[:-1], path_in_repo="n.safetensors", repo_id=id_)
    assert set(content(c, id_)) == {"m.safetensors"}


@case
@majors(0, 1)
def a_large_folder(c: Client) -> None:
    id_ = repo(c, "large")
    c.api.upload_large_folder(
        repo_id=id_, repo_type="model", folder_path=write(c.directory / "f", FILES), num_workers=2,
        print_report=False,
    )  # fmt: skip
    assert content(c, id_) == FILES


@case
def what_a_client_remembers_to_have_sent(c: Client) -> None:
    """hf-xet sends no chunk twice, also in another process, another repository, another day."""
    numbers = array.array("f", (math.sin(n) for n in range(250_000))).tobytes()
    one, two = repo(c, "first"), repo(c, "second")
    c.api.upload_file(path_or_fileobj=numbers, path_in_repo="n.bin", repo_id=one)
    c.api.upload_file(path_or_fileobj=numbers + b"end", path_in_repo="n.bin", repo_id=two)
    c.api.upload_file(path_or_fileobj=b"start" + numbers, path_in_repo="m.bin", repo_id=one)
    c.hf("upload", two, str(write(c.directory, {"o.bin": numbers[:900_000] + LARGE}) / "o.bin"), "o.bin")
    assert content(c, one) == {"n.bin": numbers, "m.bin": b"start" + numbers}
    assert content(c, two) == {"n.bin": numbers + b"end", "o.bin": numbers[:900_000] + LARGE}


@case
def the_filesystem_writes(c: Client) -> None:
    id_ = repo(c, "fs")
    fs = c.fs()
    with fs.open(f"{id_}/a.txt", "w") as file:
        file.write("hello")
    with fs.open(f"{id_}/w.bin", "wb") as file:
        file.write(LARGE)
    fs.cp_file(f"{id_}/w.bin", f"{id_}/copy.bin")
    fs.put_file(str(write(c.directory, {"l": b"local"}) / "l"), f"{id_}/put")
    fs.rm(f"{id_}/a.txt")
    assert content(c, id_) == {"w.bin": LARGE, "copy.bin": LARGE, "put": b"local"}


@case
def the_command_uploads(c: Client) -> None:
    id_ = named(c, "cli")
    folder = write(c.directory / "f", FILES)
    assert id_ in c.hf("upload", id_, str(folder), ".", "--commit-message", "By command")
    assert content(c, id_) == FILES
    if c.site.tenant is None:
        c.hf("upload", id_, str(folder / "config.json"), "other.json", "--quiet")
        c.hf("repo" if c.major < 2 else "repos", "tag", "create", id_, "v1")
        assert set(content(c, id_, "v1")) == {*FILES, "other.json"}


Client.entry = property(  # type: ignore[attr-defined]
    lambda c: "RemoteEntryNotFoundError" if hasattr(c.errors, "RemoteEntryNotFoundError") else "EntryNotFoundError"
)
os.environ["HF_HUB_DISABLE_UPDATE_CHECK"] = "1"
