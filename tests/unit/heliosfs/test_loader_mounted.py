"""Files of a mount of ours: mapped where the mount keeps them, waited for, read through it, fetched instead.

The mount is a directory here, whose files have the attributes of a mount's; tests/integration/test_loader.py has a real
one.
"""

import os
import threading
import time

import pytest

from helios.errors import Unavailable
from heliosfs.loader import mounted
from heliosfs.loader.memory import in_memory
from heliosfs.loader.mounted import MountFolder

SHA = "ab" * 32
DATA = bytes(range(256)) * (3 << 12)
SIZE = len(DATA)


@pytest.fixture
def scene(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "O_DIRECT", 0)  # this directory's file system wants it aligned; FUSE does not
    return Scene(tmp_path)


class Scene:
    def __init__(self, root):
        (root / "mnt").mkdir()
        self.path, self.tier, self.connected = root / "mnt" / "m.safetensors", root / "cache", 0
        self.blob = self.tier / "blobs" / SHA[:2] / SHA
        self.path.write_bytes(DATA)
        self.says("partial", 0.5)
        os.setxattr(self.path, "user.helios.sha256", SHA.encode())
        self.folder = MountFolder(root / "mnt", [self.tier], self.client)

    def says(self, tier, progress):
        os.setxattr(self.path, "user.helios.tier", tier.encode())
        os.setxattr(self.path, "user.helios.progress", f"{progress:.4f}".encode())

    def becomes_whole(self, mode=0o444):
        self.blob.parent.mkdir(parents=True)
        self.blob.write_bytes(DATA)
        self.blob.chmod(mode)

    def client(self):
        self.connected += 1
        return Client()

    def read(self, file, start=0, stop=SIZE):
        out = bytearray(stop - start)
        file.read_into(memoryview(out), start)
        return bytes(out)


class Client:
    def open(self, path):
        return Fetched(path)

    def read(self, path):
        return b"fetched"

    def fetch(self):
        return


class Fetched:
    size = SIZE

    def __init__(self, path):
        self.path = path

    def read_into(self, view, offset):
        view[:] = b"f" * len(view)

    def close(self):
        return


def test_what_is_whole_is_mapped_where_it_lies_and_not_opened_in_the_mount(scene, monkeypatch):
    scene.becomes_whole()
    monkeypatch.setattr(mounted, "DiskFile", None)
    file = scene.folder.open("m.safetensors")
    assert os.readlink(f"/proc/self/fd/{file.fileno()}") == str(scene.blob)
    assert file.awaited() == file.fileno()
    assert scene.read(file, 5, 9) == DATA[5:9]
    file.close()


@pytest.mark.parametrize("mode", [0o644, 0o464])
def test_a_file_that_somebody_may_write_to_is_not_believed(scene, mode):
    scene.becomes_whole(mode)
    file = scene.folder.open("m.safetensors")
    assert file.fileno() is None
    file.close()


def test_what_comes_is_waited_for_by_all_and_mapped(scene):
    file = scene.folder.open("m.safetensors")
    found = []
    threads = [threading.Thread(target=lambda: found.append(file.awaited())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for step in range(5):
        scene.says("partial", 0.5 + step / 10)
        time.sleep(0.05)
    assert found == []
    scene.becomes_whole()
    for thread in threads:
        thread.join(30)
    assert found == [file.fileno()] * 4
    assert file.fileno() is not None
    file.close()


def test_what_does_not_come_is_read_through_the_mount_and_small_things_at_once(scene, monkeypatch):
    file = scene.folder.open("m.safetensors")
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("nothing of so few bytes is waited for"))
    assert scene.read(file, 0, 100) == DATA[:100]
    monkeypatch.undo()
    monkeypatch.setattr(os, "O_DIRECT", 0)
    assert file.awaited() is None
    assert scene.read(file) == DATA
    scene.becomes_whole()
    assert file.fileno() is not None, "the next range is mapped"
    file.close()
    assert not scene.connected


def test_what_the_mount_can_not_give_comes_by_the_client_which_is_connected_once(scene, caplog):
    file = scene.folder.open("m.safetensors")
    assert scene.read(file, 0, 10) == DATA[:10]
    os.truncate(scene.path, 100)
    assert scene.read(file, 50, 150) == b"f" * 100
    assert scene.read(file, 50, 150) == b"f" * 100
    assert caplog.text.count("the client fetches it") == 1
    os.unlink(scene.path)
    assert scene.folder.read("m.safetensors") == b"fetched"
    assert scene.connected == 1
    file.close()


def test_where_the_client_is_of_no_use_either_both_are_named(scene, monkeypatch):
    def fails():
        raise OSError("no such attribute")

    folder = MountFolder(scene.path.parent, [scene.tier], fails)
    file = folder.open("m.safetensors")
    os.truncate(scene.path, 100)
    with pytest.raises(Unavailable, match=r"the client can't be used .* no such attribute"):
        scene.read(file, 50, 150)
    file.close()


def test_what_is_in_the_page_cache_is_told_from_what_is_not(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(DATA)
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert not in_memory(fd, 0, SIZE)
        os.pread(fd, SIZE, 0)
        assert in_memory(fd, 0, SIZE)
        assert not in_memory(fd, 0, SIZE + 1), "it is shorter than that"
    finally:
        os.close(fd)


def test_a_file_that_is_none_of_a_mounts_is_an_error(scene):
    (scene.path.parent / "other").write_bytes(b"1")
    with pytest.raises(Unavailable, match="can't be opened"):
        scene.folder.open("other")
