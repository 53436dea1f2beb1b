"""A mount over a store that lies and a registry that stalls; shards that follow each other."""

import errno
import json
import os
import random
import signal
import tempfile
import threading
import time

import pytest

from helios.embedded import running
from tests.support.damage import flip
from tests.support.mounts import MODES, fails, mounted, push, write

pytestmark = pytest.mark.fuse

MIB = 1 << 20
DATA = {name: random.Random(name).randbytes(9 * MIB) for name in ("one.txt", "two.txt")}


@pytest.fixture
def mnt(tmp_path):
    return tmp_path / "mnt"


@pytest.fixture(params=MODES)
def mode(request, monkeypatch):
    """The mode that the test mounts in: these tests show what the way to the kernel might change."""
    monkeypatch.setenv("HELIOS_MOUNT__MODE", request.param)


@pytest.fixture
def other_disk():
    """A directory on another file system than the store's."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield path


def stored(home, data):
    """The store's file that holds these bytes."""
    for path in home.store.rglob("*"):
        if path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data:
            return path
    raise AssertionError("the store has no such object")


@pytest.mark.usefixtures("mode")
def test_a_damaged_chunk_is_eio_and_the_log_names_it(helios_home, mnt, tmp_path, expected_log_errors):
    expected_log_errors("chunk")
    push(helios_home, write(tmp_path / "model", DATA), "org/name")
    flip(stored(helios_home, DATA["one.txt"]), 5 * MIB)
    with mounted(helios_home, mnt) as mount:
        file = mnt / "org/name/@main/one.txt"
        fd = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            with fails(errno.EIO):
                os.pread(fd, 4096, 5 * MIB)
            assert os.pread(fd, 4096, 0) == DATA["one.txt"][:4096]
            assert os.pread(fd, 4096, 8 * MIB) == DATA["one.txt"][8 * MIB : 8 * MIB + 4096]
        finally:
            os.close(fd)
        assert (mnt / "org/name/@main/two.txt").read_bytes() == DATA["two.txt"]
        assert mount.metric("helios_mount_verify_failures_total") >= 1
        lines = [json.loads(line) for line in mount.log().splitlines()]
        said = [line for line in lines if line["level"] in ("warning", "error") and "chunk" in json.dumps(line)]
        assert any("org/name" in json.dumps(line) and "one.txt" in json.dumps(line) for line in said)


@pytest.mark.usefixtures("mode")
def test_a_stalled_registry_is_eio_at_the_deadline_and_stops_no_other_file(
    helios_home, mnt, tmp_path, other_disk, expected_log_errors, wait_for
):
    expected_log_errors("deadline|answer")
    push(helios_home, write(tmp_path / "model", DATA), "org/name")
    elsewhere = {"HELIOS_MOUNT__CACHE": str(other_disk)}  # what lies beside the store needs no registry
    with mounted(helios_home, mnt, HELIOS_MOUNT__REQUEST_DEADLINE_S="1", **elsewhere):
        one, two = (mnt / "org/name/@main" / name for name in DATA)
        assert one.read_bytes() == DATA["one.txt"]
        commit = os.open(mnt / "org/name" / os.readlink(mnt / "org/name/@main"), os.O_RDONLY | os.O_DIRECTORY)
        registry = running(helios_home).pid
        os.kill(registry, signal.SIGSTOP)
        try:
            results = []

            def stalled(at):
                fd = os.open("two.txt", os.O_RDONLY, dir_fd=commit)
                try:
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
                    os.pread(fd, 4096, at)
                except OSError as error:
                    results.append(error.errno)
                finally:
                    os.close(fd)

            readers = [threading.Thread(target=stalled, args=(at * MIB,)) for at in (0, 3, 6, 8)]
            for reader in readers:
                reader.start()
            begin = time.monotonic()
            while any(reader.is_alive() for reader in readers):
                fd = os.open("one.txt", os.O_RDONLY, dir_fd=commit)
                assert os.pread(fd, 4096, 8 * MIB) == DATA["one.txt"][8 * MIB : 8 * MIB + 4096]
                os.close(fd)
                assert time.monotonic() - begin < 30
            for reader in readers:
                reader.join()
            assert results == [errno.EIO] * 4
        finally:
            os.kill(registry, signal.SIGCONT)
            os.close(commit)
        wait_for(lambda: readable(two), timeout_s=20, what="the file to be readable again")
        assert two.read_bytes() == DATA["two.txt"]


def readable(path):
    try:
        with path.open("rb") as file:
            return bool(file.read(1))
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return False


def test_the_other_shards_follow_the_one_that_is_read(helios_home, mnt, tmp_path, wait_for):
    header = b"\x02\0\0\0\0\0\0\0{}"
    shards = {f"model-0000{n}-of-00003.safetensors": header for n in (1, 2, 3)}
    for number, name in enumerate(shards):
        tensor = json.dumps({"t": {"dtype": "U8", "shape": [MIB], "data_offsets": [0, MIB]}}).encode()
        shards[name] = len(tensor).to_bytes(8, "little") + tensor + random.Random(number).randbytes(MIB)
    push(helios_home, write(tmp_path / "model", {**shards, "other.safetensors": header}), "org/name")
    with mounted(helios_home, mnt):
        directory = mnt / "org/name/@main/"

        def tier(name):
            return os.getxattr(directory / name, "user.helios.tier")

        assert {tier(name) for name in shards} == {b"remote"}
        with (directory / "model-00002-of-00003.safetensors").open("rb") as file:
            assert file.read(16)
            wait_for(lambda: {tier(name) for name in shards} == {b"l1"}, what="all shards to be local")
        assert tier("other.safetensors") == b"remote"
