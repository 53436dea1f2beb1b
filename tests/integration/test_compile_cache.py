"""Compiled kernels travel with the model: a real registry and real mounts; the engine is an HTTP server that counts."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from helios.config import CompileCacheSettings
from helios.home import Home
from helios.launch import compile_cache, compile_publish, overlay
from helios.launch.compile_artifact import Entry, Index, seal
from helios.launch.compile_cache import CompileCaches
from helios.launch.compile_commits import MountedCommits
from helios.launch.compile_key import REFS
from helios.publish import LocalFile, publish
from tests.conftest import Helios
from tests.support.compiled import ARGUMENTS, REPO, Engine, Node, Pod
from tests.support.mounts import mounted, push, write
from tests.support.registry import running_registry

pytestmark = pytest.mark.fuse


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    base = tmp_path_factory.mktemp("compiled")
    home = Home(base / "one")
    with running_registry(Helios({"HELIOS_HOME": str(home.root)})) as registry:
        commit = push(home, write(base / "model", {"config.json": b"{}"}), "org/name")
        key = base / "key"
        key.write_text("ab" * 32)
        with mounted(home, base / "one/mnt") as mount:
            two = Home(base / "two")
            with mounted(two, base / "two/mnt", HELIOS_REGISTRY__URLS=registry.url) as other:
                yield base, registry, commit, (home, mount.path), (two, other.path), str(key)


@pytest.fixture
def nodes(site, monkeypatch):
    monkeypatch.setattr(compile_publish, "QUIET_S", 0.0)
    monkeypatch.setattr(compile_cache, "POLL_S", 0.05)
    _, registry, commit, one, two, key = site
    node = Node(*one, registry.client(), key_file=key)
    for ref in node.refs():
        node.client.delete(REPO, ref)
    for each in (one, two):
        shutil.rmtree(each[0].root / "vllm", ignore_errors=True)
    other = Node(*two, registry.client(), key_file=key)
    yield commit, node, other
    node.client.close()
    other.client.close()


def test_what_one_node_compiles_another_finds_and_adds_to(nodes):
    commit, one, two = nodes
    with one.caches() as caches:
        found, model = one.start(commit, {"torch_compile_cache/a/model": b"kernel", "x.lock": b"1"}, caches)
    assert found == {}
    (first,) = one.refs().values()
    with two.caches() as caches:
        found, there = two.start(commit, {}, caches)
        assert found == {"torch_compile_cache/a/model": b"kernel"}
        assert there == model, "vLLM hashes the name by which it was told of the model"
        assert list(two.refs().values()) == [first], "nothing new, nothing published"
        found, _ = two.start(commit, {"torch_compile_cache/a/model": b"better", "b": b"more"}, caches)
    assert os.listdir(two.home.root / "vllm/compiled/views") == []
    with one.caches() as caches:
        found, _ = one.start(commit, {}, caches)
    assert found == {"torch_compile_cache/a/model": b"better", "b": b"more"}
    assert sum("are published" in note for note in [*one.notes, *two.notes]) == 2, [*one.notes, *two.notes]


def test_a_pod_without_a_mount_finds_what_nodes_compiled_and_adds_to_it(nodes, site, tmp_path):
    commit, node, _ = nodes
    pod = Pod(tmp_path / "pod", commit, site[1].client(), site[1].url, key_file=site[-1])
    with pod.caches() as caches:
        found, model = pod.start(commit, {"a/kernel": b"1"}, caches)
        assert found == {}
    with node.caches() as caches:
        found, there = node.start(commit, {"b": b"2"}, caches)
        assert (found, there) == ({"a/kernel": b"1"}, model)
    other = Pod(tmp_path / "other", commit, site[1].client(), site[1].url, key_file=site[-1])
    with other.caches() as caches:
        assert other.start(commit, {"c": b"3"}, caches)[0] == {"a/kernel": b"1", "b": b"2"}
        assert other.start(commit, {}, caches)[0] == {"a/kernel": b"1", "b": b"2", "c": b"3"}
    fetched = other.home.root / "vllm/compiled/fetched"
    (last,) = node.refs().values()
    assert (fetched / last / "c").read_bytes() == b"3"

    (fetched / last / "c").write_bytes(b"4")
    with other.caches() as caches:
        cache = caches.open(other.path(commit), "cpu", ARGUMENTS, {})
        assert not (Path(cache.env["VLLM_CACHE_ROOT"]) / "c").exists(), "nothing that is wrong is run"
    assert any("are ignored" in note for note in other.notes)
    with other.caches() as caches:
        assert other.start(commit, {}, caches)[0].keys() == {"a/kernel", "b", "c"}, "it is fetched again"
        assert [path.name for path in fetched.iterdir() if path.is_dir()] == [last]
    for one in (pod, other):
        one.client.close()


def test_it_is_the_same_where_no_overlayfs_can_be_mounted(nodes, monkeypatch):
    monkeypatch.setattr(overlay, "_overlay", lambda lower, place: "an overlayfs can't be mounted: no")
    commit, one, _ = nodes
    with one.caches() as caches:
        one.start(commit, {"a": b"1"}, caches)
        one.start(commit, {"a": b"2"}, caches)
        found, _ = one.start(commit, {}, caches)
    assert found == {"a": b"2"}
    assert any("copied, because an overlayfs can't be mounted" in note for note in one.notes)


def test_other_arguments_have_an_artifact_of_their_own(nodes):
    commit, one, _ = nodes
    with one.caches() as caches:
        one.start(commit, {"a": b"1"}, caches)
        found, _ = one.start(commit, {"b": b"1"}, caches, ["--max-model-len", "128"])
    assert found == {}
    assert len(one.refs()) == 2


def test_a_node_with_another_secret_neither_uses_nor_replaces_it(nodes, tmp_path):
    commit, one, two = nodes
    with one.caches() as caches:
        one.start(commit, {"a": b"1"}, caches)
    before = one.refs()
    (tmp_path / "key").write_text("cd" * 32)
    two.settings = CompileCacheSettings(key_file=str(tmp_path / "key"))
    with two.caches() as caches:
        assert two.start(commit, {"a": b"2"}, caches)[0] == {}
    assert before.items() <= two.refs().items()


@pytest.mark.parametrize("bad", ["forged", "unlisted", "no index"])
def test_a_foreign_or_damaged_artifact_is_told_ignored_and_replaced(nodes, tmp_path, bad):
    commit, one, _ = nodes
    with one.caches() as caches:
        one.start(commit, {"a": b"1"}, caches)
        (ref,) = one.refs()
        facts = json.loads((one.mount / "org/name" / one.refs()[ref] / "index").read_bytes().partition(b"\n")[2])[
            "facts"
        ]
        secret = bytes.fromhex("00" * 32 if bad == "forged" else "ab" * 32)
        content = {"index": seal(Index(facts, {"b": Entry("0" * 64, 4)}), secret), "files/evil.so": b"evil"}
        if bad == "no index":
            del content["index"]
        write(tmp_path, content)
        files = [LocalFile(path, tmp_path / path, len(data), False) for path, data in content.items()]
        publish(one.client, tmp_path, REPO, ref, files=files)
        (one.home.root / "vllm/compiled/made" / ref.removeprefix(REFS) / "a").unlink()
        found, _ = one.start(commit, {"a": b"2"}, caches)
        assert "files/evil.so" not in found
        assert "evil.so" not in found
        assert any("are ignored" in note for note in one.notes), one.notes
        assert one.start(commit, {}, caches)[0] == {"a": b"2"}


def test_nothing_is_published_before_a_request_was_answered_nor_in_read_mode(nodes):
    commit, one, _ = nodes
    with one.caches() as caches:
        cache = caches.open(one.mount / "org/name" / commit, "cpu", ARGUMENTS, {})
        write(Path(cache.env["VLLM_CACHE_ROOT"]), {"a": b"1"})
        engine = Engine()
        cache.watch(engine, engine.url)
        time.sleep(0.5)
        engine.end()
    one.settings = CompileCacheSettings(key_file=one.settings.key_file, mode="read")
    with one.caches() as caches:
        one.start(commit, {"a": b"2"}, caches)
    assert one.refs() == {}


def test_more_than_may_be_published_is_not_and_is_told(nodes):
    commit, one, _ = nodes
    one.settings = CompileCacheSettings(key_file=one.settings.key_file, limit_mib=1)
    with one.caches() as caches:
        one.start(commit, {"a": b"x" * (1 << 20) + b"x"}, caches)
    assert one.refs() == {}
    assert any("limit_mib" in note for note in one.notes)
    with one.caches() as caches:
        assert one.start(commit, {}, caches)[0].keys() == {"a"}, "this node keeps it for itself"


def test_without_the_registry_an_engine_starts_as_ever(nodes):
    commit, one, _ = nodes

    class Away:
        def resolve(self, *_):
            raise OSError("the registry is away")

    with CompileCaches(one.home, one.settings, Away(), MountedCommits(one.mount), one.notes.append) as caches:
        cache = caches.open(one.mount / "org/name" / commit, "cpu", ARGUMENTS, {})
    assert cache.model == str(one.mount / "org/name" / commit)
    assert cache.directory is None
    assert any("the registry is away" in note for note in one.notes)
