"""What a user of huggingface_hub reads from a registry: the cases of the matrix (see hub_driver)."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import urllib.request
from pathlib import Path

from hub_driver import Client, case, majors


def sums(directory: str | Path) -> dict[str, str]:
    """Path -> sha256 of the files below, through links."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(directory).rglob("*"))
        if path.is_file() and ".cache" not in path.parts
    }


def calls(c: Client, status: str = "") -> float:
    """How many calls of the Hub API the registry has answered, with a status or in all, once it has counted them."""
    found = -1.0
    while (now := _calls(c, status)) != found:  # an answer is counted when its last byte has left
        found = now
        time.sleep(0.05)
    return found


def _calls(c: Client, status: str) -> float:
    lines = urllib.request.urlopen(c.endpoint.split("/t/")[0] + "/metrics").read().decode().splitlines()
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith("helios_registry_requests_total{") and '"/hub/' in line and f'status="{status}' in line
    )


# --- downloads ---


@case
def a_snapshot_is_complete_and_asked_for_once(c: Client) -> None:
    first = c.hub.snapshot_download("org/m", cache_dir=c.cache)
    assert Path(first).name == c.site.main
    assert sums(first) == c.site.sums
    before = calls(c)
    c.hub.snapshot_download("org/m", cache_dir=c.cache)
    assert calls(c) - before == 1, "a warm cache asks where the ref points, no more"
    before = calls(c)
    c.hub.snapshot_download("org/m", revision=c.site.main, cache_dir=c.cache)
    assert calls(c) - before == (1 if c.major == 0 else 0), "a pinned commit asks nothing (0.36 always asks)"


@case
def a_snapshot_of_a_branch_a_commit_a_dataset_and_a_request(c: Client) -> None:
    assert set(sums(c.hub.snapshot_download("org/m", revision="v1", cache_dir=c.cache))) == {*c.site.sums, "old.txt"}
    found = c.hub.snapshot_download("org/m", revision=c.site.v1, allow_patterns=["*.txt"], cache_dir=c.cache)
    assert "old.txt" in sums(found)
    found = c.hub.snapshot_download("org/d", repo_type="dataset", ignore_patterns="*.bin", cache_dir=c.cache)
    assert "old.txt" in sums(found)
    assert not [path for path in sums(found) if path.endswith(".bin")]
    found = c.hub.snapshot_download("org/m", revision="refs/pr/1", cache_dir=c.cache)
    assert Path(found).name == c.site.v1


@case
def a_snapshot_into_a_directory(c: Client) -> None:
    here = c.directory / "here"
    c.hub.snapshot_download("org/m", local_dir=here)
    assert sums(here) == c.site.sums


@case
def only_some_patterns(c: Client) -> None:
    found = c.hub.snapshot_download(
        "org/m", allow_patterns=["data/**", "*.json"], ignore_patterns=["*/deep/*"], cache_dir=c.cache
    )
    assert sorted(sums(found)) == ["config.json", "data/part 1 (ü).txt"]


@case
def one_file(c: Client) -> None:
    for kwargs in (
        {"repo_id": "solo", "filename": "config.json"},
        {"repo_id": "org/d", "filename": "config.json", "repo_type": "dataset"},
        {"repo_id": "org/m", "filename": "config.json", "revision": c.site.v1},
        {"repo_id": "org/m", "filename": "config.json", "revision": "refs/pr/1"},
    ):
        path = Path(c.hub.hf_hub_download(cache_dir=c.cache, **kwargs))
        assert hashlib.sha256(path.read_bytes()).hexdigest() == c.site.sums["config.json"], kwargs
    path = c.hub.hf_hub_download("org/m", "er/x.bin", subfolder="data/deep", cache_dir=c.cache)
    assert hashlib.sha256(Path(path).read_bytes()).hexdigest() == c.site.sums["data/deep/er/x.bin"]


@case
def names_that_are_not_ascii(c: Client) -> None:
    path = c.hub.hf_hub_download("org/m", "data/part 1 (ü).txt", cache_dir=c.cache)
    assert hashlib.sha256(Path(path).read_bytes()).hexdigest() == c.site.sums["data/part 1 (ü).txt"]


@case
def an_empty_file(c: Client) -> None:
    assert Path(c.hub.hf_hub_download("org/m", "empty", cache_dir=c.cache)).read_bytes() == b""
    assert c.fs().cat_file("org/m/empty") == b""


@case
def the_cache_has_the_ids_of_the_hub(c: Client) -> None:
    """So that it stays valid when the endpoint changes."""
    for path in ("config.json", "weights.safetensors"):
        found = Path(c.hub.hf_hub_download("org/m", path, cache_dir=c.cache))
        assert found.resolve().name == c.site.etags[path]
        meta = c.hub.get_hf_file_metadata(c.hub.hf_hub_url("org/m", path))
        assert (meta.etag, meta.commit_hash, meta.size) == (c.site.etags[path], c.site.main, c.site.sizes[path])
    assert (Path(c.cache) / "models--org--m" / "refs" / "main").read_text() == c.site.main


@case
def a_download_goes_on_where_it_was(c: Client) -> None:
    from huggingface_hub.file_download import http_get

    url, size = c.hub.hf_hub_url("org/m", "weights.safetensors"), c.site.sizes["weights.safetensors"]
    request = urllib.request.Request(url, headers={"range": "bytes=0-1234566"})
    first = urllib.request.urlopen(request).read()
    target = c.directory / "part"
    target.write_bytes(first)
    before = calls(c, "206")
    with target.open("ab") as file:
        http_get(url, file, resume_size=len(first), expected_size=size)
    assert calls(c, "206") - before == 1
    assert hashlib.sha256(target.read_bytes()).hexdigest() == c.site.sums["weights.safetensors"]


@case
def offline_after_the_download(c: Client) -> None:
    found = c.hub.snapshot_download("org/m", cache_dir=c.cache)
    assert c.hub.snapshot_download("org/m", cache_dir=c.cache, local_files_only=True) == found
    assert c.hub.snapshot_download("org/m", cache_dir=c.cache, endpoint="http://127.0.0.1:9") == found
    path = c.hub.hf_hub_download("org/m", "config.json", cache_dir=c.cache, local_files_only=True)
    assert Path(path).parent == Path(found)


@case
def a_file_that_is_not_there_is_asked_for_once(c: Client) -> None:
    c.raises(c.entry, c.hub.hf_hub_download, "org/m", "nope.txt", cache_dir=c.cache)
    assert (Path(c.cache) / "models--org--m" / ".no_exist" / c.site.main / "nope.txt").exists()
    found = c.hub.try_to_load_from_cache("org/m", "nope.txt", cache_dir=c.cache)
    assert found is c.hub.file_download._CACHED_NO_EXIST


# --- information ---


@case
def the_tree(c: Client) -> None:
    items = list(c.api.list_repo_tree("org/m", recursive=True))
    files = {f.path: [f.size, f.blob_id, f.lfs.sha256 if f.lfs else None] for f in items if hasattr(f, "size")}
    assert files == c.site.tree
    assert {f.path: len(f.tree_id) for f in items if not hasattr(f, "size")} == {
        "data": 40, "data/deep": 40, "data/deep/er": 40,
    }  # fmt: skip
    assert [f.path for f in c.api.list_repo_tree("org/m", "data", revision="refs/pr/1")] == [
        "data/deep", "data/part 1 (ü).txt",
    ]  # fmt: skip
    assert set(c.api.list_repo_files("org/d", repo_type="dataset")) == {*c.site.sums, "old.txt"}


@case
def the_tree_expanded(c: Client) -> None:
    items = {f.path: f for f in c.api.list_repo_tree("org/m", recursive=True, expand=True)}
    weights = items["weights.safetensors"]
    assert (weights.last_commit.oid, weights.last_commit.title) == (c.site.main, "The second")
    assert weights.security is not None
    assert weights.security.safe is False or weights.security.status == "unscanned"
    assert items["config.json"].last_commit.oid == c.site.v1


@case
def a_tree_of_many_pages(c: Client) -> None:
    """Links to the next page stay under the endpoint's prefix."""
    items = [item.path for item in c.api.list_repo_tree("org/many", recursive=True)]
    assert len(items) == len(set(items)) == 1203
    assert sorted(items) == items


@case
def some_paths(c: Client) -> None:
    found = c.api.get_paths_info("org/m", ["config.json", "data", "nope", "data/part 1 (ü).txt"], expand=True)
    assert [p.path for p in found] == ["config.json", "data", "data/part 1 (ü).txt"]
    found = c.api.get_paths_info("org/d", ["old.txt"], repo_type="dataset", revision="main")
    assert [p.size for p in found] == [10]


@case
def information_of_a_model(c: Client) -> None:
    info = c.api.model_info("org/m", revision="v1", files_metadata=True)
    assert (info.id, info.sha, len(info.siblings)) == ("org/m", c.site.v1, len(c.site.sums) + 1)
    assert {s.rfilename: s.size for s in info.siblings if s.rfilename in c.site.sizes} == c.site.sizes
    assert (info.private, info.gated, info.disabled) == (False, False, False)
    assert info.last_modified.tzinfo is not None
    info = c.api.model_info("org/card", securityStatus=True)
    assert (info.pipeline_tag, info.library_name) == ("text-generation", "transformers")
    assert info.card_data.license == "apache-2.0"
    assert "license:apache-2.0" in info.tags
    info = c.api.model_info("org/m", expand=["sha", "siblings", "downloadsAllTime"])
    assert (info.sha, info.tags) == (c.site.main, None)
    assert c.api.model_info("solo").id == "solo"


@case
def information_of_a_dataset(c: Client) -> None:
    info = c.api.dataset_info("org/d", files_metadata=True)
    assert (info.id, len(info.siblings)) == ("org/d", len(c.site.sums) + 1)
    assert c.api.repo_info("org/d", repo_type="dataset").sha == info.sha


@case
def what_exists(c: Client) -> None:
    assert c.api.file_exists("org/m", "config.json")
    assert not c.api.file_exists("org/m", "nope")
    assert not c.api.file_exists("org/none", "config.json")
    assert c.api.repo_exists("org/m")
    assert c.api.repo_exists("org/d", repo_type="dataset")
    assert not c.api.repo_exists("org/m", repo_type="dataset")
    assert not c.api.repo_exists("org/m", repo_type="space")
    assert c.api.revision_exists("org/m", "v1")
    assert c.api.revision_exists("org/m", "refs/pr/1")
    assert not c.api.revision_exists("org/m", "v9")
    assert not c.api.revision_exists("org/none", "main")


@case
def access_is_checked(c: Client) -> None:
    c.api.auth_check("org/m")
    c.api.auth_check("org/d", repo_type="dataset")
    c.raises("RepositoryNotFoundError", c.api.auth_check, "org/none")


@case
def refs(c: Client) -> None:
    refs = c.api.list_repo_refs("org/m", include_pull_requests=True)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": c.site.main, "v1": c.site.v1}
    assert {ref.ref: ref.target_commit for ref in refs.pull_requests} == {"refs/pr/1": c.site.v1}
    assert refs.tags == refs.converts == []


@case
def history(c: Client) -> None:
    found = c.api.list_repo_commits("org/m")
    assert [(x.commit_id, x.title, x.message) for x in found] == [
        (c.site.main, "The second", ""), (c.site.v1, "The first", "with more to say"),
    ]  # fmt: skip
    assert all(x.created_at.tzinfo for x in found)
    formatted = c.api.list_repo_commits("org/m", formatted=True, revision="v1")
    assert [(x.formatted_title, x.formatted_message) for x in formatted] == [("The first", "with more to say")]


@case
def lists(c: Client) -> None:
    for repo in ("org/card", "org/m", "org/many", "org/tiny") if c.site.mirror else ():
        c.api.model_info(repo)  # a mirror lists what somebody has asked for
    if c.site.mirror:
        c.api.dataset_info("org/d")
    assert [m.id for m in c.api.list_models(author="org")] == ["org/card", "org/m", "org/many", "org/tiny"]
    assert [m.id for m in c.api.list_models(search="TIN")] == ["org/tiny"]
    assert [m.id for m in c.api.list_models(filter=["license:apache-2.0", "de"])] == ["org/card"]
    assert [m.id for m in c.api.list_models(filter="text-generation", full=True)] == ["org/card"]
    assert len(list(c.api.list_models(sort="last_modified", limit=2))) == 2
    assert list(c.api.list_models(author="nobody")) == []
    assert [d.id for d in c.api.list_datasets()] == ["org/d"]
    found = next(iter(c.api.list_models(search="card", expand=["cardData", "siblings"])))
    assert found.card_data.pipeline_tag == "text-generation"
    assert {s.rfilename for s in found.siblings} == {"README.md", "config.json"}


@case
def the_headers_of_safetensors(c: Client) -> None:
    found = c.api.get_safetensors_metadata("org/tiny")
    assert len(found.files_metadata) == c.site.shards
    assert sum(len(f.tensors) for f in found.files_metadata.values()) == len(found.weight_map) > c.site.shards
    assert set(c.api.parse_safetensors_file_metadata("org/m", "weights.safetensors").tensors) == {"w"}
    if hasattr(c.api, "get_sharded_safetensors_metadata"):
        assert c.api.get_sharded_safetensors_metadata("org/tiny").weight_map == found.weight_map
    c.raises("NotASafetensorsRepoError", c.api.get_safetensors_metadata, "org/card")


@case
def a_model_card(c: Client) -> None:
    card = c.hub.ModelCard.load("org/card")
    assert card.data.license == "apache-2.0"


# --- the filesystem ---


@case
def the_filesystem_lists(c: Client) -> None:
    fs = c.fs()
    assert sorted(fs.ls("org/m", detail=False)) == sorted({f"org/m/{path.split('/')[0]}" for path in c.site.sums})
    assert fs.glob("org/m@v1/data/**/*.bin") == ["org/m@v1/data/deep/er/x.bin"]
    assert fs.glob("datasets/org/d/*.txt") == ["datasets/org/d/old.txt"]
    assert sorted(fs.find("org/m")) == sorted(f"org/m/{path}" for path in c.site.sums)
    walked = {path: sorted(files) for path, _, files in fs.walk("org/m")}
    assert walked["org/m/data/deep/er"] == ["x.bin"]
    info = fs.info("org/m/weights.safetensors")
    assert (info["size"], info["type"], info["lfs"]["sha256"]) == (
        c.site.sizes["weights.safetensors"], "file", c.site.sums["weights.safetensors"],
    )  # fmt: skip
    assert fs.info("org/m/data")["type"] == "directory"
    assert fs.isdir("org/m")
    assert fs.isfile("org/m/config.json")
    assert [fs.exists("org/m/config.json"), fs.exists("org/m/nope"), fs.exists("org/none/x")] == [True, False, False]
    assert fs.du("org/m") == sum(c.site.sizes.values())
    (below,) = fs.ls("org/m@refs%2Fpr%2F1/data/deep", detail=False)
    assert below.endswith("/data/deep/er")
    c.raises(FileNotFoundError, fs.ls, "org/m/nope")
    c.raises(FileNotFoundError, fs.info, "org/none/x")


@case
def the_filesystem_reads(c: Client) -> None:
    fs = c.fs()
    whole = Path(c.hub.hf_hub_download("org/m", "weights.safetensors", cache_dir=c.cache)).read_bytes()
    with fs.open("org/m/weights.safetensors", "rb", block_size=1 << 20) as file:
        file.seek(4_194_000)
        assert file.read(1000) == whole[4_194_000:4_195_000]
        file.seek(-10, 2)
        assert file.read() == whole[-10:]
        assert file.read(5) == b""
    with fs.open("org/m/weights.safetensors", "rb", block_size=0) as file:
        assert file.read(100) == whole[:100]
        assert len(file.read()) == len(whole) - 100
    assert fs.cat_file("org/m/weights.safetensors", 5, 105) == whole[5:105]
    ranges = fs.cat_ranges(
        ["org/m/weights.safetensors"] * 3, [0, 1_000_000, len(whole) - 7], [9, 1_000_100, len(whole)]
    )
    assert ranges == [whole[:9], whole[1_000_000:1_000_100], whole[-7:]]
    assert json.loads(fs.read_text("org/card/config.json")) == {}
    assert fs.read_text("hf://datasets/org/d@main/old.txt") == "only in v1"
    fs.get_file("org/m/data/part 1 (ü).txt", str(c.directory / "got"))
    assert hashlib.sha256((c.directory / "got").read_bytes()).hexdigest() == c.site.sums["data/part 1 (ü).txt"]
    fs.get("org/m/data", str(c.directory / "all"), recursive=True)
    assert (c.directory / "all" / "deep" / "er" / "x.bin").stat().st_size == c.site.sizes["data/deep/er/x.bin"]


@case
def parquet_is_read_by_its_footer(c: Client) -> None:
    """As pyarrow and DuckDB do through the filesystem: the end first, then ranges."""
    with c.fs().open("datasets/org/d/data/deep/er/x.bin", "rb") as file:
        size = file.seek(0, 2)
        assert size == c.site.sizes["data/deep/er/x.bin"]
        file.seek(size - 8)
        assert file.read(8) == bytes(range(248, 256))
        file.seek(256)
        assert file.read(3) == bytes([0, 1, 2])


# --- errors ---


@case
def a_repository_that_is_not_there(c: Client) -> None:
    for call, args in (
        (c.hub.hf_hub_download, ("org/none", "x")), (c.hub.snapshot_download, ("org/none",)),
        (c.api.model_info, ("org/none",)), (c.api.dataset_info, ("org/m",)), (c.api.list_repo_refs, ("org/none",)),
        (c.api.list_repo_commits, ("org/none",)), (c.api.get_paths_info, ("org/none", ["x"])),
        (lambda repo: list(c.api.list_repo_tree(repo)), ("org/none",)),
    ):  # fmt: skip
        error = c.raises("RepositoryNotFoundError", call, *args)
        assert ("there is no org/" if c.site.mirror else "has no repository") in str(error), error


@case
def a_revision_that_is_not_there(c: Client) -> None:
    for call, args in (
        (c.hub.hf_hub_download, ("org/m", "config.json")), (c.hub.snapshot_download, ("org/m",)),
        (c.api.model_info, ("org/m",)), (c.api.list_repo_commits, ("org/m",)),
        (c.api.get_paths_info, ("org/m", ["config.json"])),
        (lambda repo, **k: list(c.api.list_repo_tree(repo, **k)), ("org/m",)),
    ):  # fmt: skip
        for revision in ("v9", "0" * 40):
            error = c.raises("RevisionNotFoundError", call, *args, revision=revision)
            assert ("there is no org/m@" if c.site.mirror else "has no revision") in str(error), error
    c.hub.hf_hub_download("org/m", "config.json", cache_dir=c.cache)
    c.raises("RevisionNotFoundError", c.hub.hf_hub_download, "org/m", "config.json", revision="v9", cache_dir=c.cache)


@case
def an_entry_that_is_not_there(c: Client) -> None:
    error = c.raises(c.entry, c.hub.hf_hub_download, "org/m", "nope")
    assert "has no 'nope'" in str(error)
    c.raises(c.entry, lambda: list(c.api.list_repo_tree("org/m", "nope")))
    c.raises("LocalEntryNotFoundError", c.hub.hf_hub_download, "org/m", "nope", local_files_only=True)


@case
def what_is_retired_is_refused_with_the_reason(c: Client) -> None:
    """Through a mirror, too: it is no fault of the network."""
    for call, args in ((c.api.model_info, ("old/gone",)), (c.api.list_repo_refs, ("old/gone",))):
        error = c.raises("HfHubHTTPError", call, *args)
        assert error.response.status_code == 410
        assert "it leaks; use org/m" in str(error)
    assert not [m.id for m in c.api.list_models(search="old/gone")]


@case
@majors(1, 2)
def what_is_deprecated_is_warned_of(c: Client) -> None:
    """Where it was said; 0.36 has no warnings of a server."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("huggingface_hub.utils._http")
    logger.addHandler(handler)
    try:
        found = c.hub.hf_hub_download("old/m", "config.json", cache_dir=c.cache)
    finally:
        logger.removeHandler(handler)
    assert Path(found).read_text() == "{}"
    assert [text for text in said if "old/m is deprecated: slow; use org/m" in text] or c.site.mirror


@case
def an_error_names_its_request(c: Client) -> None:
    error = c.raises("RepositoryNotFoundError", c.api.model_info, "org/none")
    name = error.response.headers["x-request-id"]
    assert name
    assert name in str(error)


@case
def nobody_is_logged_in_and_a_token_does_no_harm(c: Client) -> None:
    api = c.hub.HfApi(token="hf_x")
    assert api.model_info("org/m").sha == c.site.main
    if c.site.tenant is None:
        error = c.raises("HfHubHTTPError" if c.major else _http_error(), api.whoami)
        assert error.response.status_code == 401
    else:
        assert api.whoami()["name"] == c.site.tenant


@case
def an_administrator_logs_in(c: Client) -> None:
    api = c.hub.HfApi(token=c.site.token)
    assert api.model_info("org/m").sha == c.site.main
    who = api.whoami()
    assert who["name"] == (c.site.tenant or "the admin")
    assert who["auth"]["accessToken"]["role"] == "write"
    home = {"HF_HOME": str(c.directory / "home")}
    c.hf("auth", "login", "--token", c.site.token, env=home)
    assert (c.directory / "home" / "token").read_text() == c.site.token
    assert who["name"] in c.hf("auth", "whoami", env=home)
    c.hf("auth", "login", "--token", "hf_x", code=0 if c.site.tenant else 1, env=home)


def _http_error() -> type[BaseException]:
    import requests

    return requests.HTTPError


# --- the command ---


@case
def the_command_downloads(c: Client) -> None:
    out = c.hf("download", "org/m", "--revision", "v1", "--local-dir", "here")
    assert "here" in out
    assert (c.directory / "here" / "old.txt").read_text() == "only in v1"
    if c.site.tenant is None:
        assert "none" in c.hf("download", "org/none", code=1)
    else:
        assert c.site.tenant in c.hf("auth", "whoami", env={"HF_TOKEN": "hf_x"})


@case
@majors(1, 2)
def the_command_lists(c: Client) -> None:
    listed = json.loads(c.hf("models", "ls", "--author", "org", "--expand", "sha,siblings", "--format", "json"))
    assert {m["id"]: m["sha"] for m in listed}["org/m"] == c.site.main
    files = json.loads(c.hf("models", "ls", "org/m", "-R", "--format", "json"))
    assert {f["path"]: f["size"] for f in files if f["path"] in c.site.sizes} == c.site.sizes
    assert json.loads(c.hf("models", "info", "org/card", "--format", "json"))["pipeline_tag"] == "text-generation"
    assert [d["id"] for d in json.loads(c.hf("datasets", "ls", "--format", "json"))] == ["org/d"]


def _entry(c: Client) -> str:
    return "RemoteEntryNotFoundError" if hasattr(c.errors, "RemoteEntryNotFoundError") else "EntryNotFoundError"


Client.entry = property(_entry)  # type: ignore[attr-defined]
os.environ["HF_HUB_DISABLE_UPDATE_CHECK"] = "1"
