"""The catalog: what is believed for how long, what is asked how often, and what happens when nobody answers."""

import contextlib
import gc
import hashlib
import logging
import time
import tracemalloc
import weakref
from contextlib import closing

import pytest
import trio
import trio.testing

from helios.errors import IntegrityError, RepoNotFound, RevisionNotFound, Unavailable
from helios.names import RepoId
from heliosfs import metadata as metadata_module
from heliosfs import snapshots as snapshots_module
from heliosfs.asking import Patience
from heliosfs.catalog import Catalog
from heliosfs.flights import Flights
from heliosfs.metadata import MetadataClient
from heliosfs.records import Records, SeenCommit
from heliosfs.store.manifest import CommitRecord, FileEntry, Manifest
from heliosfs.tree.source import NAME_TTL_S, UNKNOWN_TTL_S
from tests.fakes.metadata_registry import MetadataRegistry
from tests.support.stores import until

REPO, OTHER = RepoId.parse("org/name"), RepoId.parse("org/other")
C1, C2 = "1" * 40, "2" * 40
ENTRY = FileEntry("0" * 64, 3, "0" * 40, "0" * 64)
PATIENCE = Patience(unknown_s=0.2, known_s=0.1, pause_s=0.1, longest_pause_s=0.1)

pytestmark = pytest.mark.trio


class Registry:
    """A registry in memory: counts calls, can be dead (refuses), slow or silent."""

    def __init__(self):
        self.named = {REPO: {"main": C1}}
        self.manifests = {C1: Manifest({"a": ENTRY}).encode()}
        self.manifests[C2] = Manifest({}).encode()
        self.calls = []
        self.dead = False
        self.delay_s = 0.0

    def _called(self, name, timeout_s):
        self.calls.append(name)
        assert timeout_s > 0
        if self.dead:
            raise Unavailable("connection refused")
        if self.delay_s >= timeout_s:
            time.sleep(timeout_s)
            raise Unavailable("no answer")
        time.sleep(self.delay_s)

    def listing(self, timeout_s):
        self._called("listing", timeout_s)
        return {repo: dict(refs) for repo, refs in self.named.items()}

    def refs(self, repo, timeout_s):
        self._called("refs", timeout_s)
        if repo not in self.named:
            raise RepoNotFound("no such repository")
        return dict(self.named[repo])

    def commit(self, repo, commit, timeout_s):
        self._called("commit", timeout_s)
        if repo not in self.named or commit not in self.manifests:
            raise RevisionNotFound("no such commit")
        digest = Manifest.decode(self.manifests[commit]).digest
        return CommitRecord(str(repo), commit, digest, "me", 1234)

    def manifest(self, repo, commit, timeout_s):
        self._called("manifest", timeout_s)
        return self.manifests[commit]


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def registry():
    return Registry()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def records(tmp_path):
    records = Records(tmp_path / "catalog.db")
    yield records
    records.close()


@pytest.fixture
async def catalog(registry, records, clock, nursery):
    catalog = Catalog(registry, records, patience=PATIENCE, clock=clock)
    await nursery.start(catalog.run)
    return catalog


async def test_refs_are_believed_for_a_second(catalog, registry, clock):
    assert (await catalog.refs(REPO)).value == {"main": C1}
    registry.named[REPO]["main"] = C2
    clock.now += NAME_TTL_S - 0.01
    assert (await catalog.refs(REPO)).value == {"main": C1}
    clock.now += 0.02
    known = await catalog.refs(REPO)
    assert (known.value, known.at) == ({"main": C2}, clock.now)
    assert registry.calls == ["refs", "refs"]


async def test_only_a_fresh_answer_says_that_a_name_does_not_exist(catalog, registry, clock):
    await catalog.repos()
    registry.named[REPO]["new"] = C2
    registry.named[RepoId.parse("late/comer")] = {"main": C1}
    clock.now += 0.01
    assert "new" not in (await catalog.refs(REPO)).value
    assert "new" in (await catalog.refs(REPO, fresh=True)).value
    assert (await catalog.repos(fresh=True)).value.orgs("models") == ["late", "org"]
    registry.dead = True
    clock.now += 0.01
    assert (await catalog.refs(REPO)).value
    with pytest.raises(Unavailable):
        await catalog.refs(REPO, fresh=True)
    with pytest.raises(Unavailable):
        await catalog.repos(fresh=True)


async def test_a_fresh_answer_is_not_one_that_was_asked_for_before(records, registry, clock):
    catalog = Catalog(registry, records, clock=clock)
    registry.delay_s = 0.1

    async def late():
        await trio.sleep(0.05)
        clock.now += 0.05
        registry.named[REPO] = {"new": C2}
        assert "new" in (await catalog.refs(REPO, fresh=True)).value

    async with trio.open_nursery() as nursery:
        nursery.start_soon(catalog.refs, REPO)
        nursery.start_soon(late)
    assert registry.calls == ["refs", "refs"]


async def test_a_listing_answers_for_refs_and_orgs(catalog, registry):
    repos = (await catalog.repos()).value
    assert repos.orgs("models") == ["org"]
    await catalog.refs(REPO)
    await catalog.repos()
    assert registry.calls == ["listing"]


async def test_an_unknown_repository_is_asked_for_again_after_five_seconds(catalog, registry, clock):
    assert (await catalog.refs(OTHER)).value is None
    registry.named[OTHER] = {"main": C2}
    clock.now += UNKNOWN_TTL_S - 0.01
    known = await catalog.refs(OTHER)
    assert known.value is None
    assert known.absent_until == pytest.approx(clock.now + 0.01)
    clock.now += 0.01
    assert (await catalog.refs(OTHER)).value == {"main": C2}


async def test_a_listing_that_shows_a_repository_ends_its_absence(catalog, registry, clock):
    assert (await catalog.refs(OTHER)).value is None
    registry.named[OTHER] = {"main": C2}
    clock.now += 0.1
    await catalog.repos()
    assert (await catalog.refs(OTHER)).value == {"main": C2}


async def test_an_unknown_commit_is_asked_for_again_after_five_seconds(catalog, registry, clock):
    late = "3" * 40
    assert (await catalog.commit_time(REPO, late)).value is None
    registry.manifests[late] = Manifest({}).encode()
    assert (await catalog.snapshot(REPO, late)).value is None
    assert registry.calls == ["commit"]
    clock.now += UNKNOWN_TTL_S
    assert (await catalog.snapshot(REPO, late)).value is not None


async def test_commits_are_asked_for_once(catalog, registry, clock):
    for _ in range(3):
        assert (await catalog.commit_time(REPO, C1)).value == 1234
        snapshot = (await catalog.snapshot(REPO, C1)).value
        assert list(snapshot.files) == ["a"]
        clock.now += 1e6
    assert registry.calls == ["commit", "manifest"]


async def test_whoever_asks_at_the_same_time_shares_one_answer(catalog, registry):
    registry.delay_s = 0.05
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(catalog.refs, REPO)
            nursery.start_soon(catalog.snapshot, REPO, C1)
            nursery.start_soon(catalog.repos)
    assert sorted(registry.calls) == ["commit", "listing", "manifest", "refs"]


async def test_a_cancelled_leader_is_replaced():
    flights = Flights()
    started = []

    async def work():
        started.append(1)
        await trio.sleep(0.05)
        return len(started)

    results = []
    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()

        async def leader():
            with scope:
                results.append(await flights.share("k", work))

        async def follower():
            results.append(await flights.share("k", work))

        nursery.start_soon(leader)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(follower)
        await trio.testing.wait_all_tasks_blocked()
        scope.cancel()
    assert results == [2]


async def test_an_error_is_shared_too():
    flights = Flights()

    async def work():
        await trio.sleep(0.01)
        raise Unavailable("gone")

    async def asker():
        with pytest.raises(Unavailable, match="gone"):
            await flights.share("k", work)

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(asker)


class Heavy:
    """Something that a frame holds."""


async def test_an_error_keeps_nothing_of_the_work_in_memory():
    """Not even until the next collection of cycles, which may be far away where there are many objects."""
    flights = Flights()
    held = []

    async def work():
        heavy = Heavy()
        held.append(weakref.ref(heavy))
        await trio.sleep(0.01)
        raise Unavailable("gone")

    async def asker():
        with contextlib.suppress(Unavailable):
            await flights.share("k", work)

    gc.disable()
    try:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(asker)
        assert len(held) == 1
        assert held[0]() is None
    finally:
        gc.enable()


async def test_without_a_registry_names_keep_their_last_value_and_unknown_ones_are_errors(
    catalog, registry, clock, caplog
):
    await catalog.repos()
    await catalog.snapshot(REPO, C1)
    registry.dead = True
    for _ in range(3):
        clock.now += 10
        assert (await catalog.refs(REPO)).value == {"main": C1}
        assert (await catalog.repos()).value.all() == [REPO]
        assert (await catalog.snapshot(REPO, C1)).value.files
        with pytest.raises(Unavailable):
            await catalog.refs(OTHER)
        with pytest.raises(Unavailable):
            await catalog.commit_time(REPO, C2)
    assert not catalog.answering
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING and "registry" in r.getMessage()]
    assert len(warnings) == 1
    registry.dead = False
    registry.named[REPO]["main"] = C2
    clock.now += 10
    await until(lambda: catalog.answering)
    assert (await catalog.refs(REPO)).value == {"main": C2}


async def test_a_short_break_of_the_registry_is_not_noticed(catalog, registry):
    registry.dead = True

    async def back():
        await trio.sleep(0.07)
        registry.dead = False

    async with trio.open_nursery() as nursery:
        nursery.start_soon(back)
        assert (await catalog.refs(REPO)).value == {"main": C1}


async def test_a_name_with_a_last_value_does_not_wait_for_a_registry_that_is_away(records, registry, nursery):
    """The first look finds out, as fast as that can be seen; later ones ask nobody, whoever else may wait."""
    catalog = Catalog(registry, records, patience=Patience(unknown_s=30.0, known_s=30.0))
    await nursery.start(catalog.run)
    await catalog.repos()
    registry.dead = True
    with trio.fail_after(5):
        await trio.sleep(NAME_TTL_S)
        assert (await catalog.refs(REPO)).value == {"main": C1}, "refused: nobody tries for half a minute"
    registry.dead, registry.delay_s = False, 60.0
    nursery.start_soon(_refused, catalog.refs, OTHER)
    with trio.fail_after(5):
        for _ in range(2):
            await trio.sleep(NAME_TTL_S)
            assert (await catalog.refs(REPO)).value == {"main": C1}
            assert (await catalog.repos()).value.all() == [REPO]
    nursery.cancel_scope.cancel()


async def _refused(call, *args):
    with pytest.raises(Unavailable):
        await call(*args)


@pytest.mark.parametrize("answer", ["a value", "no such repository", "nonsense"])
async def test_a_registry_that_is_back_is_noticed_before_anybody_waits_for_it(catalog, registry, clock, answer):
    """And from then on names are asked for again, and are at most a second old."""
    await catalog.repos()
    registry.dead = True
    clock.now += 10
    assert (await catalog.refs(REPO)).value == {"main": C1}
    assert not catalog.answering
    await trio.sleep(0.2)
    if answer == "nonsense":
        registry.refs = nonsense
    registry.named = {} if answer == "no such repository" else {REPO: {"main": C2}}
    registry.dead = False
    await until(lambda: catalog.answering)
    if answer == "nonsense":
        del registry.refs
    expected = None if answer == "no such repository" else {"main": C2}
    assert (await catalog.refs(REPO)).value == expected


def nonsense(repo, timeout_s):
    raise IntegrityError("the registry's answer is malformed")


async def test_a_short_break_is_nothing_to_tell_and_fails_no_unknown_name(catalog, registry, clock, caplog):
    """A known name saw it first: an unknown one is asked for all the same, until there is an answer."""
    await catalog.repos()
    registry.dead = True
    clock.now += 10
    assert (await catalog.refs(REPO)).value == {"main": C1}

    async def back():
        await trio.sleep(0.07)
        registry.dead = False

    async with trio.open_nursery() as nursery:
        nursery.start_soon(back)
        assert (await catalog.refs(OTHER)).value is None
    assert catalog.answering
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


async def test_who_needs_an_answer_waits_for_one_while_others_do_without(catalog, registry, clock):
    await catalog.repos()
    registry.dead = True
    clock.now += 10

    async def back():
        await trio.sleep(0.04)
        registry.dead = False

    async with trio.open_nursery() as nursery:
        nursery.start_soon(back)
        nursery.start_soon(catalog.refs, REPO)
        assert (await catalog.refs(REPO, fresh=True)).value == {"main": C1}
    assert catalog.answering


async def test_a_silent_registry_costs_the_deadline_once(records, registry):
    registry.delay_s = 60.0
    catalog = Catalog(registry, records, patience=Patience(0.2, 0.1, 30.0, 30.0))
    begin = time.monotonic()
    for _ in range(50):
        with pytest.raises(Unavailable):
            await catalog.refs(REPO)
    assert len(registry.calls) == 1
    assert time.monotonic() - begin < 5


async def test_a_restart_without_a_registry_shows_what_was_seen(catalog, registry, records, clock):
    await catalog.repos()
    await catalog.snapshot(REPO, C1)
    registry.dead = True
    again = Catalog(registry, records, patience=PATIENCE, clock=clock)
    await again.load()
    assert (await again.repos()).value.all() == [REPO]
    clock.now += 1.1
    assert (await again.refs(REPO)).value == {"main": C1}
    assert list((await again.snapshot(REPO, C1)).value.files) == ["a"]
    with pytest.raises(Unavailable):
        await again.snapshot(REPO, C2)


async def test_what_was_seen_before_a_restart_is_asked_for_again(catalog, registry, records, clock):
    await catalog.repos()
    registry.named = {REPO: {"main": C2}}
    again = Catalog(registry, records, patience=PATIENCE, clock=clock)
    await again.load()
    assert (await again.refs(REPO)).value == {"main": C2}


async def test_a_removed_repository_is_gone_with_its_commits(catalog, registry, clock, records):
    await catalog.repos()
    await catalog.snapshot(REPO, C1)
    registry.named.clear()
    clock.now += 1.1
    assert (await catalog.refs(REPO)).value is None
    assert (await catalog.snapshot(REPO, C1)).value is None
    seen = records.load()
    assert not seen.refs
    assert not seen.commits


async def test_a_manifest_that_is_not_the_commits_is_refused(catalog, registry, monkeypatch):
    monkeypatch.setattr(registry, "manifest", lambda *args: registry.manifests[C2])
    with pytest.raises(IntegrityError):
        await catalog.snapshot(REPO, C1)
    monkeypatch.undo()
    assert (await catalog.snapshot(REPO, C1)).value.files


async def test_a_manifest_that_is_too_long_is_refused_and_harms_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(metadata_module, "MAX_MANIFEST", 20_000)
    with MetadataRegistry() as registry, closing(Records(tmp_path / "catalog.db")) as records:
        huge = registry.publish("org/huge", {f"file-{n}": b"" for n in range(100)})
        good = registry.publish("org/good", {f"file-{n}": b"" for n in range(10)})
        with closing(MetadataClient([registry.url])) as client:
            catalog = Catalog(client, records)
            with pytest.raises(IntegrityError, match=r"the manifest of models/org/huge at \w+ can't be used: .* bytes"):
                await catalog.snapshot(RepoId.parse("org/huge"), huge)
            assert len((await catalog.snapshot(RepoId.parse("org/good"), good)).value.files) == 10
            assert catalog.answering


@pytest.mark.parametrize(
    "path", ["{}", "data/part-{:04d}/train-{:07d}-of-0003000.parquet", "{}" + "/d" * 20, "x" * 200 + "{}"]
)
async def test_a_snapshot_takes_no_more_memory_than_is_counted(path):
    files = {
        path.format(n, n): FileEntry(hashlib.sha256(b"%d" % n).hexdigest(), n, f"{n:040x}", f"{n:064x}", n % 2 > 0)
        for n in range(3000)
    }
    data = Manifest(files).encode()
    record = SeenCommit(REPO, C1, Manifest(files).digest, 1)
    del files
    tracemalloc.start()
    try:
        held = snapshots_module.build(record, data)
        assert len(held.snapshot.by_etag) == 3000
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken <= held.cost


async def test_a_short_manifest_of_very_many_directories_is_refused(catalog, registry, monkeypatch):
    monkeypatch.setattr(snapshots_module, "MAX_DIRECTORY_BYTES", 1 << 20)
    deep = {f"{n}/" + "d/" * 300 + "file": ENTRY for n in range(10)}
    registry.manifests[C2] = Manifest(deep).encode()
    for _ in range(3):
        with pytest.raises(IntegrityError, match="too many directories"):
            await catalog.snapshot(REPO, C2)
    assert registry.calls.count("manifest") == 1, "it will not be another one the next time"
    assert (await catalog.snapshot(REPO, C1)).value.files


async def test_seen_commits_are_those_of_refs_and_those_looked_up(catalog):
    assert (await catalog.seen(REPO)).value == (C1,)
    await catalog.snapshot(REPO, C2)
    assert set((await catalog.seen(REPO)).value) == {C1, C2}


async def test_snapshots_in_memory_are_bounded(catalog, registry, monkeypatch):
    record = len(Manifest({f"{0:040x}-{i}": ENTRY for i in range(4)}).encode())
    monkeypatch.setattr(snapshots_module, "SNAPSHOT_BYTES", 3 * snapshots_module.INFLATION * record - 1)
    commits = [f"{n:040x}" for n in range(5, 15)]
    for commit in commits:
        registry.manifests[commit] = Manifest({f"{commit}-{i}": ENTRY for i in range(4)}).encode()
        await catalog.snapshot(REPO, commit)
    assert len(catalog._snapshots) == 2
    assert len((await catalog.snapshot(REPO, commits[0])).value.files) == 4
    assert registry.calls.count("manifest") == len(commits), "dropped ones come back from the disk"
