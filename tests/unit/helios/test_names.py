import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.errors import InvalidInput
from helios.names import RepoId, check_path, check_ref, check_revision, is_commit, split_spec

PART = st.text(string.ascii_letters + string.digits + "._-", min_size=1, max_size=20)


@pytest.mark.parametrize("text", ["org/name", "gpt2", "a-b/c.d_e", "_x/y"])
def test_repository_names_survive_a_round_trip(text):
    repo = RepoId.parse(text)
    assert repo.id == text
    assert RepoId.from_canonical(str(repo)) == repo


@pytest.mark.parametrize(
    "text",
    [
        *("", "/", "a/", "/b", "a/b/c", "_", "a/_", "_/a", ".", "..", "a/..", "../a", ".hidden/a", "a/.b", "@a/b"),
        *("a/@main", "a b/c", "a\\b", "a/b\n", "a\0", "é/x", "x" * 97, "-a/b"),
        *("a--b/c", "a/b--c", "a-/b", "a/b.", "a/b..c"),
    ],
)
def test_names_that_the_mount_tree_could_not_show_are_refused(text):
    with pytest.raises(InvalidInput) as caught:
        RepoId.parse(text)
    assert "repositor" in str(caught.value)


@given(st.lists(PART, min_size=1, max_size=3).map("/".join))
def test_a_name_is_accepted_whole_or_refused(text):
    try:
        repo = RepoId.parse(text)
    except InvalidInput:
        return
    assert repo.id == text
    assert not any(part in (".", "..", "_") or part.startswith(("@", ".")) for part in text.split("/"))


def test_an_unknown_kind_is_refused():
    with pytest.raises(InvalidInput, match="models, datasets"):
        RepoId.from_canonical("spaces/a/b")


def test_split_spec():
    assert split_spec("a/b") == (RepoId("models", "a", "b"), "main")
    assert split_spec("a/b@refs/pr/1")[1] == "refs/pr/1"
    assert split_spec("a/b@" + "0" * 40)[1] == "0" * 40
    with pytest.raises(InvalidInput, match="@main"):
        split_spec("a/b@")


@pytest.mark.parametrize("text", ["", "a..b", "/a", "a/", "a//b", ".a", "a\nb", "a b", "x" * 251, "a.lock", "0" * 40])
def test_bad_refs_are_refused(text):
    with pytest.raises(InvalidInput):
        check_ref(text)


def test_revisions_are_commits_or_refs():
    assert check_revision("f" * 40) == "f" * 40
    assert check_revision("v1.0") == "v1.0"
    assert is_commit("a" * 40)
    assert not is_commit("A" * 40)
    assert not is_commit("a" * 40 + "\n")


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/etc/passwd",
        "../x",
        "a/../b",
        "a/./b",
        "a//b",
        "a/",
        "a\\b",
        "a\0b",
        "a\nb",
        "\x7f",
        "x" * 256,
        "a/" * 3000 + "b",
        "\udcff",
        "é" * 128,
    ],
)
def test_unsafe_paths_are_refused(path):
    with pytest.raises(InvalidInput, match="path"):
        check_path(path)


@given(st.text(max_size=300))
def test_an_accepted_path_stays_inside_its_directory(path):
    try:
        check_path(path)
    except InvalidInput:
        return
    parts = path.split("/")
    assert path == "/".join(parts)
    assert not set(parts) & {"", ".", ".."}
    assert "\0" not in path
