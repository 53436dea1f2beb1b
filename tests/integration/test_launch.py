"""The parts quickstart and serve are made of, with a real registry and real mounts, without vLLM."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading

import pytest

from helios import unmounting
from helios.config import Config
from helios.embedded import attach, running
from helios.errors import InvalidInput, NotFound, Unavailable, UsageError
from helios.launch.progress import Progress
from helios.launch.serving import Serving, end_unused_registry, model_path, wait_for_router
from helios.launch.shared_mount import mountpoint, shared_mount
from helios.launch.source import TINY, is_directory, name_for, obtain
from helios.mounts import claim, find_mount, states
from helios.names import RepoId
from helios.process import ProcessId


@pytest.fixture
def progress():
    return Progress(io.StringIO())


@pytest.fixture
def registry(helios_home):
    with attach(Config(), helios_home) as attached:
        yield attached
    end_unused_registry(helios_home)


# --- where the model comes from ---


def test_the_tiny_model_is_published_once(helios_home, registry, progress):
    first = obtain(None, None, helios_home, registry.client(), progress)
    second = obtain(None, None, helios_home, registry.client(), progress)
    assert first.repo == second.repo == TINY
    assert first.commit == second.commit
    assert first.stored.endswith(", 0 B deduplicated")
    assert second.stored.startswith("0 B new, ")
    assert [stage.title for stage in progress.stages] == ["Model", "Publish"] * 2


def test_a_directory_is_published_under_its_name(helios_home, registry, progress, tmp_path):
    directory = tmp_path / "My model (v2)"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    published = obtain(str(directory), None, helios_home, registry.client(), progress)
    assert published.repo.id == "local/My-model-v2"
    named = obtain(str(directory), RepoId.parse("org/name"), helios_home, registry.client(), progress)
    assert registry.client().refs(named.repo) == {"main": named.commit}


def test_a_name_is_taken_from_the_registry_before_the_hub(helios_home, registry, progress, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    made = obtain(str(tmp_path / "m"), RepoId.parse("org/name"), helios_home, registry.client(), progress)
    for text in ("org/name", "org/name@main", f"org/name@{made.commit}"):
        found = obtain(text, None, helios_home, registry.client(), progress)
        assert (found.commit, found.stored) == (made.commit, "in the registry already")


@pytest.mark.parametrize(
    ("model", "error"), [("./nowhere", InvalidInput), ("/nowhere", InvalidInput), ("a/b/c", UsageError)]
)
def test_bad_models(helios_home, registry, progress, model, error):
    with pytest.raises(error):
        obtain(model, None, helios_home, registry.client(), progress)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/x/Qwen3-0.6B", "Qwen3-0.6B"),
        ("/x/...", "model"),
        ("/x/a  b", "a-b"),
        ("/x/ö", "model"),
        ("/x/a--b..c", "a-b-c"),
    ],
)
def test_names_of_directories(path, name):
    from pathlib import Path

    assert name_for(Path(path)).name == name


def test_what_looks_like_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert is_directory("org/name")
    assert not is_directory("org/other")
    assert is_directory("./x")
    assert is_directory("~/x")


# --- the shared mount ---

HOLD = """
import sys
from pathlib import Path
from helios.home import Home
from helios.launch.shared_mount import shared_mount
with shared_mount(Home(Path(sys.argv[1]))) as state:
    print(state.pid, flush=True)
    sys.stdin.readline()
"""


@contextlib.contextmanager
def holder(home):
    """Another process that uses the shared mount until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(home.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process, int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


@pytest.mark.fuse
def test_the_last_one_out_unmounts(helios_home):
    with holder(helios_home) as (other, first), shared_mount(helios_home) as state:
        assert state.pid == first
        other.stdin.close()
        assert other.wait(20) == 0
        assert find_mount(mountpoint(helios_home)) is not None
        assert ".hub" in os.listdir(state.mountpoint)
    assert find_mount(mountpoint(helios_home)) is None
    assert states(helios_home) == []


@pytest.mark.fuse
def test_a_killed_user_leaves_a_mount_that_the_next_one_takes_over(helios_home):
    with holder(helios_home) as (other, first):
        other.kill()
        other.wait()
        with shared_mount(helios_home) as state:
            assert state.pid == first
    assert find_mount(mountpoint(helios_home)) is None


@pytest.mark.fuse
def test_a_mount_whose_daemon_was_killed_is_replaced(helios_home):
    with holder(helios_home) as (other, first):
        os.kill(first, signal.SIGKILL)
        assert (gone := ProcessId.of(first)) is None or gone.wait(5)
        other.kill()
        other.wait()
        with shared_mount(helios_home) as state:
            assert state.pid != first
            assert ".hub" in os.listdir(state.mountpoint)
    assert find_mount(mountpoint(helios_home)) is None


@pytest.mark.fuse
def test_a_claim_that_outlives_its_mount_for_a_moment_is_waited_for(helios_home):
    helios_home.ensure_run()
    held = claim(helios_home, mountpoint(helios_home))
    assert held is not None
    letting_go = threading.Timer(1.0, held.release)
    letting_go.start()
    with shared_mount(helios_home) as state:
        assert ".hub" in os.listdir(state.mountpoint)
    letting_go.join()
    assert states(helios_home) == []


@pytest.mark.fuse
def test_a_mount_that_the_user_made_stays(helios_home, helios):
    helios_home.ensure_run()
    helios("mount", helios_home.root / "mnt")
    with shared_mount(helios_home) as state:
        assert ".hub" in os.listdir(state.mountpoint)
    assert find_mount(mountpoint(helios_home)) is not None
    unmounting.stop(helios_home, mountpoint(helios_home))


@pytest.mark.fuse
def test_a_published_model_is_seen_through_the_shared_mount(helios_home, progress):
    with Serving(helios_home, Config(), progress) as serving:
        published = obtain(None, None, helios_home, serving.registry().client(), progress)
        mount = serving.mount()
        path = model_path(mountpoint(helios_home), published.repo, published.commit)
        assert str(path).startswith(mount.mountpoint)
        original = helios_home.root / "models"
        (directory,) = original.iterdir()
        for file in directory.iterdir():
            assert (path / file.name).read_bytes() == file.read_bytes()
    assert find_mount(mountpoint(helios_home)) is None
    assert running(helios_home) is None


# --- the embedded registry's end ---


def test_an_unused_registry_is_ended_at_once(helios_home):
    attach(Config(), helios_home).close()
    record = running(helios_home)
    end_unused_registry(helios_home)
    assert running(helios_home) is None
    assert not ProcessId(record.pid, record.start).alive()


def test_a_used_registry_is_left_alone(helios_home):
    with attach(Config(), helios_home) as other:
        end_unused_registry(helios_home)
        assert other.client().repos() == []
    end_unused_registry(helios_home)


# --- the router ---


def test_a_router_that_dies_shows_why(helios_home, progress):
    with Serving(helios_home, Config(), progress) as serving:
        serving.repair()
        children = serving.children
        child = children.start(
            "router", [sys.executable, "-c", "print('no such worker', flush=True); raise SystemExit(4)"]
        )
        with pytest.raises(Unavailable, match=r"(?s)status 4.*no such worker"):
            wait_for_router(child)


def test_a_child_that_ends_is_named(helios_home, progress):
    with Serving(helios_home, Config(), progress) as serving:
        child = serving.children.start("vllm", [sys.executable, "-c", "print('out of memory', flush=True)"])
        serving._watched.append(child)
        with pytest.raises(Unavailable, match=r"(?s)vllm ended with status 0.*out of memory"):
            serving.watch()


def test_serving_an_unknown_model_says_how_to_get_it(helios_home):
    from helios.launch.plan import Wish
    from helios.launch.serve import Group, serve

    settings = Config()
    with pytest.raises(NotFound) as caught:
        serve(helios_home, settings, RepoId.parse("org/none"), "main", Group(Wish(), (), 10.0, logs=False))
    assert "helios pull org/none" in str(caught.value)
    end_unused_registry(helios_home)
