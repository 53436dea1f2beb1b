"""``/.volumes``: each volume shows its commit and nothing else, for ever, from inodes of its own."""

import json
import posixpath

import pytest

from helios.names import RepoId
from heliosfs.store.manifest import FileEntry
from heliosfs.tree.nodes import Absent, Directory, Found, Link, TextFile
from heliosfs.tree.root import root
from heliosfs.tree.snapshot import Snapshot
from heliosfs.tree.source import FOREVER, Known, Repos
from heliosfs.volumes.record import VolumeRecord, frozen_refs

NOW = 1000.0
C1, C2 = "1" * 40, "2" * 40
REPO, OTHER = RepoId.parse("org/name"), RepoId.parse("org/other")


def file(number, size=10, *, lfs=False):
    return FileEntry(f"{number:064x}", size, f"{number:040x}", "f" * 64, lfs)


FILES = {"config.json": file(1), "model.safetensors": file(3, 5000, lfs=True), "a/b/deep.txt": file(4)}
COMMITS = {(REPO, C1): FILES, (REPO, C2): {"config.json": file(7)}, (OTHER, C1): {"x": file(9)}}


class Registry:
    """A tree source that knows two repositories, two commits and three refs."""

    async def repos(self, *, fresh=False):
        return Known(Repos.of([REPO, OTHER]), NOW)

    async def refs(self, repo, *, fresh=False):
        return Known({REPO: {"main": C2, "v1": C1, "v2": C2}, OTHER: {"main": C1}}.get(repo), NOW)

    async def commit_time(self, repo, commit):
        return Known(1234 if (repo, commit) in COMMITS else None, NOW)

    async def snapshot(self, repo, commit):
        files = COMMITS.get((repo, commit))
        return Known(files and Snapshot(repo, commit, 1234, files), NOW)

    async def seen(self, repo):
        return Known((C1, C2), NOW)


class Volumes(dict):
    """A list of volumes; ``make`` adds one."""

    def known(self):
        return Known(self, NOW)

    def make(self, volume, revision="v1", commit=C1, created=5):
        refs = frozen_refs(revision, commit)
        self[volume] = VolumeRecord(volume, str(REPO), commit, revision, "0" * 64, 1234, refs, created)


@pytest.fixture
def volumes():
    volumes = Volumes()
    volumes.make("pvc-1")
    return volumes


def now(coroutine):
    """The result of a coroutine that never waits."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("the tree waited for something other than its source")


def look(volumes, path):
    """Walk a path; follows no links."""
    found = Found("", root(volumes))
    for part in path.split("/"):
        assert isinstance(found.node, Directory), f"{found.name} is no directory"
        found = now(found.node.lookup(part, Registry()))
        if isinstance(found, Absent):
            return found
    return found


def names(volumes, path):
    return [found.name for found in now(look(volumes, path).node.entries(Registry()))]


def walk(volumes, path):
    """Path -> entry of everything below."""
    out = {}
    for found in now(look(volumes, path).node.entries(Registry())):
        out[f"{path}/{found.name}"] = found
        if isinstance(found.node, Directory):
            out |= walk(volumes, f"{path}/{found.name}")
    return out


HUB = ".volumes/pvc-1/hub/models--org--name"


def test_volumes_are_listed_and_hold_a_model_and_a_cache(volumes):
    volumes.make("a")
    assert names(volumes, ".volumes") == ["a", "pvc-1"]
    assert names(volumes, ".volumes/pvc-1") == ["hub", "model"]
    assert look(volumes, ".volumes/pvc-1").node.xattrs() == {
        "repo": "models/org/name",
        "commit": C1,
        "revision": "v1",
    }


def test_the_model_is_the_commits_files(volumes):
    assert names(volumes, ".volumes/pvc-1/model") == ["a", "config.json", "model.safetensors"]
    assert look(volumes, ".volumes/pvc-1/model/a/b/deep.txt").node.size == 10
    assert look(volumes, ".volumes/pvc-1/model").node.xattrs()["commit"] == C1


def test_the_cache_has_this_repository_this_commit_and_the_frozen_refs(volumes):
    assert names(volumes, ".volumes/pvc-1/hub") == ["models--org--name"]
    assert names(volumes, HUB) == ["blobs", "refs", "snapshots", "trees"]
    assert names(volumes, f"{HUB}/refs") == ["main", "v1"]
    assert names(volumes, f"{HUB}/snapshots") == [C1]
    assert names(volumes, f"{HUB}/trees") == [f"{C1}.json"]
    assert set(names(volumes, f"{HUB}/blobs")) == {f"{1:040x}", f"{3:064x}", f"{4:040x}"}
    assert look(volumes, f"{HUB}/refs/main").node.content == C1.encode()
    tree = now(look(volumes, f"{HUB}/trees/{C1}.json").node.content(Registry()))
    assert set(json.loads(tree)["files"]) == set(FILES)


@pytest.mark.parametrize(
    "path",
    [
        *(".volumes/pvc-2", ".volumes/pvc-1/other", ".volumes/pvc-1/hub/models--org--other", f"{HUB}/refs/v2"),
        *(f"{HUB}/snapshots/{C2}", f"{HUB}/trees/{C2}.json", f"{HUB}/blobs/{7:040x}", ".volumes/pvc-1/model/nope"),
    ],
)
def test_nothing_else_is_there(volumes, path):
    absent = look(volumes, path)
    assert isinstance(absent, Absent)
    assert absent.reason


def test_nothing_in_a_volume_ever_changes(volumes):
    below = walk(volumes, ".volumes/pvc-1")
    assert len(below) > 20
    assert {found.until for found in below.values()} == {FOREVER}
    assert look(volumes, f"{HUB}/refs/nope").until == FOREVER
    assert {f.node.lifetime for f in below.values() if isinstance(f.node, Directory)} == {FOREVER}


def test_which_volumes_there_are_is_asked_each_time(volumes):
    """So that a new volume can be bound at once, and a deleted one is gone at once."""
    assert look(volumes, ".volumes/pvc-1").until == NOW
    assert look(volumes, ".volumes/pvc-2").until == NOW


def test_links_stay_inside_what_is_bound(volumes):
    links = {path: found.node for path, found in walk(volumes, ".volumes/pvc-1/hub").items()}
    links = {path: node.target for path, node in links.items() if isinstance(node, Link)}
    assert len(links) == 3
    for path, target in links.items():
        assert not target.startswith("/")
        resolved = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        assert resolved.startswith(f"{HUB}/blobs/")
        assert isinstance(look(volumes, resolved), Found)
    assert not [f for f in walk(volumes, ".volumes/pvc-1/model").values() if isinstance(f.node, Link)]


def keys(entries, kind):
    return {found.node.key for found in entries.values() if isinstance(found.node, kind)}


def test_directories_have_inodes_of_their_own_and_blobs_share_theirs(volumes):
    volumes.make("other")
    first, second = (walk(volumes, f".volumes/{volume}") for volume in ("pvc-1", "other"))
    elsewhere = walk(volumes, f"org/name/{C1}") | walk(volumes, ".hub/models--org--name")
    assert not keys(first, Directory) & (keys(second, Directory) | keys(elsewhere, Directory))
    assert len(keys(first, Directory)) == sum(isinstance(found.node, Directory) for found in first.values())
    for path in (".volumes/other/model/config.json", f"org/name/{C1}/config.json", f"{HUB}/blobs/{1:040x}"):
        assert look(volumes, path).node.key == look(volumes, ".volumes/pvc-1/model/config.json").node.key


def test_a_volume_has_the_same_inodes_after_a_restart_and_others_when_it_is_made_anew(volumes):
    before = keys(walk(volumes, ".volumes/pvc-1"), Directory)
    again = Volumes()
    again.make("pvc-1")
    assert keys(walk(again, ".volumes/pvc-1"), Directory) == before
    again.make("pvc-1", revision="main")
    assert not keys(walk(again, ".volumes/pvc-1"), Directory) & before


def test_a_ref_with_a_slash_is_a_directory_of_refs(volumes):
    volumes.make("v", revision="refs/pr/1")
    refs = ".volumes/v/hub/models--org--name/refs"
    assert names(volumes, refs) == ["main", "refs"]
    assert isinstance(look(volumes, f"{refs}/refs/pr/1").node, TextFile)
    volumes.make("w", revision="main/x")
    assert look(volumes, ".volumes/w/hub/models--org--name/refs/main/x").node.content == C1.encode()
