"""Making volumes: pinned once, the same for everybody who asks for the same, refused to everybody else."""

import threading

import pytest
import trio
import trio.testing

from helios.errors import (
    Conflict,
    DeadlineExceeded,
    IntegrityError,
    InvalidInput,
    NoSpace,
    NotFound,
    RepoNotFound,
    RevisionNotFound,
    Unavailable,
)
from helios.names import RepoId
from heliosfs.catalog import Catalog, Patience
from heliosfs.records import Records
from heliosfs.store.manifest import CommitRecord, FileEntry, Manifest
from heliosfs.tree.snapshot import Snapshot
from heliosfs.tree.source import Known
from heliosfs.volumes.files import VolumeFiles
from heliosfs.volumes.service import Usage, Volumes

pytestmark = pytest.mark.trio

REPO, OTHER = RepoId.parse("org/name"), RepoId.parse("org/other")
C1, C2 = "1" * 40, "2" * 40


def entry(number):
    return FileEntry(f"{number:064x}", 10, f"{number:040x}", "f" * 64)


FILES = {C1: {"a": entry(1)}, C2: {"b": entry(2)}}


class Registry:
    """A tree source in memory. ``gate``, if set, holds snapshots back; ``silent``: nobody can say what is fresh."""

    def __init__(self):
        self.named = {REPO: {"main": C1, "v1": C1}, OTHER: {"main": C2}}
        self.gate = None
        self.silent = False
        self.asked = 0

    async def refs(self, repo, *, fresh=False):
        self.asked += 1
        await trio.lowlevel.checkpoint()
        if fresh and self.silent:
            raise Unavailable("the registry does not answer")
        return Known(self.named.get(repo) and dict(self.named[repo]), 0.0)

    async def snapshot(self, repo, commit):
        self.asked += 1
        await trio.lowlevel.checkpoint()
        if self.gate is not None:
            await self.gate.wait()
        known = repo in self.named and commit in FILES
        return Known(Snapshot(repo, commit, 1234, FILES[commit]) if known else None, 0.0)


@pytest.fixture
def registry():
    return Registry()


@pytest.fixture
def volumes(tmp_path):
    return started(tmp_path)


def started(tmp_path, **settings):
    """A service whose files are loaded: as in a daemon that just started."""
    volumes = Volumes(VolumeFiles(tmp_path / "volumes"), now=lambda: 99.5, **settings)
    trio.run(volumes.load)
    return volumes


def restarted(tmp_path, **settings):
    """The same, from within a running loop."""
    out = []
    thread = threading.Thread(target=lambda: out.append(started(tmp_path, **settings)))
    thread.start()
    thread.join()
    return out[0]


async def test_a_volume_pins_what_the_revision_names(volumes, registry):
    record, new = await volumes.create("pvc-1", REPO, "v1", registry)
    assert new
    assert (record.repo, record.commit, record.revision) == ("models/org/name", C1, "v1")
    assert record.refs == {"v1": C1, "main": C1}
    assert (record.time, record.created) == (1234, 99)
    assert record.manifest == Manifest(FILES[C1]).digest
    assert volumes.get("pvc-1") == record
    assert volumes.known().value == {"pvc-1": record}


async def test_a_commit_can_be_asked_for_too(volumes, registry):
    record, _ = await volumes.create("v", REPO, C2, registry)
    assert (record.commit, record.refs) == (C2, {"main": C2})


async def test_a_commit_can_be_pinned_under_a_name_that_has_moved_on(volumes, registry):
    registry.named[REPO]["v1"] = C2
    record, new = await volumes.create("v", REPO, "v1", registry, commit=C1)
    assert new
    assert (record.commit, record.revision, record.refs) == (C1, "v1", {"v1": C1, "main": C1})
    assert await volumes.create("v", REPO, "v1", registry, commit=C1) == (record, False)
    assert await volumes.create("v", REPO, "v1", registry) == (record, False)
    with pytest.raises(Conflict, match=f"at {C1}, not .* at {C2}"):
        await volumes.create("v", REPO, "v1", registry, commit=C2)


@pytest.mark.parametrize(("revision", "commit"), [("v1", "main"), ("v1", C1[:39]), (C1, C2), ("v1", "")])
async def test_what_is_no_commit_or_another_than_the_revision_is_refused(volumes, registry, revision, commit):
    with pytest.raises(InvalidInput, match="is no commit that"):
        await volumes.create("v", REPO, revision, registry, commit=commit)


async def test_a_volume_tells_how_much_it_shows(tmp_path, volumes, registry, monkeypatch):
    monkeypatch.setitem(FILES, C1, {"a": entry(1), "b/c/d": entry(2), "b/e": entry(3)})
    await volumes.create("v", REPO, "v1", registry)
    assert await volumes.usage("v") == Usage(files=3, directories=3, bytes=30)
    await volumes.create("w", REPO, C2, registry)
    assert await volumes.usage("w") == Usage(files=1, directories=1, bytes=10)
    with pytest.raises(NotFound):
        await volumes.usage("x")
    again = restarted(tmp_path)
    (tmp_path / "volumes/manifests" / again.get("v").manifest).unlink()
    with pytest.raises(Unavailable, match="the manifest of the volume v"):
        await again.usage("v")


async def test_asking_again_gives_the_same_volume_though_the_ref_moved(volumes, registry):
    first, _ = await volumes.create("v", REPO, "main", registry)
    registry.named[REPO]["main"] = C2
    assert await volumes.create("v", REPO, "main", registry) == (first, False)
    assert (await volumes.create("w", REPO, "main", registry))[0].commit == C2


async def test_asking_again_asks_no_registry(volumes, registry):
    await volumes.create("v", REPO, "main", registry)
    asked = registry.asked
    await volumes.create("v", REPO, "main", registry)
    assert registry.asked == asked


async def test_other_parameters_are_a_conflict(volumes, registry):
    first, _ = await volumes.create("v", REPO, "main", registry)
    for repo, revision in ((REPO, "v1"), (OTHER, "main"), (REPO, C1)):
        with pytest.raises(Conflict, match="v is models/org/name@main"):
            await volumes.create("v", repo, revision, registry)
    assert volumes.get("v") == first


async def test_concurrent_creates_of_one_id_make_one_volume(volumes, registry):
    registry.gate = trio.Event()
    results = []

    async def create():
        results.append(await volumes.create("v", REPO, "main", registry))

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(create)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(create)
        registry.named[REPO]["main"] = C2  # ten have the old commit in hand, the last one finds the new one
        registry.gate.set()
    assert len({record.digest for record, _ in results}) == 1
    assert sorted(new for _, new in results) == [False] * 10 + [True]


async def test_concurrent_creates_of_one_id_for_two_models_have_one_winner(volumes, registry, tmp_path):
    registry.gate = trio.Event()
    won, lost = [], []

    async def create(repo):
        try:
            won.append((await volumes.create("v", repo, "main", registry))[0].repo)
        except Conflict:
            lost.append(str(repo))

    async with trio.open_nursery() as nursery:
        for repo in (REPO, OTHER) * 5:
            nursery.start_soon(create, repo)
        await trio.testing.wait_all_tasks_blocked()
        registry.gate.set()
    assert len(set(won)) == 1
    assert len(won) == len(lost) == 5
    assert restarted(tmp_path).get("v").repo == won[0]


async def test_what_does_not_exist_makes_no_volume(volumes, registry):
    with pytest.raises(RepoNotFound, match="no models/org/nope") as caught:
        await volumes.create("v", RepoId.parse("org/nope"), "main", registry)
    assert "helios pull org/nope" in caught.value.hint
    with pytest.raises(RevisionNotFound, match="it has main, v1"):
        await volumes.create("v", REPO, "nope", registry)
    with pytest.raises(RevisionNotFound):
        await volumes.create("v", REPO, "3" * 40, registry)
    for volume, revision in ((".v", "main"), ("v", "a..b")):
        with pytest.raises(InvalidInput):
            await volumes.create(volume, REPO, revision, registry)
    assert volumes.known().value == {}
    with pytest.raises(NotFound):
        volumes.get("v")


async def test_while_nobody_answers_a_ref_has_its_last_value(volumes, registry):
    registry.silent = True
    assert (await volumes.create("v", REPO, "main", registry))[0].commit == C1


async def test_a_registry_that_hangs_is_not_waited_for(volumes, registry, autojump_clock):
    registry.gate = trio.Event()
    with pytest.raises(DeadlineExceeded, match="org/name@main"):
        await volumes.create("v", REPO, "main", registry)
    assert volumes.known().value == {}


async def test_delete_may_be_repeated(volumes, registry, tmp_path):
    await volumes.create("v", REPO, "main", registry)
    assert await volumes.delete("v")
    assert not await volumes.delete("v")
    assert not await volumes.delete("never")
    assert volumes.known().value == {}
    assert restarted(tmp_path).known().value == {}
    with pytest.raises(InvalidInput):
        await volumes.delete("../etc")


async def test_a_deleted_id_can_be_made_anew(volumes, registry):
    first, _ = await volumes.create("v", REPO, "main", registry)
    await volumes.delete("v")
    registry.named[REPO]["main"] = C2
    second, new = await volumes.create("v", REPO, "main", registry)
    assert new
    assert second.commit == C2
    assert second.digest != first.digest


async def test_volumes_survive_a_restart(volumes, registry, tmp_path):
    first, _ = await volumes.create("v", REPO, "main", registry)
    registry.named[REPO]["main"] = C2
    again = restarted(tmp_path)
    assert again.known().value == {"v": first}
    assert await again.create("v", REPO, "main", registry) == (first, False)


async def test_only_so_many_volumes(tmp_path, registry):
    volumes = restarted(tmp_path, limit=2)
    await volumes.create("a", REPO, "main", registry)
    await volumes.create("b", REPO, "main", registry)
    with pytest.raises(NoSpace, match="2 volumes"):
        await volumes.create("c", REPO, "main", registry)
    assert not (await volumes.create("a", REPO, "main", registry))[1]
    await volumes.delete("a")
    await volumes.create("c", REPO, "main", registry)


async def test_a_full_disk_makes_no_volume(volumes, registry, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(volumes._files, "write", raising(NoSpace("the disk is full")))
        with pytest.raises(NoSpace):
            await volumes.create("v", REPO, "main", registry)
    assert volumes.known().value == {}
    await volumes.create("v", REPO, "main", registry)
    with monkeypatch.context() as patch:
        patch.setattr(volumes._files, "remove", raising(Unavailable("the disk is broken")))
        with pytest.raises(Unavailable):
            await volumes.delete("v")
    assert list(volumes.known().value) == ["v"]


def raising(error):
    def call(*args):
        raise error

    return call


async def test_a_caller_that_gives_up_while_the_disk_works_changes_nothing(volumes, registry, tmp_path, monkeypatch):
    """Memory and disk say the same: the write that was begun counts."""
    begun, goes_on = threading.Event(), threading.Event()
    write = volumes._files.write

    def slow(*args):
        begun.set()
        assert goes_on.wait(10)
        write(*args)

    monkeypatch.setattr(volumes._files, "write", slow)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(volumes.create, "v", REPO, "main", registry)
        await trio.to_thread.run_sync(begun.wait)
        nursery.cancel_scope.cancel()
        goes_on.set()
    assert volumes.known().value == restarted(tmp_path).known().value != {}


async def test_a_damaged_volume_is_neither_shown_nor_made_over_until_it_is_deleted(
    volumes, registry, tmp_path, expected_log_errors
):
    expected_log_errors("a volume's record is damaged")
    await volumes.create("good", REPO, "main", registry)
    await volumes.create("bad", REPO, "main", registry)
    (tmp_path / "volumes/bad.volume").write_bytes(b"x")
    registry.named[REPO]["main"] = C2
    volumes = restarted(tmp_path)
    assert list(volumes.known().value) == ["good"]
    with pytest.raises(IntegrityError, match="not a helios-volume record"):
        volumes.get("bad")
    with pytest.raises(Conflict, match="damaged"):
        await volumes.create("bad", REPO, "main", registry)
    assert await volumes.delete("bad")
    assert (await volumes.create("bad", REPO, "main", registry))[0].commit == C2


async def test_a_manifest_stays_as_long_as_a_volume_needs_it(volumes, registry, tmp_path):
    record, _ = await volumes.create("a", REPO, "main", registry)
    await volumes.create("b", REPO, "v1", registry)
    await volumes.delete("a")
    assert volumes.manifest(record.manifest) == Manifest(FILES[C1]).encode()
    assert restarted(tmp_path).manifest(record.manifest) is not None
    await volumes.delete("b")
    assert restarted(tmp_path).manifest(record.manifest) is None


# --- with the catalog ------------------------------------------------------------------------------------------------


class NativeRegistry:
    """What the catalog asks; ``dead``: it can't be reached; ``empty``: it knows no repository any more."""

    dead = empty = False

    def _answer(self, value):
        if self.dead:
            raise Unavailable("connection refused")
        if self.empty:
            raise RepoNotFound("no such repository")
        return value

    def listing(self, timeout_s):
        return self._answer({} if self.empty else {REPO: {"main": C1}})

    def refs(self, repo, timeout_s):
        return self._answer({"main": C1})

    def commit(self, repo, commit, timeout_s):
        return self._answer(CommitRecord(str(repo), commit, Manifest(FILES[commit]).digest, "me", 7))

    def manifest(self, repo, commit, timeout_s):
        return self._answer(Manifest(FILES[commit]).encode())


PATIENCE = Patience(unknown_s=0.2, known_s=0.1, pause_s=0.1, longest_pause_s=0.1)


async def test_a_volumes_commit_is_known_without_registry_and_without_what_was_seen(tmp_path):
    native, records = NativeRegistry(), Records(tmp_path / "catalog.db")
    volumes = restarted(tmp_path)
    await volumes.create("v", REPO, "main", Catalog(native, records, volumes, patience=PATIENCE))
    records.close()
    (tmp_path / "catalog.db").unlink()
    native.dead = True
    records = Records(tmp_path / "catalog.db")
    catalog = Catalog(native, records, restarted(tmp_path), patience=PATIENCE)
    await catalog.load()
    snapshot = (await catalog.snapshot(REPO, C1)).value
    assert (snapshot.files, snapshot.time) == (FILES[C1], 7)
    records.close()


async def test_a_volumes_commit_outlives_its_repository(tmp_path):
    native, records, volumes = NativeRegistry(), Records(tmp_path / "catalog.db"), restarted(tmp_path)
    catalog = Catalog(native, records, volumes, patience=PATIENCE)
    await volumes.create("v", REPO, "main", catalog)
    native.empty = True
    assert (await catalog.refs(REPO, fresh=True)).value is None
    assert (await catalog.snapshot(REPO, C1)).value.files == FILES[C1]
    await volumes.delete("v")
    assert (await catalog.commit_time(REPO, C1)).value is None
    records.close()
