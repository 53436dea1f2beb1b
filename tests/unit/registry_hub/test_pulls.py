"""The pulls of a registry in one process: sharing, limits, housekeeping, signs of life."""

import asyncio
import contextlib
import json
import os
import threading
import time
from functools import partial

import pytest

from helios.config import RegistrySettings
from helios.errors import NoSpace, Unavailable
from helios.metrics import RegistryMetrics
from helios.names import RepoId
from heliosfs.store.directory import DirectoryStore
from registry.api import watching
from registry.catalog import Catalog
from registry.ingest.ingest import Ingest
from registry.metadata.database import Changes
from registry.metadata.mirror_tables import downloads
from registry.metadata.tables import processes
from registry.pull import pulls as pulls_module
from registry.pull import retry
from registry.pull.downloads import Downloads
from registry.pull.flights import SLACK, Flights
from registry.pull.pull import Puller
from registry.pull.pulls import Pull, Pulls
from registry.pull.setup import free_on, kept_blobs, make_pulling
from registry.pull.spool import KEEP_S, Spool
from registry.pull.upstream import Upstream as Client
from registry.sessions import Sessions
from tests.support.postgres import open_database
from tests.support.upstream import Fault, Upstream

REPO = RepoId.parse("org/m")
FILES = {"config.json": b"{}", "a.bin": os.urandom(1_500_000), "b.bin": os.urandom(1_000_000)}


class Parts:
    """Everything under a registry's routes, on one directory; ``again`` is what a restart after a kill makes of it."""

    def __init__(self, root, url: str, stack: contextlib.ExitStack, engine_url: str | None) -> None:
        self.root, self.url, self.stack = root, url, stack
        self.store = DirectoryStore(root / "store")
        stack.callback(self.store.close)
        self.database = open_database(root / "metadata.db", engine_url)
        stack.callback(self.database.close)
        self.catalog = Catalog(self.database, self.store)
        self.spool = Spool(root / "pulls")
        ingest = Ingest(self.store, self.catalog.index)
        self.sessions = Sessions(self.catalog, self.store, ingest, partial(kept_blobs, self.catalog))
        self.metrics = RegistryMetrics()

    def make(self, **settings) -> Pulls:
        made = make_pulling(
            RegistrySettings(upstream=self.url, pull_stall_s=1.0, **settings),
            {},
            self.catalog,
            self.store,
            self.sessions,
            self.spool,
            self.metrics,
        )
        self.stack.callback(made.close)
        return made.pulls

    def leases_end(self) -> None:
        """As others see it that share the database, when a process has been dead for a while."""
        with self.database.write(changes=Changes.NOTHING) as connection:
            connection.execute(processes.update().values(expires=0.0))

    def objects(self, kind: str = "blobs") -> set[str]:
        return {info.key.rpartition("/")[2] for info in self.store.list(f"public/{kind}/")}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_DELAY_S", 0.01)


@pytest.fixture
def hub():
    with Upstream() as found:
        yield found
        assert found.violations == []


@pytest.fixture
def parts(hub, tmp_path, engine_url):
    with contextlib.ExitStack() as stack:
        yield Parts(tmp_path, hub.url, stack, engine_url)


def finish(pull: Pull) -> str:
    assert pull.finished.wait(30)
    if pull.error is not None:
        raise pull.error
    return pull.commit


def result_count(parts: Parts, result: str) -> float:
    return parts.metrics.pulls.labels(result)._value.get()


def test_one_pull_for_all_who_ask_for_the_same(hub, parts):
    commit = hub.commit("org/m", FILES)
    hub.bytes_per_s = 4_000_000
    pulls = parts.make()
    first = pulls.start(REPO, "main")
    assert pulls.start(REPO, "main") is first
    hub.move("org/m", "v1", commit)
    other = pulls.start(REPO, "v1")
    assert finish(first) == finish(other) == commit
    assert parts.catalog.refs(REPO) == {"main": commit, "v1": commit}
    assert len(hub.requests("/resolve/")) == len(FILES)
    again = pulls.start(REPO, "main")
    assert again is not first
    assert finish(again) == commit
    assert result_count(parts, "done") == 3


def test_a_follower_fails_with_its_leader(hub, parts):
    commit = hub.commit("org/m", FILES)
    hub.move("org/m", "v1", commit)
    hub.faults = [Fault("/resolve/.*b.bin", status=418, delay_s=0.5, times=-1)]
    pulls = parts.make()
    both = [pulls.start(REPO, "main"), pulls.start(REPO, "v1")]
    for pull in both:
        with pytest.raises(Unavailable, match="status 418"):
            finish(pull)
    assert len(hub.requests("b.bin")) == 1
    assert result_count(parts, "failed") == 2
    hub.faults = []
    assert finish(pulls.start(REPO, "v1")) == commit


def test_too_many_and_too_late(hub, parts, monkeypatch):
    hub.commit("org/m", FILES)
    hub.faults = [Fault("/api/", delay_s=1)]
    monkeypatch.setattr(pulls_module, "MOST", 1)
    pulls = parts.make()
    first = pulls.start(REPO, "main")
    with pytest.raises(Unavailable, match="1 pulls are under way"):
        pulls.start(REPO, "v1")
    finish(first)
    pulls.close()
    with pytest.raises(Unavailable, match="stopping"):
        pulls.start(REPO, "main")


def test_pulls_wait_for_their_turn_and_can_be_stopped_there(hub, parts, monkeypatch):
    hub.commit("org/m", FILES)
    hub.faults = [Fault("/api/", delay_s=2, times=-1)]
    monkeypatch.setattr(pulls_module, "AT_A_TIME", 1)
    pulls = parts.make()
    waiting = [pulls.start(REPO, "main"), pulls.start(REPO, "v1")]
    time.sleep(0.2)
    pulls.close(0.5)
    for pull in waiting:
        with pytest.raises(Unavailable, match="stopped"):
            finish(pull)
    assert len(hub.requests("^/api/models")) == 1
    for thread in threading.enumerate():  # one was given up, and still uses the database
        if thread.name == f"pull {REPO.id}":
            thread.join(30)


@pytest.mark.parametrize(
    ("free", "says"),
    [
        ({"both": 4_999_999 + SLACK}, "the object store and downloads"),
        ({"spool": 10**12, "store": 2_000_000}, "the object store"),
        ({"spool": 2_000_000, "store": 10**12}, "downloads"),
    ],
)
def test_space_is_counted_before_the_download(hub, parts, free, says):
    """2,500,002 bytes in the store, and as much in the spool while they are on their way."""
    free = dict(free)
    hub.commit("org/m", FILES)
    client = Client(hub.url, stall_s=1)
    parts.stack.callback(client.close)
    flights = Flights(
        client, parts.database, parts.sessions, parts.spool, connections=8, finish=True, free_bytes=lambda: free
    )
    parts.stack.callback(flights.close)
    puller = Puller(parts.catalog, parts.sessions, parts.spool, flights, client.endpoint, files=4)
    housekeeping = Downloads(parts.database, parts.sessions, parts.spool, flights, keep_s=0.0)
    pulls = Pulls(parts.catalog, housekeeping, client, puller, parts.metrics)
    with pytest.raises(NoSpace) as caught:
        finish(pulls.start(REPO, "main"))
    assert f"bytes for {says}, but only {next(v for v in free.values() if v < 10**12)} are free" in caught.value.message
    assert hub.requests("/resolve/") == []
    free |= dict.fromkeys(free, 5000100 + SLACK)
    assert finish(pulls.start(REPO, "main"))
    pulls.close()


def test_disks_are_told_apart(tmp_path):
    assert free_on(tmp_path, tmp_path).keys() == {"both"}
    if os.stat("/dev/shm").st_dev != os.stat(tmp_path).st_dev:
        from pathlib import Path

        assert free_on(tmp_path, Path("/dev/shm")).keys() == {"spool", "store"}


def test_a_newer_pull_replaces_what_an_older_one_left(hub, parts):
    """A pull fails with a.bin stored; then the branch is forced to a commit without it: a.bin goes with its success."""
    hub.commit("org/m", FILES)
    hub.faults = [Fault("b.bin", status=418, times=-1, delay_s=0.5)]
    parts.catalog.lease_s = 0.0  # nobody was told where it lies
    pulls = parts.make(pull_files=1)
    with pytest.raises(Unavailable):
        finish(pulls.start(REPO, "main"))
    (stored,) = parts.objects()
    assert parts.sessions.clean() == 0
    assert parts.objects() == {stored}, "kept for the next attempt"
    hub.faults = []
    new = hub.commit("org/m", {"config.json": b"{}", "c.bin": FILES["b.bin"]})
    assert finish(pulls.start(REPO, "main")) == new
    parts.sessions.clean()
    assert stored not in parts.objects()
    assert kept_blobs(parts.catalog) == set()


def test_a_restart_keeps_what_an_unfinished_pull_stored_until_it_expires(hub, tmp_path, engine_url):
    hub.commit("org/m", FILES)
    with contextlib.ExitStack() as stack:
        parts = Parts(tmp_path, hub.url, stack, engine_url)
        hub.faults = [Fault("b.bin", status=418, times=-1)]
        with pytest.raises(Unavailable):
            finish(parts.make(pull_files=1).start(REPO, "main"))
        parts.sessions.open(RepoId.parse("org/m"))  # as if it had been killed: its row stays
        parts.leases_end()
    (stored,) = parts.objects()
    with contextlib.ExitStack() as stack:
        parts = Parts(tmp_path, hub.url, stack, engine_url)
        parts.sessions.recover()
        parts.make()
        assert parts.objects() == {stored}
        with parts.database.write() as connection:
            connection.execute(downloads.update().values(time=int(time.time() - KEEP_S - 60)))
        parts.leases_end()
    with contextlib.ExitStack() as stack:
        parts = Parts(tmp_path, hub.url, stack, engine_url)
        parts.catalog.lease_s = 0.0
        parts.sessions.recover()
        parts.make()
        assert parts.sessions.clean() > 0
        assert parts.objects() == set()


def collect(pull: Pull) -> list[dict]:
    async def run() -> list[dict]:
        return [event async for event in watching.events(pull)]

    return asyncio.run(run())


def test_signs_of_life(hub, parts, monkeypatch):
    monkeypatch.setattr(watching, "HEARTBEAT_S", 0.1)
    hub.commit("org/m", FILES)
    hub.faults = [Fault("/revision/", delay_s=0.5), Fault("^/repos/", delay_s=0.5)]
    events = collect(parts.make(pull_files=1).start(REPO, "main"))
    assert any(e == {"event": "log", "message": "waiting for the other side"} for e in events)
    assert events.count({"event": "progress", "path": "a.bin", "done": 0, "total": 1_500_000}) > 1
    assert events[-1]["event"] == "done"
    json.dumps(events)


def test_an_error_is_the_last_event(hub, parts):
    events = collect(parts.make().start(REPO, "main"))
    error = events[-1]["error"]
    assert events[-1]["event"] == "error"
    assert error["code"] == "RepoNotFound"
    assert "private" in error["hint"]


def test_what_nobody_expected_ends_the_pull_and_is_logged(hub, parts, monkeypatch, expected_log_errors):
    expected_log_errors("a pull broke")
    monkeypatch.setattr(Puller, "bring", lambda *args: 1 / 0)
    hub.commit("org/m", FILES)
    pulls = parts.make()
    events = collect(pulls.start(REPO, "main"))
    assert "ZeroDivisionError" in events[-1]["error"]["message"]
    monkeypatch.undo()
    assert finish(pulls.start(REPO, "main"))


def test_of_pulls_that_wait_those_that_matter_most_go_first(hub, parts, monkeypatch):
    monkeypatch.setattr(pulls_module, "AT_A_TIME", 1)
    names = ("org/busy", "org/scratch", "org/first", "org/second", "org/critical")
    for name in names:
        hub.commit(name, {"a.txt": name.encode()})
    parts.catalog.priorities.put(RepoId.parse("org/scratch"), None, "scratch", "")
    hub.faults = [Fault("busy", delay_s=1.0)]
    pulls, order = parts.make(), []
    pulls.listen(lambda pull: order.append(pull.repo.id))
    started = []
    for name in names:
        started.append(pulls.start(RepoId.parse(name), "main"))
        end = time.monotonic() + 10
        while len(pulls._turns._waiting) < len(started) - 1 and time.monotonic() < end:
            time.sleep(0.005)
    parts.catalog.priorities.put(RepoId.parse("org/critical"), "main", "critical", "")  # while it waits
    for pull in started:
        finish(pull)
    assert order == ["org/busy", "org/critical", "org/first", "org/second", "org/scratch"]
