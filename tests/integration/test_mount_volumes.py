"""Volumes of a real mount: made over the control API, bound elsewhere, there again after a SIGKILL."""

import contextlib
import errno
import hashlib
import json
import os
import random
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from helios.errors import Conflict, InvalidInput, NotFound, RepoNotFound, RevisionNotFound
from helios.home import Home
from helios.http.client import HttpClient
from helios.names import RepoId
from tests.support.command import Command
from tests.support.hub_clients import VERSIONS, run_client
from tests.support.mounts import MODES, Mount, fails, kill, mounted, push, run, write
from tests.support.registry import running_registry

pytestmark = pytest.mark.fuse

RANDOM = random.Random(5)
OLD = {
    "config.json": b'{"a": 1}',
    "model.safetensors": (2).to_bytes(8, "little") + b"{}",
    "weights.bin": RANDOM.randbytes(5_000_000),
    "sub/deep.txt": b"deep",
    "empty": b"",
}
NEW = OLD | {"config.json": b'{"a": 2}', "added": b"only in the new commit"}


def call(mount, method, volume="", body=None):
    """The control API's answer, or its error."""
    client = HttpClient(f"unix:{mount.state['socket']}", timeout_s=30)
    try:
        return client.json(method, f"/api/v1/volumes{'/' if volume else ''}{volume}", body=body)
    finally:
        client.close()


def contents(directory):
    """Path -> bytes of every file below, through links."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in Path(directory).rglob("*") if p.is_file()}


def inodes(directory):
    return {str(p.relative_to(directory)): p.lstat().st_ino for p in [directory, *Path(directory).rglob("*")]}


@dataclass
class Model:
    """A published model; ``move`` publishes another commit as its main and returns it once the mount shows it."""

    mount: Mount
    name: str
    directory: Path
    commit: str = ""

    def move(self):
        new = push(self.mount.home, write(self.directory / "new", NEW), self.name)
        end = time.monotonic() + 10
        while os.readlink(self.mount.path / self.name / "@main") != new:
            assert time.monotonic() < end
            time.sleep(0.05)
        return new


IN_BOTH = pytest.mark.parametrize("mount", MODES, indirect=True)
"""For what the way to the kernel might change; the rest is shown in the mode that this machine allows."""


@pytest.fixture(scope="module")
def mount(tmp_path_factory, request):
    base = tmp_path_factory.mktemp("volumes")
    home = Home(base / "home")
    push(home, write(base / "first", {"x": b"x"}), "org/first")
    with mounted(home, base / "mnt", HELIOS_MOUNT__MODE=getattr(request, "param", "auto")) as mount:
        yield mount


@pytest.fixture
def model(mount, tmp_path, request):
    """A model for one test alone; its volumes are deleted in the end."""
    name = "org/" + re.sub("[^a-z0-9]+", "_", request.node.name).strip("_")
    yield Model(mount, name, tmp_path, push(mount.home, write(tmp_path / "old", OLD), name))
    for volume in call(mount, "GET")["volumes"]:
        call(mount, "DELETE", volume["id"])


@IN_BOTH
def test_a_volume_shows_its_commit_as_files_and_as_a_cache(mount, model):
    made = call(mount, "PUT", "pvc-1", {"model": model.name})
    commit = model.commit
    assert (made["id"], made["repo"], made["commit"]) == ("pvc-1", f"models/{model.name}", commit)
    assert (made["revision"], made["refs"]) == ("main", {"main": commit})
    assert call(mount, "GET", "pvc-1") == made
    assert call(mount, "GET") == {"volumes": [made]}
    volume = mount.path / ".volumes/pvc-1"
    cache = volume / "hub" / f"models/{model.name}".replace("/", "--")
    assert os.listdir(mount.path / ".volumes") == ["pvc-1"]
    assert sorted(os.listdir(volume)) == ["hub", "model"]
    assert contents(volume / "model") == OLD
    assert contents(cache / "snapshots" / commit) == OLD
    assert (cache / "refs/main").read_text() == commit
    same = mount.path / model.name / commit / "weights.bin"
    assert (volume / "model/weights.bin").stat().st_ino == same.stat().st_ino
    assert (volume / "model").stat().st_ino != same.parent.stat().st_ino
    assert os.getxattr(volume, "user.helios.commit").decode() == commit


def test_a_volume_stays_at_its_commit_when_the_ref_moves(mount, model):
    made = call(mount, "PUT", "v", {"repo": f"models/{model.name}", "revision": "main"})
    new = model.move()
    assert call(mount, "PUT", "v", {"model": model.name, "revision": "main"}) == made
    volume = mount.path / ".volumes/v"
    assert contents(volume / "model") == OLD
    cache = volume / "hub" / f"models/{model.name}".replace("/", "--")
    assert os.listdir(cache / "snapshots") == [model.commit]
    assert (cache / "refs/main").read_text() == model.commit
    assert call(mount, "PUT", "w", {"model": model.name})["commit"] == new
    assert contents(mount.path / ".volumes/w/model") == NEW


@IN_BOTH
def test_a_volume_is_there_as_soon_as_it_is_made_and_gone_when_it_is_deleted(mount, model):
    """Also under an id that was looked up before, and under one that was another volume a moment ago."""
    path = mount.path / ".volumes/v"
    assert not path.exists()
    call(mount, "PUT", "v", {"model": model.name})
    assert contents(path / "model") == OLD
    model.move()
    for _ in range(3):
        assert call(mount, "DELETE", "v") == {"deleted": True}
        assert not path.exists()
        assert os.listdir(mount.path / ".volumes") == []
        call(mount, "PUT", "v", {"model": model.name})
        assert contents(path / "model") == NEW
    assert call(mount, "DELETE", "v") == {"deleted": True}
    assert call(mount, "DELETE", "v") == {"deleted": False}


def test_what_cannot_be_made_is_refused_with_the_reason(mount, model):
    name = model.name
    call(mount, "PUT", "v", {"model": name})
    for kind, volume, body in (
        (RepoNotFound, "x", {"model": "org/nope"}),
        (RevisionNotFound, "x", {"model": name, "revision": "nope"}),
        (RevisionNotFound, "x", {"model": name, "revision": "0" * 40}),
        (Conflict, "v", {"model": name, "revision": model.commit}),
        (InvalidInput, "x", {"model": "../etc"}),
        (InvalidInput, "x", {"model": name, "repo": f"models/{name}"}),
        (InvalidInput, "x", {}),
        (InvalidInput, "x", {"model": name, "unknown": 1}),
        (InvalidInput, ".x", {"model": name}),
        (InvalidInput, "a%2Fb", {"model": name}),
        (InvalidInput, "y" * 129, {"model": name}),
    ):
        with pytest.raises(kind):
            call(mount, "PUT", volume, body)
    with pytest.raises(NotFound):
        call(mount, "GET", "x")
    assert [volume["id"] for volume in call(mount, "GET")["volumes"]] == ["v"]
    with fails(errno.ENOENT):
        os.stat(mount.path / ".volumes/x")


def test_many_callers_at_once_make_one_volume(mount, model):
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(call(mount, "PUT", "v", {"model": model.name})))
        for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 16
    assert all(result == results[0] for result in results)


@IN_BOTH
def test_an_open_directory_stays_readable_after_its_volume_is_deleted(mount, model):
    call(mount, "PUT", "v", {"model": model.name})
    directory = os.open(mount.path / ".volumes/v/model", os.O_RDONLY)
    try:
        call(mount, "DELETE", "v")
        assert contents(f"/proc/self/fd/{directory}/") == OLD
    finally:
        os.close(directory)


def test_status_shows_the_volumes(mount, model):
    call(mount, "PUT", "pvc-1", {"model": model.name})
    (found,) = json.loads(run(mount.home, "status", "--json").stdout)["mounts"]
    assert [(v["id"], v["commit"]) for v in found["volumes"]] == [("pvc-1", model.commit)]
    assert "pvc-1" in run(mount.home, "status").stdout


# --- bound elsewhere -------------------------------------------------------------------------------------------------

ALONE = """
set -e
mount --bind "$1" "$2"
mount -t tmpfs none "$3"  # nothing of the mount but what is bound can be reached
shift 3
exec "$@"
"""


def alone(directory, target, mnt):
    """A command that runs another one where ``directory`` is at ``target`` and the rest of the mount is not there."""
    target.mkdir(exist_ok=True)
    namespaces = ["--mount"] if os.geteuid() == 0 else ["--mount", "--user", "--map-root-user"]
    unshare = ["unshare", *namespaces, "--propagation", "private"]
    return [*unshare, "sh", "-c", ALONE, "sh", *map(str, (directory, target, mnt))]


@pytest.mark.parametrize("version", VERSIONS)
def test_huggingface_hub_loads_from_a_bound_hub_alone(mount, model, version, tmp_path):
    push(mount.home, tmp_path / "old", f"{model.name}@v1")
    model.move()
    call(mount, "PUT", "v", {"model": model.name, "revision": "v1"})
    bound = tmp_path / "bound"
    script = f"""
    name, commit = {model.name!r}, {model.commit!r}
    found = {{str(asked): snapshot_download(name, revision=asked) for asked in (None, "main", "v1", commit)}}
    result = {{
        "where": sorted(set(found.values())),
        "files": {{revision: tree(path) for revision, path in found.items()}},
        "one": Path(hf_hub_download(name, "sub/deep.txt")).read_text(),
        "unknown": raised(snapshot_download, name, revision="v2"),
        "outside": os.path.exists({str(mount.path / "org")!r}),
    }}
    """
    result = run_client(
        version,
        script,
        "http://127.0.0.1:9",
        tmp_path / "hf",
        env={"HF_HUB_CACHE": str(bound), "HF_HUB_OFFLINE": "1"},
        within=alone(mount.path / ".volumes/v/hub", bound, mount.path),
    )
    digests = {path: hashlib.sha256(data).hexdigest() for path, data in OLD.items()}
    cache = bound / f"models/{model.name}".replace("/", "--")
    assert result["where"] == [f"{cache}/snapshots/{model.commit}"]
    assert result["files"] == dict.fromkeys(["None", "main", "v1", model.commit], digests)
    assert result["one"] == "deep"
    assert "LocalEntryNotFoundError" in result["unknown"]
    assert result["outside"] is False


# --- restarts --------------------------------------------------------------------------------------------------------


@pytest.fixture
def commit(helios_home, tmp_path):
    return push(helios_home, write(tmp_path / "old", OLD), "org/name")


def test_a_volume_survives_sigkill_with_its_content_and_inodes(helios_home, commit, tmp_path):
    mnt = tmp_path / "mnt"
    with mounted(helios_home, mnt) as mount:
        made = call(mount, "PUT", "v", {"model": "org/name"})
        before = inodes(mnt / ".volumes/v")
        push(helios_home, write(tmp_path / "new", NEW), "org/name")
        kill(mount.state)
        again = Mount(helios_home, mnt, json.loads(run(helios_home, "mount", mnt, "--json").stdout))
        assert call(again, "GET") == {"volumes": [made]}
        assert contents(mnt / ".volumes/v/model") == OLD
        assert inodes(mnt / ".volumes/v") == before
        assert call(again, "PUT", "v", {"model": "org/name"}) == made


def test_volumes_made_while_the_daemon_is_killed_are_whole_or_not_there(helios_home, commit, tmp_path):
    mnt = tmp_path / "mnt"
    acknowledged = []

    def make(mount):
        with contextlib.suppress(Exception):  # it ends when the daemon does
            while True:
                volume = f"v{len(acknowledged)}"
                call(mount, "PUT", volume, {"model": "org/name"})
                acknowledged.append(volume)

    with mounted(helios_home, mnt) as mount:
        for _ in range(3):
            maker = threading.Thread(target=make, args=(mount,))
            maker.start()
            time.sleep(0.3)
            kill(mount.state)
            maker.join()
            mount = Mount(helios_home, mnt, json.loads(run(helios_home, "mount", mnt, "--json").stdout))
            there = {volume["id"] for volume in call(mount, "GET")["volumes"]}
            assert set(acknowledged) <= there
            assert len(there) <= len(acknowledged) + 1
        assert len(acknowledged) > 3
        assert (mnt / ".volumes" / acknowledged[-1] / "model/config.json").read_bytes() == OLD["config.json"]


def test_the_registry_keeps_a_volumes_commit_through_collections(helios_home, tmp_path, wait_for):
    """Nobody has read of it when its ref moves, and everything else goes at once."""
    at_once = {
        "HELIOS_REGISTRY__KEEP_HISTORY": "false",
        "HELIOS_REGISTRY__KEEP_COMMITS_S": "0",
        "HELIOS_REGISTRY__GC_GRACE_S": "0.5",
        "HELIOS_REGISTRY__GC_EVERY_S": "0",
        "HELIOS_REGISTRY__LEASE_S": "2",
    }
    helios = Command(tmp_path / "core", **at_once)
    with running_registry(helios) as registry, contextlib.closing(registry.client()) as client:
        env = {"HELIOS_REGISTRY__URLS": registry.url}

        def collect():
            time.sleep(0.6)
            *_, report = client.collect(dry_run=False, timeout_s=60)
            return report["commits"]

        run(helios_home, "push", write(tmp_path / "old", OLD), "org/name", **env)
        with mounted(helios_home, tmp_path / "mnt", **env) as mount:
            made = call(mount, "PUT", "v", {"model": "org/name"})
            wait_for(lambda: client.http.json("GET", "/api/v1/leases")["leases"], 20, what="the volume's lease")
            (lease,) = client.http.json("GET", "/api/v1/leases")["leases"]
            assert (lease["repo"], lease["commit"]) == ("models/org/name", made["commit"])
            assert lease["expires"] > time.time() + 24 * 3600
            run(helios_home, "push", write(tmp_path / "new", NEW), "org/name", **env)
            assert [collect() for _ in range(4)] == [2] * 4
            assert contents(tmp_path / "mnt/.volumes/v/model") == OLD
        client.lease(lease["holder"], RepoId.parse("org/name"), made["commit"], 0)
        wait_for(lambda: collect() == 1, 30, what="the commit to go with the lease")


def test_a_volume_is_readable_while_the_registry_is_down(helios, helios_home, tmp_path, wait_for):
    mnt = tmp_path / "mnt"
    with running_registry(helios) as registry:
        env = {"HELIOS_REGISTRY__URLS": registry.url}
        run(helios_home, "push", write(tmp_path / "old", OLD), "org/name", **env)
        with mounted(helios_home, mnt, **env) as mount:
            made = call(mount, "PUT", "v", {"model": "org/name"})
            assert contents(mnt / ".volumes/v/model") == OLD
            weights = mnt / ".volumes/v/model/weights.bin"
            wait_for(lambda: os.getxattr(weights, "user.helios.tier") == b"l1", what="the file to be local")
        registry.kill()
        (helios_home.cache / "catalog.db").unlink()
        with mounted(helios_home, mnt, **env) as mount:
            assert contents(mnt / ".volumes/v/model") == OLD
            assert contents(mnt / f".volumes/v/hub/models--org--name/snapshots/{made['commit']}") == OLD
            assert call(mount, "PUT", "v", {"model": "org/name"}) == made
            assert call(mount, "DELETE", "v") == {"deleted": True}


def test_the_control_api_is_not_served_over_tcp(helios_home, commit, tmp_path):
    with mounted(helios_home, tmp_path / "mnt", HELIOS_MOUNT__LISTEN="127.0.0.1:0") as mount:
        client = HttpClient(mount.state["url"], timeout_s=5)
        with contextlib.closing(client):
            assert client.bytes("GET", "/readyz") == b"ready\n"
            for method, path in (("GET", ""), ("GET", "/v"), ("PUT", "/v"), ("DELETE", "/v")):
                with pytest.raises(NotFound):
                    client.bytes(method, f"/api/v1/volumes{path}", body={"model": "org/name"})
        assert call(mount, "GET") == {"volumes": []}


def test_a_damaged_record_is_in_the_log_and_stops_no_other(helios_home, commit, tmp_path, expected_log_errors):
    expected_log_errors("a volume's record is damaged.*bad.volume")
    mnt = tmp_path / "mnt"
    with mounted(helios_home, mnt) as mount:
        for volume in ("bad", "good"):
            call(mount, "PUT", volume, {"model": "org/name"})
    path = helios_home.cache / "volumes/bad.volume"
    path.write_bytes(path.read_bytes()[:-10])
    with mounted(helios_home, mnt) as mount:
        assert os.listdir(mnt / ".volumes") == ["good"]
        with pytest.raises(Conflict, match="damaged"):
            call(mount, "PUT", "bad", {"model": "org/name"})
        assert call(mount, "DELETE", "bad") == {"deleted": True}
        assert call(mount, "PUT", "bad", {"model": "org/name"})["commit"] == commit
        assert str(path) in mount.log()
