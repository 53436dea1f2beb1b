"""huggingface_hub of three majors, its command line and transformers read from a real registry."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import textwrap

import pytest

from tests.support.hub_clients import ROOT, VERSIONS, run_client
from tests.support.hub_site import expected_tree, hub_site


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with hub_site(tmp_path_factory.mktemp("hub-api")) as found:
        yield found


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
