"""Compiled kernels when things go wrong: kills at every instant, silent registries, full disks, bad artifacts.

Whatever happens an engine starts, nothing half-done is ever visible, and the next start finds or publishes all.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from helios import mounts
from helios.config import CompileCacheSettings
from helios.errors import Forbidden
from helios.home import Home
from helios.http.client import HttpClient
from helios.launch import compile_cache, compile_commits, compile_made, compile_publish
from helios.launch.compile_cache import CompileCaches, LocalCache
from helios.launch.compile_commits import MountedCommits
from helios.launch.compile_find import secret_of, within
from helios.launch.compile_key import REFS
from helios.registry_client import RegistryClient
from tests.conftest import Helios
from tests.support.compiled import ARGUMENTS, REPO, Node, contents
from tests.support.compiled_kill import MADE, PUBLISHING, UNPACKING
from tests.support.disks import small_disk
from tests.support.mounts import mounted, push, run, write
from tests.support.registry import running_registry

pytestmark = pytest.mark.fuse

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    base = tmp_path_factory.mktemp("compiled")
    home = Home(base / "one")
    with running_registry(Helios({"HELIOS_HOME": str(home.root)})) as registry:
        commit = push(home, write(base / "model", {"config.json": b"{}"}), "org/name")
        (base / "key").write_text("ab" * 32)
        with mounted(home, base / "one/mnt") as mount:
            yield registry, commit, home, mount.path, str(base / "key")


@pytest.fixture
def node(site, monkeypatch):
    monkeypatch.setattr(compile_publish, "QUIET_S", 0.0)
    monkeypatch.setattr(compile_cache, "POLL_S", 0.05)
    registry, _, home, mount, key = site
    node = Node(home, mount, registry.client(), key_file=key)
    for ref in node.refs():
        node.client.delete(REPO, ref)
    shutil.rmtree(home.root / "vllm", ignore_errors=True)
    yield node
    node.client.close()
    assert not any(entry.mountpoint.is_relative_to(node.base) for entry in mounts.mount_table())


def killed(site, where):
    registry, commit, home, mount, key = site
    command = [sys.executable, "-m", "tests.support.compiled_kill"]
    arguments = [str(home.root), str(mount), registry.url, key, commit, where]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *arguments], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr


@pytest.mark.parametrize("where", PUBLISHING)
def test_a_kill_while_kernels_are_published_leaves_all_or_nothing_and_the_next_start_publishes(site, node, where):
    commit = site[1]
    killed(site, where)
    published = where == "after the commit"
    assert len(node.refs()) == published
    if published:
        (at,) = node.refs().values()
        assert contents(node.mount / "org/name" / at / "files") == MADE
    else:
        shutil.rmtree(node.base / "made", ignore_errors=True)  # this node's own would hide what others see
    with node.caches() as caches:
        assert node.left() == [], "what the killed one left is gone before anything else"
        found, _ = node.start(commit, MADE, caches)
        assert found == (MADE if published else {})
        assert node.start(commit, {}, caches)[0] == MADE
    assert len(node.refs()) == 1
    assert node.left() == []


@pytest.mark.parametrize("where", UNPACKING)
def test_a_kill_while_an_engine_gets_its_kernels_leaves_nothing_and_the_next_start_finds_them(site, node, where):
    commit = site[1]
    with node.caches() as caches:
        node.start(commit, MADE, caches)
    killed(site, where)
    with node.caches() as caches:
        assert node.left() == []
        assert node.start(commit, {}, caches)[0] == MADE
    assert node.left() == []
    assert not (node.base / "made" / next(iter(node.refs())).removeprefix(REFS)).exists()


def test_a_view_whose_owner_was_killed_does_not_keep_its_mount_from_being_taken_away(site, node, tmp_path):
    registry, commit, _, _, key = site
    with node.caches() as caches:
        node.start(commit, MADE, caches)
    home = Home(tmp_path / "home")
    with mounted(home, tmp_path / "mnt", HELIOS_REGISTRY__URLS=registry.url) as mount:
        killed((registry, commit, home, mount.path, key), "while the engine runs")
        assert any(entry.mountpoint.is_relative_to(home.root) for entry in mounts.mount_table())
        run(home, "umount", mount.path)
        with CompileCaches(home, CompileCacheSettings(), node.client, MountedCommits(mount.path), node.notes.append):
            assert not any(entry.mountpoint.is_relative_to(home.root) for entry in mounts.mount_table())


def test_of_more_than_eight_artifacts_the_oldest_goes_and_who_uses_it_reads_on(site, node):
    commit = site[1]
    with node.caches() as caches:
        sizes = [str(64 * number) for number in range(1, compile_publish.KEPT + 2)]
        node.start(commit, {"first": b"1"}, caches, ["--max-model-len", sizes[0]])
        (oldest,) = node.refs()
        time.sleep(1.1)  # commits are dated by the second, and of those of one second any may go
        reader = node.open(commit, caches, ["--max-model-len", sizes[0]])
        for size in sizes[1:]:
            node.start(commit, {f"of {size}": b"1"}, caches, ["--max-model-len", size])
        assert len(node.refs()) == compile_publish.KEPT
        assert oldest not in node.refs()
        assert contents(Path(reader.env["VLLM_CACHE_ROOT"])) == {"first": b"1"}
        reader.close()
        assert node.start(commit, {"first": b"2"}, caches, ["--max-model-len", sizes[0]])[0] == {}
        assert oldest in node.refs(), "it is the newest now"
        assert len(node.refs()) == compile_publish.KEPT


def test_where_the_old_ones_may_not_be_removed_that_is_told_and_what_is_published_stays(site, node, monkeypatch):
    commit = site[1]
    monkeypatch.setattr(compile_publish, "KEPT", 1)

    def refuse(*_, **__):
        raise Forbidden("this token may not remove refs")

    monkeypatch.setattr(node.client, "delete", refuse)
    with node.caches() as caches:
        for size in ("64", "128"):
            node.start(commit, {"a": b"1"}, caches, ["--max-model-len", size])
        assert len(node.refs()) == 2
        monkeypatch.undo()
    (note,) = (note for note in node.notes if "may not remove" in note)
    assert "are published" in note


def test_of_engines_that_publish_at_once_one_does_and_all_start(site, node, monkeypatch):
    """They share a directory and write the same files, while others are about to publish them."""
    commit = site[1]
    monkeypatch.setattr(compile_publish, "QUIET_S", 1.0)
    others = [Node(node.home, node.mount, site[0].client(), key_file=site[4]) for _ in range(3)]
    with contextlib.ExitStack() as stack:
        threads = [
            threading.Thread(target=other.start, args=(commit, MADE, stack.enter_context(other.caches())))
            for other in others
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert sum("are published" in note for other in others for note in other.notes) == 1, [o.notes for o in others]
    with node.caches() as caches:
        assert node.start(commit, {}, caches)[0] == MADE
    for other in others:
        other.client.close()


def test_an_engine_that_dies_twice_with_an_artifact_starts_without_it_and_the_next_one_replaces_it(site, node):
    commit = site[1]
    with node.caches() as caches:
        node.start(commit, {"a": b"bad"}, caches)
        (bad,) = node.refs().values()
        assert node.fails(commit, caches, 1) == {"a": b"bad"}
    with node.caches() as caches:
        assert node.fails(commit, caches, 132) == {"a": b"bad"}, "once may be anybody's fault"
        assert node.fails(commit, caches, 1) == {}
        assert any("next start does without" in note for note in node.notes), node.notes
        assert node.start(commit, {"a": b"good"}, caches)[0] == {}
        assert list(node.refs().values()) != [bad]
        assert node.start(commit, {}, caches)[0] == {"a": b"good"}


def test_an_engine_that_was_stopped_or_came_up_since_says_nothing_against_its_kernels(site, node):
    commit = site[1]
    with node.caches() as caches:
        node.start(commit, {"a": b"1"}, caches)
        for status in (0, 2, 137, 143):
            node.fails(commit, caches, status)
            node.fails(commit, caches, status)
        node.fails(commit, caches, 1)
        node.start(commit, {}, caches)
        node.fails(commit, caches, 1)
        assert node.start(commit, {}, caches)[0] == {"a": b"1"}


def test_what_a_home_compiled_for_itself_is_thrown_away_when_engines_die_of_it(site, node):
    commit = site[1]
    node.settings = CompileCacheSettings(key_file=site[4], mode="read")
    with node.caches() as caches:
        node.start(commit, {"a": b"1"}, caches)
        assert node.fails(commit, caches, 1) == {"a": b"1"}
        assert node.fails(commit, caches, 1) == {"a": b"1"}
        assert node.start(commit, {"a": b"2"}, caches)[0] == {}
        assert node.start(commit, {}, caches)[0] == {"a": b"2"}


def test_a_registry_that_accepts_and_says_nothing_delays_a_start_by_no_more_than_its_deadline(site, node):
    commit = site[1]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        away = RegistryClient(HttpClient(f"http://127.0.0.1:{silent.getsockname()[1]}"))
        settings = CompileCacheSettings(key_file=site[4], wait_s=1.0)
        with CompileCaches(node.home, settings, away, MountedCommits(node.mount), node.notes.append) as caches:
            began = time.monotonic()
            cache = caches.open(node.mount / "org/name" / commit, "cpu", ARGUMENTS, {})
            assert time.monotonic() - began < 10
        assert isinstance(cache, LocalCache)
        assert any("took more than 1 s" in note for note in node.notes), node.notes
        away.close()


def test_a_mount_that_does_not_bring_the_artifact_in_time_delays_a_start_no_longer(site, node, monkeypatch):
    commit = site[1]
    with node.caches() as caches:
        node.start(commit, {"a": b"1"}, caches)
    hangs = threading.Event()
    monkeypatch.setattr(compile_commits, "digest_of", lambda path: hangs.wait(60) and "")
    node.settings = CompileCacheSettings(key_file=site[4], wait_s=1.0)
    with node.caches() as caches:
        began = time.monotonic()
        cache = node.open(commit, caches)
        assert time.monotonic() - began < 10
        assert cache.start.artifact is None
        assert any("are ignored" in note and "took more than" in note for note in node.notes), node.notes
        hangs.set()


def test_on_a_disk_that_is_full_an_engine_starts_and_it_is_told(site, node, tmp_path, monkeypatch):
    commit = site[1]
    with node.caches() as caches:
        node.start(commit, {"big": os.urandom(3 << 20)}, caches)
    monkeypatch.setattr("helios.launch.overlay._overlay", lambda lower, place: "the test has it so")
    with small_disk(tmp_path / "disk", 2) as disk:
        small = Node(Home(disk / "home"), node.mount, node.client, key_file=site[4])
        with small.caches() as caches:
            cache = caches.open(node.mount / "org/name" / commit, "cpu", ARGUMENTS, {})
            assert isinstance(cache, LocalCache)
            assert any("No space left" in note for note in small.notes), small.notes
            assert small.left() == []


def test_a_disk_that_fills_up_while_kernels_are_copied_aside_publishes_nothing(site, node, tmp_path):
    commit = site[1]
    with small_disk(tmp_path / "disk", 4) as disk:
        small = Node(Home(disk / "home"), node.mount, node.client, key_file=site[4])
        with small.caches() as caches:
            small.start(commit, {"big": os.urandom(5 << 19)}, caches)
        assert any("not published" in note and "No space left" in note for note in small.notes), small.notes
        assert small.refs() == {}
        assert small.left() == []


def test_a_place_where_nothing_can_be_written_is_told_and_an_engine_starts(site, node, tmp_path):
    commit = site[1]
    home = Home(tmp_path / "home")
    (home.root / "vllm").mkdir(parents=True)
    (home.root / "vllm" / "compiled").write_bytes(b"a file, where a directory ought to be")
    with CompileCaches(home, node.settings, node.client, MountedCommits(node.mount), node.notes.append) as caches:
        cache = caches.open(node.mount / "org/name" / commit, "cpu", ARGUMENTS, {})
    assert isinstance(cache, LocalCache)
    assert any("neither looked for nor published" in note for note in node.notes), node.notes


def test_status_shows_what_a_start_found_and_published_until_it_ends(site, node):
    commit = site[1]
    with node.caches() as caches:
        node.start(commit, {"a": b"1"}, caches)
        cache = node.open(commit, caches)
        (at,) = node.refs().values()
        text = run(node.home, "status").stdout
        assert "compiled kernels of org/name: 1 files, 0.0 MB" in text
        other = node.open(commit, caches, ["--max-model-len", "128"])
        assert "the engine compiles, because nobody has published any" in run(node.home, "status").stdout
        assert cache.start.artifact == at
        for each in (cache, other):
            each.close()
    assert "compiled kernels" not in run(node.home, "status").stdout


def test_a_home_keeps_the_directories_of_eight_keys_and_those_in_use(site, node):
    commit = site[1]
    node.settings = CompileCacheSettings(key_file=site[4], mode="read")
    with node.caches() as caches:
        used = node.open(commit, caches, ["--max-model-len", "1"])
        for size in range(2, 13):
            node.open(commit, caches, ["--max-model-len", str(size)]).close()
        with node.caches():
            left = [path for path in (node.base / "made").iterdir() if path.is_dir()]
        assert len(left) == compile_made.KEPT + 1
        assert Path(used.env["VLLM_CACHE_ROOT"]) in left


def test_a_home_makes_its_secret_once_whole_and_keeps_it_to_itself(tmp_path):
    home = Home(tmp_path)
    (tmp_path / "compile-cache.key.new").write_bytes(b"ab")  # of a start that was killed
    secrets = set()
    threads = [threading.Thread(target=lambda: secrets.add(secret_of(home, CompileCacheSettings()))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(secrets) == 1
    assert os.listdir(tmp_path) == ["compile-cache.key"]
    assert (tmp_path / "compile-cache.key").stat().st_mode & 0o777 == 0o600


def test_a_secret_that_others_may_change_is_refused(site, node, tmp_path):
    commit = site[1]
    key = tmp_path / "key"
    key.write_text("ab" * 32)
    key.chmod(0o666)
    node.settings = CompileCacheSettings(key_file=str(key))
    with node.caches() as caches:
        assert isinstance(caches.open(node.mount / "org/name" / commit, "cpu", ARGUMENTS, {}), LocalCache)
    assert any("can be changed by others" in note for note in node.notes), node.notes


def test_an_error_inside_what_has_a_deadline_is_that_error():
    def run_out():
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        within(5.0, "it", run_out)
