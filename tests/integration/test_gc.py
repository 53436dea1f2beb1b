"""Garbage collection, verification and repair with real registries, while people work and processes are killed."""

import contextlib
import hashlib
import http.client
import json
import random
import shutil
import threading
import time
import urllib.error
import urllib.request

import pytest

from helios.errors import HeliosError
from helios.names import RepoId
from helios.publish import publish
from heliosfs.store.keys import blob_key
from tests.support.command import Command
from tests.support.damage import flip
from tests.support.ingest import seeded
from tests.support.mounts import write
from tests.support.registry import running_registry
from tests.support.upstream import Upstream

pytestmark = pytest.mark.both_databases

MIB = 1 << 20
REPOS = [RepoId.parse("org/a"), RepoId.parse("org/b")]
AT_ONCE = {
    "HELIOS_REGISTRY__KEEP_HISTORY": "false",
    "HELIOS_REGISTRY__KEEP_COMMITS_S": "0",
    "HELIOS_REGISTRY__GC_GRACE_S": "0.5",
    "HELIOS_REGISTRY__GC_EVERY_S": "0",
    "HELIOS_REGISTRY__LEASE_S": "2",
}
"""Everything goes as soon as it may, so that all of it happens within a short test."""


def get(registry, repo, path, rev="main"):
    with urllib.request.urlopen(f"{registry.url}/{repo.id}/resolve/{rev}/{path}", timeout=30) as answer:
        return answer.read()


def last(events):
    return list(events)[-1]


def collect(registry, **options):
    with contextlib.closing(registry.client()) as client:
        return last(client.collect(dry_run=False, timeout_s=60, **options))


def verify(registry):
    with contextlib.closing(registry.client()) as client:
        return last(client.verify(None, 1.0, repair=False, timeout_s=60))


class Site:
    """People at work: each repository is published again and again, with chunks of what was there before, and read."""

    def __init__(self, directory):
        self.directory, self.registry = directory, None
        self.stop, self.errors = threading.Event(), []
        self.reads = self.pushes = self.collections = 0
        self.up = threading.Lock()  # held while the registry is down
        self.sent = {repo: set() for repo in REPOS}

    def work(self, action):
        try:
            while not self.stop.is_set():
                registry = self.registry
                try:
                    action(registry)
                except (HeliosError, OSError, http.client.HTTPException) as error:
                    # It is held from before a kill: connections break long before the process is gone.
                    if registry is self.registry and not self.up.locked() and not self.stop.is_set():
                        raise AssertionError(f"{action.__name__}: {error!r}") from error
                    with self.up:
                        pass
        except BaseException as error:
            self.errors.append(error)

    def push(self, number):
        rng = random.Random(number)
        repo = REPOS[number]

        def pushing(registry):
            blocks = [seeded(4 * MIB, rng.randrange(6)) for _ in range(rng.randrange(1, 4))]
            data = b"".join(blocks)
            self.sent[repo].add(data)
            directory = write(self.directory / f"push-{number}", {"model.bin": data})
            with contextlib.closing(registry.client()) as client:
                publish(client, directory, repo, "main")
            self.pushes += 1

        return pushing

    def read(self, registry):
        for repo in REPOS:
            try:
                data = get(registry, repo, "model.bin")
            except urllib.error.HTTPError as error:
                if error.code != 404 or self.pushes > 4:
                    raise
                continue  # nothing has been published yet
            assert data in self.sent[repo]
            self.reads += 1

    def collect(self, registry):
        report = collect(registry)
        assert report["problems"] == []
        self.collections += 1
        time.sleep(0.05)


@pytest.mark.one_database
def test_collections_beside_pushes_reads_and_kills(tmp_path):
    """On PostgreSQL, where what a killed process did is its own until its lease is over: test_registry_kills.py."""
    helios = Command(tmp_path / "home", **AT_ONCE)
    site = Site(tmp_path)
    threads = []
    try:
        for life in range(3):
            with running_registry(helios) as registry:
                site.registry = registry
                if not threads:
                    actions = [site.push(0), site.push(1), site.read, site.collect]
                    threads = [threading.Thread(target=site.work, args=(action,)) for action in actions]
                    for thread in threads:
                        thread.start()
                else:
                    site.up.release()
                time.sleep(2.0)
                site.up.acquire()
                if life == 2:
                    site.stop.set()
                    site.up.release()
                    for thread in threads:
                        thread.join(60)
                registry.kill()
    finally:
        site.stop.set()
        if site.up.locked():
            site.up.release()
        for thread in threads:
            thread.join(60)
    assert site.errors == []
    assert min(site.reads, site.pushes, site.collections) > 3
    with running_registry(helios) as registry:
        report = collect(registry)
        for _ in range(4):
            time.sleep(1.6)
            report = collect(registry)
        assert (report["commits"], report["condemned_commits"], report["condemned_blobs"]) == (2, 0, 0)
        assert report["waiting_objects"] == 0
        found = verify(registry)
        assert (found["damaged"], found["stray_objects"]) == (0, 0)
        for repo in REPOS:
            assert get(registry, repo, "model.bin") in site.sent[repo]
        with contextlib.closing(registry.client()) as client:
            usages = client.usages()
        assert sum(row["stored"] for row in usages["repos"]) == pytest.approx(usages["total"]["stored"], abs=4)
        assert usages["unheld"] <= 2


def test_a_lease_over_http_keeps_what_a_collection_would_take(tmp_path, databases):
    helios = Command(tmp_path / "home", **AT_ONCE, **databases())
    repo = REPOS[0]
    with running_registry(helios) as registry, contextlib.closing(registry.client()) as client:
        old = publish(client, write(tmp_path / "1", {"a": b"old"}), repo, "main").commit
        publish(client, write(tmp_path / "2", {"a": b"new"}), repo, "main")
        assert client.lease("node-1", repo, old, 60) > time.time()
        for _ in range(3):
            collect(registry)
            time.sleep(0.6)
        assert get(registry, repo, "a", old) == b"old"
        plan = json.loads(helios("gc", "--dry-run", "--json", "--registry", registry.url))
        assert (plan["kept_pinned"], plan["removed_commits"]) == (1, 0)
        client.lease("node-1", repo, old, 0)
        time.sleep(1.1)  # it was in use until now, to the second
        assert "1 commits" in helios("gc", "--dry-run", "--registry", registry.url)
        for _ in range(3):
            collect(registry)
            time.sleep(0.6)
        with pytest.raises(urllib.error.HTTPError):
            get(registry, repo, "a", old)
        table = helios("usage", "--registry", registry.url)
        assert "org/a" in table
        assert "total" in table


def test_a_damaged_chunk_comes_back_from_a_peer(tmp_path, databases):
    data = seeded(9 * MIB, 1)
    core = Command(tmp_path / "core", **databases())
    with running_registry(core) as origin:
        with contextlib.closing(origin.client()) as client:
            blob = publish_one(client, tmp_path, data)
        peers = json.dumps([{"name": "core", "url": origin.url}])
        edge = Command(tmp_path / "edge", HELIOS_REGISTRY__PEERS=peers, **databases())
        with running_registry(edge) as registry:
            edge("replicate", "core", "--registry", registry.url)
            flip(tmp_path / "edge" / "store" / blob_key("public", blob), 5 * MIB)
            out, _ = edge.both("store", "verify", "--registry", registry.url, code=1)
            assert out.count("wrong bytes") == 1
            done = json.loads(edge("store", "verify", "--repair", "--json", "--registry", registry.url))
            assert (done["repaired"]["peers"], done["repaired"]["failed"]) == (1, 0)
            assert verify(registry)["damaged"] == 0
            assert get(registry, REPOS[0], "model.bin") == data


def test_a_damaged_chunk_and_a_lost_object_come_back_from_the_upstream(tmp_path, databases):
    data, other = seeded(9 * MIB, 2), seeded(5 * MIB, 3)
    with Upstream() as hub:
        hub.commit("org/a", {"model.bin": data, "other.bin": other})
        helios = Command(tmp_path / "home", HELIOS_REGISTRY__UPSTREAM=hub.url, **databases())
        with running_registry(helios) as registry:
            helios("pull", "org/a", "--registry", registry.url)
            paths = [p for p in (tmp_path / "home" / "store" / "public" / "blobs").rglob("*") if p.is_file()]
            whole = next(p for p in paths if p.stat().st_size == len(data))
            flip(whole, 5)
            next(p for p in paths if p.stat().st_size == len(other)).unlink()
            done = json.loads(helios("store", "verify", "--repair", "--json", "--registry", registry.url))
            assert (done["repaired"]["upstream"], done["repaired"]["failed"]) == (3, 0)
            assert verify(registry)["damaged"] == 0
            assert get(registry, REPOS[0], "model.bin") == data
            assert get(registry, REPOS[0], "other.bin") == other
        assert hub.violations == []


def publish_one(client, directory, data):
    source = write(directory / "source", {"model.bin": data})
    publish(client, source, REPOS[0], "main")
    shutil.rmtree(source)
    return hashlib.sha256(data).hexdigest()
