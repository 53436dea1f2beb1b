"""The mount tree: what is where, and how long it may be remembered."""

import json
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.errors import InvalidInput
from helios.names import RepoId
from heliosfs.store.manifest import check_tree
from heliosfs.tree.nodes import Absent, BlobFile, Directory, Found, Link, TextFile
from heliosfs.tree.root import root
from heliosfs.tree.snapshot import Snapshot
from heliosfs.tree.source import FOREVER, NAME_TTL_S, UNKNOWN_TTL_S
from tests.support.tree import C1, C2, C3, FILES, NOW, Registry, file


@pytest.fixture
def registry():
    return Registry(
        {
            "models/org/name": {"main": C1, "v1": C1, "refs/pr/1": C2},
            "models/org/other": {"main": C3},
            "models/gpt2": {"main": C1},
            "datasets/org/data": {"main": C1},
        },
        {
            ("models/org/name", C1): FILES,
            ("models/org/name", C2): {"config.json": file(7)},
            ("models/org/name", C3): {"old.bin": file(8, 2000, lfs=True)},
            ("models/org/other", C3): {"x": file(9)},
            ("models/gpt2", C1): {"config.json": file(1)},
            ("datasets/org/data", C1): {"train.csv": file(5)},
        },
    )


def now(coroutine):
    """The result of a coroutine that never waits."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("the tree waited for something other than its source")


def look(registry, path):
    """Walk a path; follows no links."""
    found = Found("", root())
    for part in path.split("/"):
        assert isinstance(found.node, Directory), f"{found.name} is no directory"
        found = now(found.node.lookup(part, registry))
        if isinstance(found, Absent):
            return found
    return found


def names(registry, path):
    node = look(registry, path).node if path else root()
    return [found.name for found in now(node.entries(registry))]


def test_models_are_shown_by_organisation_and_name(registry):
    assert names(registry, "") == [".datasets", ".hub", ".volumes", "_", "org"]
    assert names(registry, "org") == ["name", "other"]
    assert names(registry, "_") == ["gpt2"]
    assert names(registry, ".datasets") == ["org"]
    assert names(registry, ".datasets/org") == ["data"]
    assert names(registry, ".volumes") == []


def test_a_repository_lists_its_refs_and_the_commits_that_refs_name(registry):
    assert names(registry, "org/name") == ["@main", "@refs%2Fpr%2F1", "@v1", C1, C2]


def test_refs_that_are_remembered_after_their_commit_has_gone_are_not_listed(registry):
    """What is known of refs may be a second old: a listing never shows half of a repository that was removed."""
    del registry.commits[RepoId.parse("org/name"), C1]
    assert names(registry, "org/name") == ["@refs%2Fpr%2F1", C2]


def test_every_commit_is_reachable_by_its_id_whether_a_ref_names_it_or_not(registry):
    assert names(registry, f"org/name/{C3}") == ["old.bin"]
    assert isinstance(look(registry, f"org/name/{'4' * 40}"), Absent)


def test_a_ref_is_a_link_to_its_commit(registry):
    main = look(registry, "org/name/@main")
    assert isinstance(main.node, Link)
    assert main.node.target == C1
    assert look(registry, "org/name/@refs%2Fpr%2F1").node.target == C2


def test_a_ref_that_moves_becomes_another_node(registry):
    before = look(registry, "org/name/@main").node
    registry.named[RepoId.parse("org/name")]["main"] = C2
    after = look(registry, "org/name/@main").node
    assert before.key != after.key
    assert after.target == C2


def test_a_commit_holds_its_files_with_modes_sizes_and_times(registry):
    assert names(registry, f"org/name/{C1}") == ["a", "config.json", "model.safetensors", "run.sh"]
    assert names(registry, f"org/name/{C1}/a") == ["b", "same.txt"]
    plain, script = (look(registry, f"org/name/{C1}/{name}").node for name in ("config.json", "run.sh"))
    assert stat.filemode(plain.mode) == "-r--r--r--"
    assert stat.filemode(script.mode) == "-r-xr-xr-x"
    assert (plain.size, plain.mtime) == (10, 1234)
    assert stat.filemode(look(registry, f"org/name/{C1}/a").node.mode) == "dr-xr-xr-x"
    assert look(registry, f"org/name/{C1}/a").node.mtime == 1234


def test_one_content_is_one_inode_in_every_place(registry):
    same = {
        look(registry, path).node.key
        for path in (
            f"org/name/{C1}/config.json",
            f"org/name/{C1}/a/same.txt",
            f"_/gpt2/{C1}/config.json",
            f".hub/models--gpt2/blobs/{1:040x}",
        )
    }
    assert len(same) == 1
    assert look(registry, f"org/name/{C1}/run.sh").node.key not in same


def test_the_executable_bit_is_part_of_the_inode():
    snapshot = Snapshot(RepoId.parse("o/m"), C1, 0, {"x": file(1, executable=True), "y": file(1)})
    keys = {BlobFile(e, snapshot, p, executable=e.executable).key for p, e in snapshot.files.items()}
    assert len(keys) == 2


@pytest.mark.parametrize(
    "path",
    [
        *("nope", "@main", "org/nope", "_/nope", "org/name/main", "org/name/@nope", f"org/name/{C1}/nope"),
        *(f"org/name/{C1}/a/nope", f"org/name/{C1[:-1]}", f"org/name/{'A' * 40}", "org/name/@refs%2fpr%2f1"),
        *("org/name/@", "org/name/@a%2F", ".volumes/x", ".hub/org--name", ".hub/models--org", ".hub/models--a--b--c"),
        *(".hub/models--org--name/nope", ".hub/models--org--name/refs/nope", ".hub/models--org--name/refs/refs/nope"),
        *(".hub/models--org--name/snapshots/main", f".hub/models--org--name/trees/{C1}"),
        *(f".hub/models--org--name/trees/{'4' * 40}.json", f".hub/models--org--name/blobs/{'4' * 40}"),
    ],
)
def test_what_is_not_there_is_absent_with_a_reason(registry, path):
    absent = look(registry, path)
    assert isinstance(absent, Absent)
    assert absent.reason


def test_names_live_a_second_unknown_ones_five_and_content_for_ever(registry):
    for path in ("org", "org/name", "org/name/@main", ".hub/models--org--name", ".hub/models--org--name/refs/main"):
        assert look(registry, path).until == NOW + NAME_TTL_S, path
    for path in ("nope", "org/nope", "org/name/@nope", f"org/name/{'4' * 40}", ".hub/models--x--y"):
        assert look(registry, path).until == NOW + UNKNOWN_TTL_S, path
    hub = ".hub/models--org--name"
    for path in (f"org/name/{C1}", f"org/name/{C1}/a", f"org/name/{C1}/config.json", f"{hub}/snapshots/{C1}/run.sh"):
        assert look(registry, path).until == FOREVER, path
        assert look(registry, path).node.lifetime == FOREVER, path
    assert look(registry, f"org/name/{C1}/nope").until == FOREVER
    listed = now(look(registry, "org/name").node.entries(registry))
    assert {f.until for f in listed if f.name.startswith("@")} == {NOW + NAME_TTL_S}
    assert {f.until for f in now(root().entries(registry)) if f.name == "org"} == {NOW + NAME_TTL_S}


# --- .hub ------------------------------------------------------------------------------------------------------------


def test_the_hub_directory_has_a_folder_a_repository(registry):
    assert names(registry, ".hub") == [
        "datasets--org--data",
        "models--gpt2",
        "models--org--name",
        "models--org--other",
    ]
    assert names(registry, ".hub/models--org--name") == ["blobs", "refs", "snapshots", "trees"]


def test_a_hub_ref_is_exactly_the_commit(registry):
    main = look(registry, ".hub/models--org--name/refs/main").node
    assert isinstance(main, TextFile)
    assert main.content == C1.encode()
    assert names(registry, ".hub/models--org--name/refs") == ["main", "refs", "v1"]
    assert look(registry, ".hub/models--org--name/refs/refs/pr/1").node.content == C2.encode()


def test_a_ref_below_another_ref_is_hidden_in_the_hub_layout(registry):
    registry.named[RepoId.parse("org/other")] = {"a": C3, "a/b": C3}
    assert names(registry, ".hub/models--org--other/refs") == ["a"]
    assert isinstance(look(registry, ".hub/models--org--other/refs/a").node, TextFile)
    assert names(registry, "org/other")[:2] == ["@a", "@a%2Fb"]


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("config.json", f"../../blobs/{1:040x}"),
        ("model.safetensors", f"../../blobs/{3:064x}"),
        ("a/b/deep.txt", f"../../../../blobs/{4:040x}"),
    ],
)
def test_snapshots_link_to_blobs_by_etag(registry, path, target):
    assert look(registry, f".hub/models--org--name/snapshots/{C1}/{path}").node.target == target


def test_blobs_are_those_of_every_known_commit(registry):
    blobs = ".hub/models--org--name/blobs"
    old = f"{8:064x}"
    assert isinstance(look(registry, f"{blobs}/{old}"), Absent)
    assert names(registry, f".hub/models--org--name/snapshots/{C3}") == ["old.bin"]
    assert look(registry, f"{blobs}/{old}").node.size == 2000
    assert set(names(registry, blobs)) == {f"{n:040x}" for n in (1, 2, 4, 7)} | {f"{3:064x}", old}


def test_a_commit_that_was_asked_for_as_a_ref_is_listed(registry):
    hub = ".hub/models--org--name"
    assert names(registry, f"{hub}/snapshots") == [C1, C2]
    assert isinstance(look(registry, f"{hub}/refs/{C3}"), Absent)
    assert names(registry, f"{hub}/snapshots") == [C1, C2, C3]
    assert names(registry, f"{hub}/trees") == [f"{c}.json" for c in (C1, C2, C3)]
    assert isinstance(look(registry, f"{hub}/refs/{'4' * 40}"), Absent)
    assert names(registry, f"{hub}/snapshots") == [C1, C2, C3]


def test_the_tree_listing_is_what_huggingface_hub_writes(registry):
    assert names(registry, ".hub/models--org--name/trees") == [f"{C1}.json", f"{C2}.json"]
    node = look(registry, f".hub/models--org--name/trees/{C1}.json").node
    content = now(node.content(registry))
    assert len(content) == node.size
    tree = json.loads(content)
    assert tree["format_version"] == 1
    assert tree["files"]["config.json"] == {"size": 10, "blob_id": f"{1:040x}"}
    assert tree["files"]["model.safetensors"] == {
        "size": 5000,
        "blob_id": f"{3:040x}",
        "lfs_sha256": f"{3:064x}",
        "lfs_size": 5000,
    }
    assert set(tree["files"]) == set(FILES)


# --- snapshots -------------------------------------------------------------------------------------------------------

PART = st.text("ab.", min_size=1, max_size=2).filter(lambda part: part.strip("."))
PATHS = st.lists(st.lists(PART, min_size=1, max_size=4).map("/".join), min_size=1, max_size=12, unique=True)


def consistent(paths):
    try:
        check_tree(dict.fromkeys(paths))
    except InvalidInput:
        return False
    return True


@given(PATHS.filter(consistent))
def test_every_file_of_a_snapshot_is_found_and_nothing_else(paths):
    snapshot = Snapshot(RepoId.parse("o/m"), C1, 0, {path: file(i) for i, path in enumerate(paths)})
    walked = []
    todo = [""]
    while todo:
        directory = todo.pop()
        for name, entry in snapshot.directories[directory].items():
            path = f"{directory}/{name}" if directory else name
            if entry is None:
                todo.append(path)
            else:
                assert entry is snapshot.files[path]
                walked.append(path)
    assert sorted(walked) == sorted(paths)
    assert list(snapshot.directories[""]) == sorted(snapshot.directories[""])


def test_a_path_of_two_thousand_parts_is_no_problem():
    path = "/".join("a" * 2000)
    snapshot = Snapshot(RepoId.parse("o/m"), C1, 0, {path: file(1)})
    assert len(snapshot.directories) == 2000
