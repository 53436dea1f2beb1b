"""The adapter to pyfuse3: whatever goes wrong becomes an errno, is counted, and ends nothing."""

import errno
import os
import stat
import threading

import pyfuse3
import pytest
import trio
import trio.testing

from helios.errors import Forbidden, IntegrityError, NoSpace, RevisionNotFound, Unavailable
from helios.metrics import MountMetrics
from heliosfs.fuse import operations as operations_module
from heliosfs.fuse.operations import HeliosOperations
from heliosfs.tree.nodes import Absent, Directory, Found, Link, TextFile
from heliosfs.tree.source import FOREVER
from heliosfs.tree.table import ROOT, NodeTable

pytestmark = pytest.mark.trio


class Root(Directory):
    """A directory that answers what it is told to."""

    def __init__(self, answer):
        super().__init__(("root",))
        self.answer = answer

    async def lookup(self, name, source):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def entries(self, source):
        raise self.answer


def operations(tmp_path, answer):
    table = NodeTable(Root(answer))
    metrics = MountMetrics()
    made = HeliosOperations(table, None, None, metrics, cache=tmp_path, uid=1, gid=2, clock=lambda: 100.0)
    return made, table, metrics


async def test_a_disk_that_hangs_stops_nothing_but_the_question_how_full_it_is(tmp_path, monkeypatch):
    made, _, metrics = operations(tmp_path, Absent("no"))
    known, _, _ = operations(tmp_path, Absent("no"))
    full = (await known.statfs(None)).f_blocks
    hangs = threading.Event()
    monkeypatch.setattr(operations_module, "STATFS_S", 0.3)
    monkeypatch.setattr(operations_module.os, "statvfs", lambda _: hangs.wait(20))
    try:
        for _ in range(3):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fails_with, errno.EIO, made.statfs(None))
                await trio.testing.wait_all_tasks_blocked()
                assert stat.S_ISDIR((await made.getattr(ROOT, None)).st_mode)
        assert (await known.statfs(None)).f_blocks == full, "what it was"
        assert sum(thread.name.startswith("Trio") for thread in threading.enumerate()) < 20
    finally:
        hangs.set()
    assert counted(metrics, "statfs", "EIO") == 3


async def fails_with(code, coroutine):
    assert await fails(coroutine) == code


async def fails(coroutine):
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await coroutine
    return caught.value.errno


def counted(metrics, name, code):
    return metrics.registry.get_sample_value("helios_mount_errors_total", {"operation": name, "errno": code})


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RevisionNotFound("x"), errno.ENOENT),
        (Forbidden("x"), errno.EACCES),
        (Unavailable("x"), errno.EIO),
        (IntegrityError("x"), errno.EIO),
        (NoSpace("x"), errno.EIO),
    ],
)
async def test_our_errors_have_an_errno(tmp_path, error, code):
    made, _, metrics = operations(tmp_path, error)
    assert await fails(made.lookup(ROOT, b"x", None)) == code
    assert counted(metrics, "lookup", errno.errorcode[code]) == 1


async def test_a_link_that_is_longer_than_the_kernel_takes_is_refused(tmp_path):
    made, _, metrics = operations(tmp_path, Found("x", Link(("long",), "../" * 1400)))
    entry = await made.lookup(ROOT, b"x", None)
    assert await fails(made.readlink(entry.st_ino, None)) == errno.ENAMETOOLONG
    assert counted(metrics, "readlink", "ENAMETOOLONG") == 1


async def test_an_unforeseen_error_is_eio_and_in_the_log(tmp_path, expected_log_errors, caplog):
    expected_log_errors("lookup failed")
    made, _, metrics = operations(tmp_path, ZeroDivisionError("a bug"))
    assert await fails(made.lookup(ROOT, b"x", None)) == errno.EIO
    assert "a bug" in caplog.text
    assert counted(metrics, "lookup", "EIO") == 1


async def test_absence_is_remembered_until_its_time(tmp_path):
    made, table, metrics = operations(tmp_path, Absent("no", until=103.0))
    entry = await made.lookup(ROOT, b"x", None)
    assert (entry.st_ino, entry.entry_timeout) == (0, 3.0)
    assert len(table) == 1
    assert counted(metrics, "lookup", "ENOENT") == 1


@pytest.mark.parametrize(("until", "timeout"), [(100.5, 0.5), (99.0, 0.0)])
async def test_names_are_given_to_the_kernel_for_the_rest_of_their_time(tmp_path, until, timeout):
    made, table, _ = operations(tmp_path, Found("x", Link(("l",), "target", mtime=7), until))
    entry = await made.lookup(ROOT, b"x", None)
    assert entry.entry_timeout == timeout
    assert stat.S_ISLNK(entry.st_mode)
    assert (entry.st_uid, entry.st_gid, entry.st_mtime_ns) == (1, 2, 7_000_000_000)
    assert await made.readlink(entry.st_ino, None) == b"target"
    await made.forget([(entry.st_ino, 1)])
    assert len(table) == 1


async def test_content_is_given_for_a_year(tmp_path):
    made, _, _ = operations(tmp_path, Found("x", TextFile(("t",), b"hello"), FOREVER))
    entry = await made.lookup(ROOT, b"x", None)
    assert entry.entry_timeout == entry.attr_timeout == 365 * 86400


async def test_a_small_file_is_read_and_closed(tmp_path):
    made, _, metrics = operations(tmp_path, Found("x", TextFile(("t",), b"hello"), FOREVER))
    entry = await made.lookup(ROOT, b"x", None)
    info = await made.open(entry.st_ino, os.O_RDONLY, None)
    assert info.keep_cache
    assert await made.read(info.fh, 1, 3) == b"ell"
    assert metrics.registry.get_sample_value("helios_mount_open_handles") == 1
    await made.release(info.fh)
    assert metrics.registry.get_sample_value("helios_mount_open_handles") == 0


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_RDWR | os.O_APPEND])
async def test_opening_for_writing_is_erofs(tmp_path, flags):
    made, _, _ = operations(tmp_path, Found("x", TextFile(("t",), b"hello"), FOREVER))
    entry = await made.lookup(ROOT, b"x", None)
    assert await fails(made.open(entry.st_ino, flags, None)) == errno.EROFS


WRITES = ("create", "link", "mkdir", "mknod", "removexattr", "rename", "rmdir", "setattr", "setxattr", "symlink")


@pytest.mark.parametrize("name", [*WRITES, "unlink", "write", "fallocate"])
async def test_writing_is_erofs_even_if_the_kernel_asks(tmp_path, name):
    made, _, metrics = operations(tmp_path, Absent("no"))
    assert await fails(getattr(made, name)(ROOT, b"x", None)) == errno.EROFS
    assert counted(metrics, name, "EROFS") == 1


async def test_an_inode_that_nobody_knows_is_stale(tmp_path):
    made, _, _ = operations(tmp_path, Absent("no"))
    for call in (made.getattr(99, None), made.lookup(99, b"x", None), made.open(99, 0, None), made.opendir(99, None)):
        assert await fails(call) == errno.ESTALE


async def test_a_name_that_is_not_utf8_is_enoent(tmp_path):
    made, _, _ = operations(tmp_path, Absent("no"))
    assert await fails(made.lookup(ROOT, b"\xff", None)) == errno.ENOENT
