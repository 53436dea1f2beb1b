"""The directory engine: whole or absent, durable, inside its root, and repaired after a kill."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from helios.errors import HeliosError, IntegrityError, InvalidInput, NoSpace, NotFound, Unavailable
from heliosfs.store import directory
from heliosfs.store.directory import DirectoryStore
from heliosfs.store.objects import ObjectStore


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DirectoryStore]:
    with DirectoryStore(tmp_path / "store") as opened:
        yield opened


def staged(store: DirectoryStore, data: bytes, name: str = "file") -> Path:
    path = store.staging() / name
    path.write_bytes(data)
    return path


def read(store: ObjectStore, key: str) -> bytes:
    buffer = bytearray(store.info(key).size)
    store.read_into(key, 0, memoryview(buffer))
    return bytes(buffer)


def left_in_staging(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in (root / ".staging").rglob("*") if p.is_file() and p.name != ".lock")


def test_objects_come_back(store: DirectoryStore) -> None:
    store.put_bytes("public/a/1", b"one")
    store.put_file("public/a/2", staged(store, b"second"))
    assert (read(store, "public/a/1"), read(store, "public/a/2")) == (b"one", b"second")
    buffer = bytearray(3)
    store.read_into("public/a/2", 2, memoryview(buffer))
    assert buffer == b"con"
    file = store.open_local("public/a/2")
    assert file is not None
    with file:
        assert file.read() == b"second"
    assert left_in_staging(store.root) == []
    assert str(store.root) in store.describe()


def test_objects_are_read_only_files_under_their_key(store: DirectoryStore) -> None:
    store.put_bytes("public/a/1", b"one")
    path = store.root / "public/a/1"
    assert path.read_bytes() == b"one"
    assert path.stat().st_mode & 0o777 == 0o444


def test_a_file_of_another_filesystem_is_copied(store: DirectoryStore) -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == store.root.stat().st_dev:
        pytest.skip("no second filesystem at /dev/shm")
    path = shm / f"helios-test-{os.getpid()}"
    try:
        path.write_bytes(b"from afar")
        store.put_file("public/a/1", path)
        assert read(store, "public/a/1") == b"from afar"
        assert not path.exists()
    finally:
        path.unlink(missing_ok=True)
    assert left_in_staging(store.root) == []


def test_putting_the_same_again_changes_nothing(store: DirectoryStore) -> None:
    store.put_bytes("public/a/1", b"one")
    before = (store.root / "public/a/1").stat()
    store.put_bytes("public/a/1", b"one")
    path = staged(store, b"one")
    store.put_file("public/a/1", path)
    after = (store.root / "public/a/1").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert not path.exists()


@pytest.mark.parametrize("data", [b"two", b"longer"])
def test_other_content_under_a_taken_key_is_refused(store: DirectoryStore, data: bytes) -> None:
    store.put_bytes("public/a/1", b"one")
    with pytest.raises(IntegrityError, match="public/a/1 is already in"):
        store.put_bytes("public/a/1", data)
    if len(data) != 3:
        with pytest.raises(IntegrityError):
            store.put_file("public/a/1", staged(store, data))
    assert read(store, "public/a/1") == b"one"


def test_missing_objects(store: DirectoryStore) -> None:
    store.put_bytes("public/a/1", b"one")
    for key in ("public/a/2", "public/b/1", "public/a/1/x", "public/a"):
        with pytest.raises(NotFound, match=key):
            store.info(key)
        with pytest.raises(NotFound, match=key):
            store.read_into(key, 0, memoryview(bytearray(1)))
        with pytest.raises(NotFound, match=key):
            store.open_local(key)


def test_a_short_object_is_an_integrity_error(store: DirectoryStore) -> None:
    store.put_bytes("public/a/1", b"one")
    with pytest.raises(IntegrityError, match="ends at byte 3"):
        store.read_into("public/a/1", 1, memoryview(bytearray(3)))


def test_delete(store: DirectoryStore) -> None:
    store.put_bytes("public/a/1", b"one")
    store.delete("public/a/1")
    store.delete("public/a/1")
    store.delete("public/none/1")
    with pytest.raises(NotFound):
        store.info("public/a/1")


def test_keys_are_listed_in_order_by_prefix(store: DirectoryStore) -> None:
    keys = [
        "other/b/1",
        "public/a-b/1",
        "public/a.b",
        "public/a/1",
        "public/a/10",
        "public/a/2/x",
        "public/a0/1",
        "public/b/1",
    ]
    for key in reversed(keys):
        store.put_bytes(key, key.encode())
    staged(store, b"not an object")
    assert [(o.key, o.size) for o in store.list("")] == [(key, len(key)) for key in sorted(keys)]
    for prefix in ("public/", "public/a", "public/a/", "public/a/1", "public/a/2/x", "pub", "none", "public/a/2/xx"):
        assert [o.key for o in store.list(prefix)] == [key for key in sorted(keys) if key.startswith(prefix)]


@pytest.mark.parametrize(
    "key", ["../x", "public/../../x", "/etc/passwd", "public/.staging/x", "public//x", "public/x\0"]
)
def test_keys_that_leave_the_root_are_refused(store: DirectoryStore, key: str) -> None:
    calls = [
        lambda: store.put_bytes(key, b""),
        lambda: store.put_file(key, staged(store, b"x")),
        lambda: store.info(key),
        lambda: store.read_into(key, 0, memoryview(bytearray(1))),
        lambda: store.open_local(key),
        lambda: store.delete(key),
    ]
    for call in calls:
        with pytest.raises(InvalidInput):
            call()
    if "\0" not in key and ".." in key:
        with pytest.raises(InvalidInput):
            list(store.list(key))


def test_the_root_can_be_opened_twice(tmp_path: Path) -> None:
    with DirectoryStore(tmp_path / "s") as one, DirectoryStore(tmp_path / "s") as two:
        assert one.staging() != two.staging()
        path = staged(one, b"kept")
        with DirectoryStore(tmp_path / "s") as three:
            three.put_bytes("public/a/1", b"one")
        assert path.read_bytes() == b"kept"
        assert read(two, "public/a/1") == b"one"
    assert [p.name for p in (tmp_path / "s/.staging").iterdir()] == [".lock"]


def test_a_closed_store_has_no_staging(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "s")
    store.close()
    store.close()
    with pytest.raises(Unavailable, match="is closed"):
        store.put_bytes("public/a/1", b"x")


def test_an_unknown_layout_is_refused(tmp_path: Path) -> None:
    DirectoryStore(tmp_path / "s").close()
    (tmp_path / "s/.format").write_text("helios-store 2\n")
    with pytest.raises(IntegrityError, match="helios-store 2"):
        DirectoryStore(tmp_path / "s")


def test_a_root_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("")
    with pytest.raises(Unavailable, match="can't be opened"):
        DirectoryStore(tmp_path / "s")


def _stage_and_hang(root: Path) -> None:
    store = DirectoryStore(root)
    (store.staging() / "half").write_bytes(b"half written")
    store.put_bytes("public/a/1", b"whole")
    print(store.staging(), flush=True)
    signal.pause()


def start_writer(root: Path) -> subprocess.Popen[str]:
    code = f"import pathlib, {__name__} as t; t._stage_and_hang(pathlib.Path({str(root)!r}))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


def test_staging_of_a_killed_process_is_cleaned_and_of_a_live_one_kept(tmp_path: Path) -> None:
    root = tmp_path / "s"
    dead, alive = start_writer(root), start_writer(root)
    try:
        dead.kill()
        dead.wait()
        with DirectoryStore(root) as store:
            assert [Path(p).name for p in left_in_staging(root)] == ["half"]
            assert read(store, "public/a/1") == b"whole"
            alive.kill()
            alive.wait()
        with DirectoryStore(root):
            assert left_in_staging(root) == []
    finally:
        for process in (dead, alive):
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def test_staging_that_never_got_its_lock_is_cleaned(tmp_path: Path) -> None:
    DirectoryStore(tmp_path / "s").close()
    (tmp_path / "s/.staging/0123").mkdir()
    (tmp_path / "s/.staging/0123/file").write_bytes(b"x")
    (tmp_path / "s/.staging/stray").write_bytes(b"x")
    DirectoryStore(tmp_path / "s").close()
    assert [p.name for p in (tmp_path / "s/.staging").iterdir()] == [".lock"]


def _open_and_put(root: Path, number: int, failures: multiprocessing.SimpleQueue[str]) -> None:
    try:
        for turn in range(15):
            with DirectoryStore(root) as store:
                data = b"x" * 1000
                store.put_bytes(f"public/a/{turn}", data)
                store.put_file(f"public/b/{turn}", staged(store, data))
                assert read(store, f"public/b/{turn}") == data
    except BaseException as error:
        failures.put(f"{number}: {error!r}")
        raise


def test_processes_that_open_and_close_beside_each_other(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    failures = context.SimpleQueue()
    workers = [context.Process(target=_open_and_put, args=(tmp_path / "s", i, failures)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    problems = []
    while not failures.empty():
        problems.append(failures.get())
    failures.close()
    assert problems == []
    assert [worker.exitcode for worker in workers] == [0, 0, 0]


def test_threads_that_put_the_same_object(store: DirectoryStore) -> None:
    errors: list[BaseException] = []

    def put(number: int) -> None:
        try:
            for turn in range(20):
                store.put_file(f"public/a/{turn}", staged(store, b"same", f"{number}-{turn}"))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=put, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(list(store.list("public/a/"))) == 20
    assert left_in_staging(store.root) == []


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """Writes beyond ``limit`` bytes fail with EFBIG, as if the disk ended there."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_nothing(store: DirectoryStore) -> None:
    with file_size_limit(1000), pytest.raises(NoSpace, match="no room in"):
        store.put_bytes("public/a/1", bytes(5000))
    assert list(store.list("")) == []
    assert left_in_staging(store.root) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["link", "fsync", "fchmod", "mkdir"])
def test_an_error_at_any_step_leaves_no_object(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    path = staged(store, b"data")
    with monkeypatch.context() as patch:
        patch.setattr(directory.os, call, fail)
        for put in (lambda: store.put_bytes("public/a/1", b"data"), lambda: store.put_file("public/b/1", path)):
            with pytest.raises(HeliosError) as caught:
                put()
            assert isinstance(caught.value, Unavailable if number == errno.EIO else NoSpace)
            assert str(store.root) in str(caught.value)
    if call != "fsync":  # after the link a name may be there, but then it holds the whole object
        assert list(store.list("")) == []
    for found in store.list(""):
        assert read(store, found.key) == b"data"
    path.unlink(missing_ok=True)
    assert left_in_staging(store.root) == []
    store.put_bytes("public/a/1", b"data")
    assert read(store, "public/a/1") == b"data"


def test_every_object_is_fsynced_before_its_name_and_the_directory_after(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, link = os.fsync, os.link

    def note_fsync(fd: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        steps.append("directory" if Path(path).is_dir() else "file")
        fsync(fd)

    def note_link(source: str, target: str) -> None:
        steps.append("link")
        link(source, target)

    monkeypatch.setattr(directory.os, "fsync", note_fsync)
    monkeypatch.setattr(directory.os, "link", note_link)
    store.put_bytes("public/a/1", b"data")
    assert steps == ["file", "directory", "directory", "link", "directory"]
    steps.clear()
    store.put_file("public/a/2", staged(store, b"x"))
    assert steps == ["file", "link", "directory"]


def test_a_store_that_was_taken_away_is_no_store_without_objects(tmp_path: Path) -> None:
    """Its disk may be missing: nobody may conclude that an object was removed."""
    with DirectoryStore(tmp_path / "store") as store:
        store.put_bytes("public/a/1", b"one")
        store.root.rename(tmp_path / "away")
        for call in (
            lambda: store.info("public/a/1"),
            lambda: store.read_into("public/a/1", 0, memoryview(bytearray(1))),
            lambda: store.open_local("public/a/1"),
            lambda: store.delete("public/a/1"),
            lambda: store.put_bytes("public/a/2", b"two"),
            lambda: list(store.list("")),
        ):
            with pytest.raises(Unavailable):
                call()
        (tmp_path / "away").rename(store.root)
        assert read(store, "public/a/1") == b"one"
