"""The model that a worker serves, by a directory or a name."""

from __future__ import annotations

import pytest

from helios.errors import InvalidInput, NotFound, UsageError
from helios.home import Home
from helios.launch.worker.found import find

A, B = "a" * 40, "b" * 40


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "home")


def plain(path):
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


def cached(cache, repo, commit, main=None):
    """A snapshot in a Hub's cache, with ``refs/main`` if it is named."""
    directory = cache / f"models--{repo.replace('/', '--')}"
    path = plain(directory / "snapshots" / commit)
    if main:
        (directory / "refs").mkdir(exist_ok=True)
        (directory / "refs" / "main").write_text(main)
    return path


def test_plain_files_are_called_as_the_command_line_says(home, tmp_path):
    path = plain(tmp_path / "model")
    found = find(str(path), "org/name", A, home, {})
    assert (found.path, found.name, found.revision, found.mountpoint) == (path, "org/name", A, None)
    assert find(str(path), "org/name", "", home, {}).revision == ""
    with pytest.raises(UsageError, match="does not say which model") as caught:
        find(str(path), "", "", home, {})
    assert "HELIOS_WORKER__NAME" in str(caught.value)
    with pytest.raises(UsageError, match="is not a commit"):
        find(str(path), "org/name", "main", home, {})


def test_a_cache_of_one_snapshot_says_what_it_holds(home, tmp_path):
    path = cached(tmp_path / "hub", "org/name", A, main=A)
    for model in (tmp_path / "hub", path):
        found = find(str(model), "", "", home, {})
        assert (found.path, found.name, found.revision) == (path, "org/name", A)
    assert find(str(path), "other", "", home, {}).name == "other"


def test_of_several_snapshots_main_counts_and_without_it_one_has_to_be_named(home, tmp_path):
    hub = tmp_path / "hub"
    cached(hub, "org/name", A)
    cached(hub, "org/name", B, main=B)
    assert find(str(hub), "", "", home, {}).revision == B
    cached(hub, "gpt2", A)
    with pytest.raises(UsageError, match="several snapshots: gpt2@aaaaaaaaaaaa, org/name@bbbbbbbbbbbb"):
        find(str(hub), "", "", home, {})
    assert find(str(hub), "gpt2", "", home, {}).revision == A


def test_a_name_is_looked_for_in_the_cache_that_the_environment_names(home, tmp_path):
    hub = tmp_path / "hf" / "hub"
    path = cached(hub, "org/name", A, main=A)
    for environ in ({"HF_HUB_CACHE": str(hub)}, {"HF_HOME": str(tmp_path / "hf")}):
        for model in ("org/name", "org/name@main", f"org/name@{A}"):
            found = find(model, "", "", home, environ)
            assert (found.path, found.name, found.revision) == (path, "org/name", A)
    with pytest.raises(NotFound, match=f"org/name@{B} is not in the cache"):
        find(f"org/name@{B}", "", "", home, {"HF_HUB_CACHE": str(hub)})
    with pytest.raises(NotFound, match="a cache or a mount: there is none"):
        find("org/name", "", "", home, {})


@pytest.mark.parametrize(("model", "error"), [("./nowhere", InvalidInput), ("a/b/c", UsageError), ("a b", UsageError)])
def test_what_is_no_model_is_said(home, model, error):
    with pytest.raises(error):
        find(model, "", "", home, {})


def test_a_directory_with_nothing_in_it(home, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInput, match=r"neither a config.json nor a snapshot of a model"):
        find(str(tmp_path / "empty"), "", "", home, {})
