"""Two workers of one mount, one after the other: the kernel goes on with the inodes and handles of the first."""

import errno
import os
import random
import stat

import pyfuse3
import pytest
import trio
import trio.testing

from helios.metrics import MountMetrics
from helios.names import RepoId
from heliosfs.fuse.handles import Handles
from heliosfs.fuse.operations import HeliosOperations
from heliosfs.store.manifest import FileEntry
from heliosfs.tree.nodelog import NodeLog
from heliosfs.tree.root import root
from heliosfs.tree.source import FOREVER, Known
from heliosfs.tree.table import ROOT, NodeTable
from heliosfs.volumes.record import VolumeRecord, frozen_refs
from tests.support.origin import Origin
from tests.support.stores import running
from tests.support.tree import C1, C2, FILES, Registry, file

pytestmark = pytest.mark.trio

MOUNTED_NS = 1_700_000_000_123_456_789
REPO = RepoId.parse("org/name")
HUB = ".hub/models--org--name"
BYTES = random.Random(1).randbytes(300_000)


class Volumes(dict):
    """A list of volumes."""

    def known(self):
        return Known(self, 0.0)


class NoBlobs:
    """A store whose files nobody opens."""

    def expect(self, repo, commit):
        pass

    def warm(self):
        pass


class Mount:
    """A kernel's connection: the registry and the disk stay, workers come and go. ``handles`` are as the kernel's."""

    def __init__(self, path, blobs=None):
        self.path, self.blobs = path, blobs or NoBlobs()
        self.registry = Registry(
            {"models/org/name": {"main": C1}},
            {("models/org/name", C1): dict(FILES), ("models/org/name", C2): {"config.json": file(7)}},
        )
        self.volumes = Volumes(
            v=VolumeRecord("v", str(REPO), C1, "main", "0" * 64, 1234, frozen_refs("main", C1), 5),
        )
        self.handles = {}
        self.generation = 0
        self.log = None
        self.restart()

    def restart(self, compact_bytes=0):
        if self.log is not None:
            self.log.close()
        self.log = NodeLog.open(self.path / "nodes", MOUNTED_NS, compact_bytes=compact_bytes)
        self.generation += 1
        self.table = NodeTable(root(self.volumes), log=self.log)
        self.metrics = MountMetrics()
        self.operations = HeliosOperations(
            self.table,
            self.registry,
            self.blobs,
            self.metrics,
            cache=self.path,
            uid=1,
            gid=2,
            mounted_ns=MOUNTED_NS,
            generation=self.generation,
        )

    async def look(self, path):
        """Walk a path; the last entry."""
        ino, entry = ROOT, None
        for part in path.split("/"):
            entry = await self.operations.lookup(ino, part.encode(), None)
            ino = entry.st_ino
        return entry

    async def open(self, path):
        ino = (await self.look(path)).st_ino
        fh = (await self.operations.open(ino, os.O_RDONLY, None)).fh
        self.handles[fh] = ino
        return fh

    async def opendir(self, path):
        ino = (await self.look(path)).st_ino
        fh = await self.operations.opendir(ino, None)
        self.handles[fh] = ino
        return fh

    async def read(self, fh, offset=0, size=1 << 16):
        self.operations.files.adopt(fh, self.handles[fh])
        return bytes(await self.operations.read(fh, offset, size))

    async def list(self, fh, start, room, monkeypatch):
        """One READDIR with room for some entries: names and the offsets behind them."""
        out = []

        def reply(token, name, attributes, next_id):
            if len(out) == room:
                return False
            out.append((name.decode(), next_id))
            return True

        monkeypatch.setattr(pyfuse3, "readdir_reply", reply)
        self.operations.files.adopt(fh, self.handles[fh])
        await self.operations.readdir(fh, start, None)
        return out


@pytest.fixture
def mount(tmp_path):
    mount = Mount(tmp_path)
    yield mount
    mount.log.close()


async def fails(coroutine):
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await coroutine
    return caught.value.errno


def shown(entry):
    return {name: getattr(entry, name) for name in ("st_ino", "st_mode", "st_size", "st_mtime_ns", "st_ctime_ns")}


PATHS = [
    *("org", "org/name", "org/name/@main", f"org/name/{C1}", f"org/name/{C1}/a/b", f"org/name/{C1}/a/b/deep.txt"),
    *(f"org/name/{C1}/run.sh", f"org/name/{C2}/config.json", ".hub", HUB, f"{HUB}/refs/main", f"{HUB}/trees/{C1}.json"),
    *(f"{HUB}/snapshots/{C1}", f"{HUB}/snapshots/{C1}/model.safetensors", f"{HUB}/blobs/{3:064x}"),
    *(".volumes", ".volumes/v", ".volumes/v/model/a/b/deep.txt", ".volumes/v/hub/models--org--name/refs/main"),
    *(".volumes/v/hub/models--org--name/snapshots", f".volumes/v/hub/models--org--name/blobs/{4:040x}"),
]


@pytest.mark.parametrize("path", PATHS)
async def test_an_inode_is_what_it_was(mount, path):
    before = await mount.look(path)
    assert shown(await mount.operations.getattr(before.st_ino, None)) == shown(before)
    for _ in range(2):
        mount.restart()
        assert shown(await mount.operations.getattr(before.st_ino, None)) == shown(before)
        assert shown(await mount.look(path)) == shown(before)


async def test_the_mounts_own_time_stays(mount):
    before = (await mount.look("org")).st_mtime_ns
    mount.restart()
    assert before == (await mount.look("org")).st_mtime_ns == MOUNTED_NS
    assert (await mount.operations.getattr(ROOT, None)).st_mtime_ns == MOUNTED_NS


async def test_every_operation_on_an_inode_finds_it_again(mount):
    directory = (await mount.look(f"org/name/{C1}")).st_ino
    link = (await mount.look("org/name/@main")).st_ino
    text = (await mount.look(f"{HUB}/refs/main")).st_ino
    for call in (
        lambda made: made.lookup(directory, b"a", None),
        lambda made: made.opendir(directory, None),
        lambda made: made.readlink(link, None),
        lambda made: made.open(text, os.O_RDONLY, None),
        lambda made: made.getxattr(directory, b"user.helios.commit", None),
        lambda made: made.listxattr(directory, None),
    ):
        mount.restart()
        assert await call(mount.operations)


async def test_a_commit_that_no_ref_names_any_more_is_found_again(mount):
    before = await mount.look(f"org/name/{C1}/a/b/deep.txt")
    mount.registry.named[REPO] = {"main": C2}
    mount.restart()
    assert shown(await mount.operations.getattr(before.st_ino, None)) == shown(before)


async def test_a_link_that_moved_is_stale_and_its_name_gives_the_new_one(mount):
    before = (await mount.look("org/name/@main")).st_ino
    ref = (await mount.look(f"{HUB}/refs/main")).st_ino
    mount.registry.named[REPO] = {"main": C2}
    mount.restart()
    assert await fails(mount.operations.readlink(before, None)) == errno.ESTALE
    assert await fails(mount.operations.open(ref, os.O_RDONLY, None)) == errno.ESTALE
    after = (await mount.look("org/name/@main")).st_ino
    assert after != before
    assert await mount.operations.readlink(after, None) == C2.encode()
    mount.registry.named[REPO] = {"main": C1}
    assert await mount.operations.readlink(before, None) == C1.encode(), "it moved back"


async def test_a_volume_that_was_deleted_or_made_anew_is_stale(mount):
    before = (await mount.look(".volumes/v/model")).st_ino
    mount.volumes["v"] = VolumeRecord("v", str(REPO), C2, "main", "0" * 64, 1234, frozen_refs("main", C2), 5)
    mount.restart()
    assert await fails(mount.operations.getattr(before, None)) == errno.ESTALE
    del mount.volumes["v"]
    assert await fails(mount.operations.getattr(before, None)) == errno.ESTALE


async def test_giving_back_what_only_the_log_knows_is_done(mount):
    entry = await mount.look(f"org/name/{C1}/run.sh")
    mount.restart()
    await mount.operations.forget([(entry.st_ino, 1), (123456, 7), (ROOT, 1)])
    assert shown(await mount.operations.getattr(entry.st_ino, None)) == shown(entry), "a late name still finds it"


async def test_a_listing_is_recorded_before_it_is_answered(mount, monkeypatch):
    fh = await mount.opendir(f"org/name/{C1}")
    assert len(await mount.list(fh, 0, 99, monkeypatch)) == 4
    listed = len(mount.table) - 1
    killed = NodeLog.open(mount.path / "nodes", MOUNTED_NS)  # what the next worker finds if this one dies now
    assert len(killed) == listed == 3 + 4
    killed.close()


# --- handles ---------------------------------------------------------------------------------------------------------


async def test_handle_numbers_differ_between_workers(mount):
    first = await mount.open(f"{HUB}/refs/main")
    mount.restart()
    second = await mount.open(f"{HUB}/refs/main")
    assert first != second
    assert second >> 40 == 2
    assert pyfuse3.FileInfo(fh=second).fh == second


async def test_small_files_go_on_being_read(mount):
    ref, tree = await mount.open(f"{HUB}/refs/main"), await mount.open(f"{HUB}/trees/{C1}.json")
    content = [await mount.read(ref), await mount.read(tree)]
    for _ in range(3):
        mount.restart()
        assert [await mount.read(ref), await mount.read(tree)] == content
        assert await mount.read(ref, 3, 5) == content[0][3:8]
        assert mount.metrics.registry.get_sample_value("helios_mount_open_handles") == 2
    await mount.operations.release(ref)
    await mount.operations.release(tree)
    assert mount.metrics.registry.get_sample_value("helios_mount_open_handles") == 0
    assert await fails(mount.operations.read(ref, 0, 1)) == errno.EBADF


async def test_releasing_what_is_unknown_is_done(mount):
    file, directory = await mount.open(f"{HUB}/refs/main"), await mount.opendir("org")
    mount.restart()
    for fh in (file, directory):
        mount.operations.files.adopt(fh, mount.handles[fh])
    await mount.operations.release(file)
    await mount.operations.releasedir(directory)
    await mount.operations.release(999)
    assert await fails(mount.operations.read(file, 0, 1)) == errno.EBADF


async def test_a_handle_that_nobody_knows_is_refused(mount):
    assert await fails(mount.operations.read(5, 0, 1)) == errno.EBADF
    assert await fails(mount.operations.readdir(5, 0, None)) == errno.EBADF


async def test_a_handle_of_an_inode_that_is_stale_is_stale(mount):
    fh = await mount.open(f"{HUB}/refs/main")
    mount.registry.named[REPO] = {"main": C2}
    mount.restart()
    assert await fails(mount.read(fh)) == errno.ESTALE


async def test_a_handle_of_another_kind_is_refused(mount):
    """A log or a kernel that is wrong must not bring the worker down."""
    directory, file, link = [await mount.look(p) for p in ("org", f"{HUB}/refs/main", "org/name/@main")]
    mount.restart()
    for fh, entry in ((7, directory), (8, file), (9, link)):
        mount.operations.files.adopt(fh, entry.st_ino)
    assert await fails(mount.operations.read(7, 0, 1)) == errno.EISDIR
    assert await fails(mount.operations.readdir(8, 0, None)) == errno.ENOTDIR
    assert await fails(mount.operations.read(9, 0, 1)) == errno.EINVAL


async def test_only_handles_of_earlier_workers_are_adopted():
    handles = Handles(3)
    handles.adopt(2 << 40 | 1, 77)
    handles.adopt(3 << 40 | 1, 78)
    assert handles.adopted(2 << 40 | 1) == 77
    assert handles.adopted(3 << 40 | 1) is None


@pytest.mark.parametrize("cut", range(6))
async def test_a_listing_goes_on_where_it_was(mount, monkeypatch, cut):
    fh = await mount.opendir(f"org/name/{C1}")
    whole = await mount.list(fh, 0, 99, monkeypatch)
    other = await mount.opendir(f"org/name/{C1}")
    begun = await mount.list(other, 0, cut, monkeypatch)
    mount.restart()
    rest = await mount.list(other, begun[-1][1] if begun else 0, 99, monkeypatch)
    assert begun + rest == whole
    assert len(whole) == 4
    await mount.operations.releasedir(other)


async def test_a_listing_that_begins_anew_after_a_restart_is_made_anew(mount, monkeypatch):
    fh = await mount.opendir("org/name")
    before = [name for name, _ in await mount.list(fh, 0, 99, monkeypatch)]
    mount.registry.named[REPO] = {"main": C1, "v2": C2}
    mount.restart()
    assert [name for name, _ in await mount.list(fh, 0, 99, monkeypatch)] == ["@main", "@v2", C1, C2]
    assert before == ["@main", C1]


class Slow:
    """The real store, which opens once the gate does; notes what is opened and closed."""

    def __init__(self, store):
        self.store, self.gate, self.opened, self.closed = store, trio.Event(), [], []

    def __getattr__(self, name):
        return getattr(self.store, name)

    async def open(self, ref):
        self.opened.append(ref)
        await self.gate.wait()
        handle = await self.store.open(ref)
        close = handle.close

        async def noted():
            self.closed.append(ref)
            await close()

        handle.close = noted
        return handle


@pytest.fixture
async def slow(tmp_path):
    """A slow store, a mount whose worker ended, and a handle of ``BYTES`` that is open in the kernel."""
    with Origin() as origin:
        want = origin.add(BYTES, "weights.bin", cuts=[100_000] * 3)
        async with running(tmp_path / "cache", [origin.url]) as store:
            slow = Slow(store)
            mount = Mount(tmp_path, slow)
            entry = FileEntry(want.sha256, want.size, "a" * 40, want.recipe_digest, lfs=True)
            mount.registry.named[want.repo] = {"main": want.commit}
            mount.registry.commits[want.repo, want.commit] = {"weights.bin": entry}
            slow.gate.set()
            fh = await mount.open(f"{want.repo.id}/{want.commit}/weights.bin")
            assert await mount.read(fh, 0, 10) == BYTES[:10]
            await mount.operations.files.close()
            mount.restart()
            slow.gate, slow.opened, slow.closed = trio.Event(), [], []
            yield slow, mount, fh
            mount.log.close()


async def test_many_reads_of_one_handle_open_it_once(slow):
    store, mount, fh = slow
    parts = {}

    async def read(offset):
        parts[offset] = await mount.read(fh, offset, 50_000)

    async with trio.open_nursery() as readers:
        for offset in range(0, 300_000, 50_000):
            readers.start_soon(read, offset)
        await trio.testing.wait_all_tasks_blocked(0.01)
        store.gate.set()
    assert b"".join(parts[offset] for offset in sorted(parts)) == BYTES
    await mount.operations.release(fh)
    assert len(store.opened) == len(store.closed) == 1


async def test_a_reader_that_gives_up_leaves_the_opening_to_another(slow):
    store, mount, fh = slow
    got = []

    async def read(scope):
        with scope:
            got.append(await mount.read(fh, 5, 5))

    first, second = trio.CancelScope(), trio.CancelScope()
    async with trio.open_nursery() as readers:
        for scope in (first, second):
            readers.start_soon(read, scope)
            await trio.testing.wait_all_tasks_blocked(0.01)
        first.cancel()
        await trio.testing.wait_all_tasks_blocked(0.01)
        store.gate.set()
    assert got == [BYTES[5:10]]
    assert len(store.opened) == 2


async def test_a_release_that_overtakes_the_opening_leaves_nothing_open(slow):
    store, mount, fh = slow

    async def read():
        assert await fails(mount.read(fh)) == errno.EBADF

    async with trio.open_nursery() as readers:
        readers.start_soon(read)
        await trio.testing.wait_all_tasks_blocked(0.01)
        await mount.operations.release(fh)
        store.gate.set()
    assert len(store.opened) == len(store.closed) == 1


async def test_a_worker_without_a_log_knows_only_its_own(tmp_path):
    made = HeliosOperations(
        NodeTable(root()), Registry({}, {}), None, MountMetrics(), cache=tmp_path, uid=1, gid=2, clock=lambda: 0.0
    )
    entry = await made.lookup(ROOT, b".hub", None)
    assert stat.S_ISDIR((await made.getattr(entry.st_ino, None)).st_mode)
    assert await fails(made.getattr(entry.st_ino + 1, None)) == errno.ESTALE
    assert entry.entry_timeout > 0
    assert entry.entry_timeout < FOREVER
    assert list(tmp_path.iterdir()) == []
