"""``HF_HUB_CACHE=<mount>/.hub HF_HUB_OFFLINE=1``: the real client libraries find their files in a mount."""

import contextlib
import hashlib
import os
import subprocess
import sys

import pytest

from helios.home import Home
from helios.launch.tiny_model import tiny_llama
from tests.support.hub_clients import VERSIONS, run_client
from tests.support.mounts import MODES, mounted, push, run, write

pytestmark = [pytest.mark.fuse, pytest.mark.slow]

NOWHERE = "http://127.0.0.1:1"

CASES = [(mode, version) for mode in MODES for version in (VERSIONS if mode == MODES[0] else VERSIONS[-1:])]
"""Every client where the kernel reads for itself, if it can; the newest one also where it does not."""

in_each_mode = pytest.mark.parametrize("hub", MODES, indirect=True)
with_the_clients = pytest.mark.parametrize(("hub", "client"), CASES, indirect=True)


@pytest.fixture(scope="module")
def hubs(tmp_path_factory):
    """A mount in each mode of a model with two commits, nested files, a tag and a pull request's ref, a short name and
    a dataset."""
    base = tmp_path_factory.mktemp("hub-cache")
    home = Home(base / "home")
    model = tiny_llama(base)
    write(model, {"nested/dir/extra.txt": b"deep", "empty.txt": b""})
    old = push(home, write(base / "old", {"config.json": b'{"old": true}', "gone.txt": b"gone"}), "org/tiny")
    new = push(home, model, "org/tiny")
    push(home, model, "org/tiny@v1.0")
    push(home, model, "org/tiny@refs/pr/1")
    push(home, model, "short")
    run(home, "push", "--kind", "datasets", write(base / "data", {"train.csv": b"a,b\n1,2\n"}), "org/data")
    hubs = {}
    with contextlib.ExitStack() as stack:
        for mode in MODES:
            args = ("--cache", str(base / f"cache-{mode}"))
            mount = stack.enter_context(mounted(home, base / mode, *args, HELIOS_MOUNT__MODE=mode))
            mount.old, mount.new, mount.model = old, new, model
            mount.env = {"HF_HUB_CACHE": str(mount.path / ".hub"), "HF_HUB_OFFLINE": "1"}
            hubs[mode] = mount
        yield hubs


@pytest.fixture
def hub(request, hubs):
    return hubs[request.param]


def expected(directory):
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def client(request, hub, tmp_path):
    def run(script):
        return run_client(request.param, script, NOWHERE, tmp_path / "hf", env=hub.env)

    return run


@with_the_clients
def test_snapshot_download_finds_a_ref_and_a_commit(hub, client):
    found = client(
        f"""
        revisions = ["main", "v1.0", "refs/pr/1", "{hub.new}", None]
        result = [tree(snapshot_download("org/tiny", revision=revision)) for revision in revisions]
        """
    )
    assert found == [expected(hub.model)] * 5


@with_the_clients
def test_snapshot_download_finds_a_commit_that_no_ref_names(hub, client):
    path, found = client(f"path = snapshot_download('org/tiny', revision='{hub.old}'); result = [path, tree(path)]")
    assert path == f"{hub.path}/.hub/models--org--tiny/snapshots/{hub.old}"
    assert sorted(found) == ["config.json", "gone.txt"]


@with_the_clients
def test_hf_hub_download_finds_files_by_ref_and_by_commit(hub, client):
    found = client(
        f"""
        files = ["config.json", "nested/dir/extra.txt", "empty.txt"]
        result = [Path(hf_hub_download("org/tiny", f, revision=r)).read_bytes().hex()
                  for f in files for r in ("main", "refs/pr/1", "{hub.new}")]
        """
    )
    contents = [(hub.model / name).read_bytes().hex() for name in ("config.json", "nested/dir/extra.txt", "empty.txt")]
    assert found == [content for content in contents for _ in range(3)]


@with_the_clients
def test_try_to_load_from_cache(hub, client):
    found = client(
        f"""
        from huggingface_hub import try_to_load_from_cache
        result = [try_to_load_from_cache("org/tiny", name, revision=revision)
                  for name in ("config.json", "gone.txt") for revision in (None, "v1.0", "{hub.old}", "nope")]
        """
    )
    snapshots = f"{hub.path}/.hub/models--org--tiny/snapshots"
    new, old = f"{snapshots}/{hub.new}", f"{snapshots}/{hub.old}"
    assert found == [
        *(f"{new}/config.json", f"{new}/config.json", f"{old}/config.json", None),
        *(None, None, f"{old}/gone.txt", None),
    ]


@with_the_clients
def test_what_is_not_there_is_said_in_the_clients_own_words(hub, client):
    found = client(
        f"""
        result = [
            raised(snapshot_download, "org/nope"),
            raised(snapshot_download, "org/tiny", revision="nope"),
            raised(snapshot_download, "org/tiny", revision="{"0" * 40}"),
            raised(hf_hub_download, "org/tiny", "nope.bin"),
        ]
        """
    )
    assert all({"LocalEntryNotFoundError", "OfflineModeIsEnabled"} & set(kinds) for kinds in found)


@with_the_clients
def test_short_names_and_datasets(hub, client):
    short, data = client(
        "result = [tree(snapshot_download('short')), tree(snapshot_download('org/data', repo_type='dataset'))]"
    )
    assert short == expected(hub.model)
    assert list(data) == ["train.csv"]


@with_the_clients
def test_part_of_a_snapshot(hub, client):
    found = client("result = sorted(tree(snapshot_download('org/tiny', allow_patterns=['*.json'])))")
    assert "config.json" in found


@with_the_clients
def test_the_whole_cache_can_be_scanned(hub, client):
    warnings, repos = client(
        """
        from huggingface_hub import scan_cache_dir
        info = scan_cache_dir()
        refs = {f"{r.repo_type}/{r.repo_id}": sorted(ref for v in r.revisions for ref in v.refs) for r in info.repos}
        result = [[str(w) for w in info.warnings], refs]
        """
    )
    assert warnings == []
    assert repos == {
        "model/org/tiny": ["main", "refs/pr/1", "v1.0"],
        "model/short": ["main"],
        "dataset/org/data": ["main"],
    }


TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
def answer(place):
    where, _, revision = place.partition("#")
    pinned = {"revision": revision} if revision else {}
    tokenizer = AutoTokenizer.from_pretrained(where, **pinned)
    model = AutoModelForCausalLM.from_pretrained(where, **pinned)
    ids = tokenizer("Hello there", return_tensors="pt").input_ids
    with torch.no_grad():
        return ids, model(ids).logits
original, *others = map(answer, sys.argv[1:])
for ids, logits in others:
    assert torch.equal(ids, original[0]) and torch.equal(logits, original[1])
print("same", len(others))
"""


@in_each_mode
def test_transformers_loads_by_path_and_by_name(hub, tmp_path):
    pytest.importorskip("transformers")
    paths = [hub.model, hub.path / "org/tiny/@main", hub.path / "org/tiny" / hub.new]
    places = [*paths, "org/tiny", "short", f"org/tiny#{hub.new}"]
    done = subprocess.run(
        [sys.executable, "-c", TRANSFORMERS, *map(str, places)],
        env={**os.environ, **hub.env, "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.stdout.strip().endswith("same 5"), done.stderr


@in_each_mode
def test_clients_leave_no_trace_in_the_log(hub):
    lines = [line for line in hub.log().splitlines() if '"level": "info"' not in line]
    assert lines == []
