"""What a mount keeps: shown, pinned, evicted over the control API of a real mount; there again after a restart."""

import hashlib
import json
import random

import pytest

from helios.errors import Conflict, InvalidInput, RepoNotFound
from helios.home import Home
from tests.support.mounts import MODES, call, mounted, push, write

pytestmark = pytest.mark.fuse

DATA = random.Random(3).randbytes(6_000_000)
FILES = {"config.json": b"{}", "weights.bin": DATA}
WEIGHTS = hashlib.sha256(DATA).hexdigest()


@pytest.fixture(params=MODES, autouse=True)
def mode(request, monkeypatch):
    """The mode that the test mounts in."""
    monkeypatch.setenv("HELIOS_MOUNT__MODE", request.param)


def entry(mount):
    return next((e for e in call(mount, "GET", "cache")["entries"] if e["sha256"] == WEIGHTS), None)


def evicted(mount, name):
    """Evict until nothing is in use any more: a file is let go a moment after it was closed."""
    for _ in range(100):
        answer = call(mount, "POST", "evict", {"model": name})
        if "in use" not in answer["kept"].values():
            return answer
    raise AssertionError(answer)


def test_pin_evict_unpin(tmp_path):
    home, name = Home(tmp_path / "home"), "org/name"
    commit = push(home, write(tmp_path / "files", FILES), name)
    with mounted(home, tmp_path / "mnt") as mount:
        path = mount.path / name / commit / "weights.bin"
        assert path.read_bytes() == DATA
        pinned = call(mount, "POST", "pin", {"model": name})
        assert pinned == {
            "repo": f"models/{name}", "revision": "main", "commit": commit, "class": "pinned", "blobs": 2,
        }  # fmt: skip
        found = entry(mount)
        assert (found["size"], found["class"], found["hits"]) == (len(DATA), "pinned", 1)
        assert evicted(mount, name)["kept"][WEIGHTS] == "pinned"
    with mounted(home, tmp_path / "mnt") as mount:
        path = mount.path / name / commit / "weights.bin"
        assert call(mount, "GET", "cache")["pins"] == [pinned]
        assert evicted(mount, name)["removed"] == 0
        assert call(mount, "POST", "unpin", {"model": name, "revision": commit}) == {"unpinned": [pinned]}
        assert call(mount, "POST", "unpin", {"model": name}) == {"unpinned": []}
        call(mount, "PUT", "volumes/v1", {"model": name})
        assert entry(mount)["class"] == "critical", "what a volume holds goes last"
        with pytest.raises(Conflict, match="has the class critical, not scratch"):
            call(mount, "PUT", "volumes/v1", {"model": name, "priority": "scratch"})
        call(mount, "DELETE", "volumes/v1")
        assert entry(mount)["class"] == "normal"
        with pytest.raises(InvalidInput, match="'urgent' is no class"):
            call(mount, "PUT", "volumes/v1", {"model": name, "priority": "urgent"})
        assert call(mount, "PUT", "volumes/v1", {"model": name, "priority": "pinned"})["priority"] == "pinned"
        assert evicted(mount, name)["kept"][WEIGHTS] == "pinned"
    with mounted(home, tmp_path / "mnt") as mount:
        assert entry(mount)["class"] == "pinned", "a volume's class is there again after a restart"
        assert call(mount, "PUT", "volumes/v1", {"model": name})["priority"] == "pinned"
        call(mount, "DELETE", "volumes/v1")
        assert evicted(mount, name)["removed"] >= 1
        assert entry(mount) is None
        assert path.read_bytes() == DATA
        with pytest.raises(RepoNotFound):
            call(mount, "POST", "evict", {"model": "org/unknown"})
        with pytest.raises(InvalidInput, match="no class"):
            call(mount, "POST", "pin", {"model": name, "priority": "vital"})
        with pytest.raises(InvalidInput, match="which model"):
            call(mount, "POST", "evict", {})


def test_the_commands(helios, helios_home, tmp_path):
    commit = push(helios_home, write(tmp_path / "files", FILES), "org/name")
    assert "has no mount" in helios("pin", "org/name", code=1).err
    with mounted(helios_home, tmp_path / "mnt") as mount:
        assert (mount.path / "org/name" / commit / "weights.bin").read_bytes() == DATA
        assert helios("pin", "org/name", "--priority", "critical").out == f"{commit} critical\n"
        assert json.loads(helios("pin", "org/name", "--json").out)["class"] == "pinned"
        assert "pinned" in helios("evict", "org/name", "--mount", str(mount.path)).err
        assert helios("unpin", f"org/name@{commit}").out == f"{commit}\n"
        assert "is not pinned" in helios("unpin", "org/name", code=1).err
        assert evicted(mount, "org/name")["removed"] >= 1
        assert json.loads(helios("evict", "org/name", "--json").out)["removed"] == 0
        assert "is no mount" in helios("evict", "org/name", "--mount", str(tmp_path), code=1).err
