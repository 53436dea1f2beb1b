"""A real mount of real content: bytes, attributes, refusals."""

import ctypes
import errno
import hashlib
import json
import mmap
import os
import random
import stat
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helios.home import Home
from tests.support.mounts import MODES, Mount, fails, mounted, push, run, write
from tests.support.writes import WRITES

pytestmark = pytest.mark.fuse

BIG = 9 * (1 << 20) + 12345
RANDOM = random.Random(1)
FILES = {
    "big.bin": RANDOM.randbytes(BIG),
    "config.json": b'{"a": 1}',
    "empty": b"",
    "run.sh": b"#!/bin/sh\necho from-the-mount\n",
    "a/b/deep.txt": b"deep",
    "one-byte": b"x",
    "page": RANDOM.randbytes(4096),
}


@pytest.fixture(scope="module", params=MODES)
def mount(tmp_path_factory, request):
    base = tmp_path_factory.mktemp("files")
    home = Home(base / "home")
    commit = push(home, write(base / "model", FILES, executable=("run.sh",)), "org/name")
    with mounted(home, base / "mnt", HELIOS_MOUNT__MODE=request.param) as mount:
        mount.commit = commit
        mount.files = base / "mnt/org/name" / commit
        yield mount


@pytest.mark.parametrize("name", sorted(FILES))
def test_files_are_what_was_pushed(mount, name):
    assert (mount.files / name).read_bytes() == FILES[name]
    assert (mount.path / "org/name/@main" / name).read_bytes() == FILES[name]


def test_a_listing_has_every_file_and_nothing_else(mount):
    found = {str(Path(top, name).relative_to(mount.files)) for top, _, names in os.walk(mount.files) for name in names}
    assert found == set(FILES)


def test_modes_owner_links_and_blocks(mount):
    status = (mount.files / "big.bin").stat()
    assert stat.filemode(status.st_mode) == "-r--r--r--"
    assert stat.filemode((mount.files / "run.sh").stat().st_mode) == "-r-xr-xr-x"
    assert stat.filemode(mount.files.stat().st_mode) == "dr-xr-xr-x"
    assert (status.st_uid, status.st_gid) == (os.getuid(), os.getgid())
    assert (status.st_size, status.st_blocks) == (BIG, (BIG + 511) // 512)
    assert status.st_nlink == 1


def test_beside_its_registry_a_model_is_on_the_disk_once(mount):
    name = hashlib.sha256(FILES["big.bin"]).hexdigest()
    assert (mount.files / "big.bin").read_bytes() == FILES["big.bin"]
    cached = mount.home.cache / "blobs" / name[:2] / name
    deadline = time.monotonic() + 20
    while not cached.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert cached.samefile(mount.home.store / "public/blobs" / name[:2] / name)
    shown = json.loads(run(mount.home, "status", "--json").stdout)
    assert shown["cache"]["bytes"] < BIG < shown["store"]["stored"]


def test_a_file_has_the_time_of_its_commit(mount):
    pushed = (mount.home.root / "registry").stat().st_ctime
    assert abs((mount.files / "config.json").stat().st_mtime - pushed) < 60
    assert mount.files.stat().st_mtime == (mount.files / "config.json").stat().st_mtime


def test_an_executable_runs(mount):
    assert subprocess.check_output([mount.files / "run.sh"]) == b"from-the-mount\n"


def test_the_same_content_is_one_inode(mount):
    in_hub = mount.path / ".hub/models--org--name/snapshots" / mount.commit / "big.bin"
    assert in_hub.is_symlink()
    assert in_hub.stat().st_ino == (mount.files / "big.bin").stat().st_ino
    assert in_hub.stat().st_dev == (mount.files / "big.bin").stat().st_dev


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(reads=st.lists(st.tuples(st.integers(0, BIG + 5000), st.integers(0, 300_000)), min_size=1, max_size=8))
def test_any_reads_give_the_files_bytes(mount, reads):
    fd = os.open(mount.files / "big.bin", os.O_RDONLY)
    try:
        for offset, size in reads:
            assert os.pread(fd, size, offset) == FILES["big.bin"][offset : offset + size]
    finally:
        os.close(fd)


def test_a_mapped_file_has_the_files_bytes(mount):
    with open(mount.files / "big.bin", "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        for at in random.Random(2).sample(range(BIG), 500):
            assert mapped[at] == FILES["big.bin"][at]
        assert mapped[:] == FILES["big.bin"]


def test_many_readers_at_once(mount):
    def read(seed):
        picks = random.Random(seed)
        with open(mount.files / "big.bin", "rb", buffering=0) as file:
            for _ in range(20):
                at = picks.randrange(BIG)
                file.seek(at)
                size = picks.randrange(1, 1 << 20)
                data = b""
                while len(data) < min(size, BIG - at):
                    data += file.read(size - len(data))
                assert data == FILES["big.bin"][at : at + size]
        return True

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(read, range(32)))


def test_an_interrupted_reader_harms_no_other(mount):
    reader = os.fork()
    if reader == 0:
        try:
            fd = os.open(mount.files / "big.bin", os.O_RDONLY | os.O_DIRECT)
            buffer = mmap.mmap(-1, 1 << 20)  # aligned, as the disk wants it where the kernel reads the file itself
            while True:
                os.preadv(fd, [buffer], 0)
        finally:
            os._exit(1)
    threading.Event().wait(0.1)
    os.kill(reader, 9)
    assert os.waitpid(reader, 0)[1] == 9
    assert (mount.files / "big.bin").read_bytes() == FILES["big.bin"]


def test_pages_stay_cached_between_opens(mount):
    (mount.files / "page").read_bytes()
    before = mount.reads()
    for _ in range(5):
        assert (mount.files / "page").read_bytes() == FILES["page"]
    assert mount.reads() == before


# --- attributes ------------------------------------------------------------------------------------------------------


def attributes(path):
    return {name: os.getxattr(path, name).decode() for name in os.listxattr(path)}


def test_extended_attributes_say_what_a_file_is_and_where_it_lies(mount):
    path = mount.files / "page"
    path.read_bytes()
    found = attributes(path)
    assert found["user.helios.sha256"] == hashlib.sha256(FILES["page"]).hexdigest()
    assert found["user.helios.repo"] == "models/org/name"
    assert found["user.helios.commit"] == mount.commit
    assert found["user.helios.tier"] in ("l1", "partial", "remote")
    assert 0 <= float(found["user.helios.progress"]) <= 1
    assert found["user.helios.verified"] in ("true", "false")


def test_a_commits_directory_names_its_commit(mount):
    assert attributes(mount.files)["user.helios.commit"] == mount.commit
    assert attributes(mount.path / "org") == {}


def test_an_unknown_attribute_is_no_data(mount):
    with fails(errno.ENODATA):
        os.getxattr(mount.files / "page", "user.nope")


def test_a_buffer_too_small_for_an_attribute_is_erange(mount):
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(4)
    path = os.fsencode(mount.files / "page")
    assert libc.getxattr(path, b"user.helios.sha256", buffer, 4) == -1
    assert ctypes.get_errno() == errno.ERANGE
    assert libc.getxattr(path, b"user.helios.sha256", None, 0) == 64
    assert libc.listxattr(path, buffer, 4) == -1
    assert ctypes.get_errno() == errno.ERANGE


def test_statfs_is_about_the_caches_disk(mount):
    ours, disk = os.statvfs(mount.path), os.statvfs(mount.home.cache)
    assert ours.f_blocks * ours.f_frsize == disk.f_blocks * disk.f_frsize
    assert ours.f_bavail > 0
    assert ours.f_namemax == 255
    assert ours.f_flag & os.ST_RDONLY


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(WRITES))
def test_every_write_is_refused_as_read_only(mount, name):
    with fails(errno.EROFS):
        WRITES[name](mount.files, "page")
    assert (mount.files / "page").read_bytes() == FILES["page"]


def test_names_can_be_neither_made_nor_removed(mount):
    with fails(errno.EROFS):
        os.open(mount.path / "new", os.O_CREAT | os.O_WRONLY)
    with fails(errno.EROFS):
        os.unlink(mount.path / "org/name/@main")


def test_an_open_file_can_be_neither_written_nor_lengthened(mount):
    fd = os.open(mount.files / "page", os.O_RDONLY)
    try:
        for call in (lambda: os.write(fd, b"x"), lambda: os.ftruncate(fd, 0), lambda: os.posix_fallocate(fd, 0, 9)):
            with fails(errno.EROFS, errno.EBADF, errno.EINVAL):
                call()
    finally:
        os.close(fd)


UNKNOWN = ("nope", "nope/x", "org/nope", "org/name/@nope", f"org/name/{'0' * 40}", "_/nope", ".hub/models--no--pe")


@pytest.mark.parametrize("path", UNKNOWN)
def test_unknown_names_are_enoent(mount, path):
    for call in (os.stat, os.listdir, lambda p: os.open(p, os.O_RDONLY)):
        with pytest.raises(FileNotFoundError):
            call(mount.path / path)


def test_unknown_paths_in_a_commit_are_enoent(mount):
    for path in ("nope", "a/nope", "a/b/deep.txt2", "\udcff", "x" * 255):
        with pytest.raises(FileNotFoundError):
            os.stat(mount.files / path)
    assert mount.metric("helios_mount_errors_total", operation="lookup", errno="ENOENT") >= 5


def test_a_file_is_no_directory_and_a_directory_no_file(mount):
    with pytest.raises(NotADirectoryError):
        os.listdir(mount.files / "page")
    with pytest.raises(NotADirectoryError):
        os.stat(mount.files / "page/x")
    with pytest.raises(IsADirectoryError):
        (mount.files / "a").read_bytes()


def test_the_pages_of_the_daemon(mount):
    assert mount.page("/healthz") == "ok\n"
    assert mount.page("/readyz") == "ready\n"
    mode = mount.state["mode"]
    assert f'helios_mount_mode_info{{mode="{mode}"' in mount.page("/metrics")
    assert f'"mountpoint":"{mount.path}"' in mount.page("/api/v1/status")


def test_nothing_stays_open_and_the_kernels_inodes_are_counted(mount, wait_for):
    wait_for(lambda: mount.metric("helios_mount_open_handles") == 0, what="every handle to be closed")
    assert mount.metric("helios_mount_inodes") > 1


def test_the_log_has_no_warning(mount):
    lines = [line for line in mount.log().splitlines() if '"level": "info"' not in line]
    assert lines == []


def mount_type(mount: Mount) -> str:
    return next(line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f" {mount.path} " in line)


def test_the_kernel_shows_whose_mount_it_is(mount):
    assert " - fuse.helios helios ro," in mount_type(mount)
