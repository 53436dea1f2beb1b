"""Whatever goes wrong during an ingest, nothing of it is visible, no staging file stays and no thread."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helios.errors import DeadlineExceeded, HeliosError, IntegrityError, NoSpace, Unavailable
from heliosfs.store.directory import DirectoryStore
from heliosfs.store.keys import recipe_key
from heliosfs.store.recipe import Recipe
from registry.ingest import FileSource, Ingest, slabs, staged
from registry.metadata.content import SqlChunkIndex
from registry.metadata.tables import blobs
from tests.support.ingest import Bytes, MemoryIndex, audit, reader, seeded
from tests.support.postgres import open_database

MIB = 1 << 20
ROOT = Path(__file__).parents[3]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DirectoryStore]:
    with DirectoryStore(tmp_path / "store") as opened:
        yield opened


def nothing_left(store: DirectoryStore) -> None:
    assert [p.name for p in store.staging().iterdir()] == [".lock"]
    assert [t.name for t in threading.enumerate() if t.name.startswith("ingest-")] == []


def failing(at: int, error: BaseException) -> Callable[[int], None]:
    def step(offset: int) -> None:
        if offset >= at:
            raise error

    return step


@pytest.mark.parametrize("at", [0, 1, 4 * MIB, 11 * MIB])
@pytest.mark.parametrize("error", [DeadlineExceeded("no byte came"), ConnectionResetError(), KeyboardInterrupt()])
def test_a_source_that_raises(store: DirectoryStore, at: int, error: BaseException) -> None:
    index = MemoryIndex()
    data = seeded(12 * MIB, 1)
    with pytest.raises(type(error)) as caught:
        Ingest(store, index).ingest("a.bin", len(data), Bytes(data, 1_000_000, failing(at, error)))
    assert caught.value is error
    nothing_left(store)
    assert list(store.list("")) == []
    assert index.blobs == {}


def test_a_source_that_raises_once_chunks_are_in_packs(store: DirectoryStore) -> None:
    index = MemoryIndex()
    ingest = Ingest(store, index)
    base = seeded(8 * MIB, 1)
    ingest.ingest("base.bin", len(base), Bytes(base))
    before = list(store.list(""))
    data = base + seeded(80 * MIB, 2)
    error = DeadlineExceeded("no byte came")
    with pytest.raises(DeadlineExceeded):
        ingest.ingest("a.bin", len(data), Bytes(data, 1 << 30, failing(84 * MIB, error)))
    nothing_left(store)
    assert list(store.list("")) == before


class Faulty:
    """A store whose ``calls``-th call of one kind fails, before or after it did its work."""

    def __init__(self, store: DirectoryStore, name: str, calls: int, *, after: bool) -> None:
        self._store, self._name, self._left, self._after = store, name, calls, after

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._store, name)
        if name != self._name:
            return real

        def call(*args: object) -> object:
            self._left -= 1
            if self._left == 0 and not self._after:
                raise NoSpace("full")
            result = real(*args)
            if self._left == 0:
                raise NoSpace("full")
            return result

        return call


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    ("shared", "name", "calls"),
    [(False, "put_file", 1), (False, "put_bytes", 1), (True, "put_bytes", 1)]
    + [(True, "put_file", calls) for calls in (1, 2, 3)],
)
def test_a_store_that_fails(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch, name: str, calls: int, after: bool, shared: bool
) -> None:
    monkeypatch.setattr("heliosfs.store.pack.TARGET", 5 * MIB)
    index = MemoryIndex()
    base = seeded(8 * MIB, 1)
    if shared:
        Ingest(store, index).ingest("base.bin", len(base), Bytes(base))
    before = list(store.list(""))
    known = dict(index.chunks)
    data = base + seeded(20 * MIB, 2)
    faulty = Faulty(store, name, calls, after=after)
    with pytest.raises(NoSpace, match="full"):
        Ingest(faulty, index).ingest("a.bin", len(data), Bytes(data))  # type: ignore[arg-type]
    nothing_left(store)
    assert list(store.list("")) == before
    assert index.chunks == known
    blob = Ingest(store, index).ingest("a.bin", len(data), Bytes(data))
    assert reader(store, blob.recipe, blob.locations).read(0, len(data)) == data


@pytest.mark.parametrize("error", [NoSpace("the database is full"), RuntimeError("bug")])
def test_an_index_that_fails(store: DirectoryStore, error: Exception) -> None:
    index = MemoryIndex()
    index.fail_add = error
    ingest = Ingest(store, index)
    data = seeded(9 * MIB, 1)
    with pytest.raises(type(error)):
        ingest.ingest("a.bin", len(data), Bytes(data))
    nothing_left(store)
    assert list(store.list("")) == []
    assert ingest.ingest("a.bin", len(data), Bytes(data)).new_bytes == len(data)


def test_an_add_that_failed_but_was_recorded_keeps_its_objects(store: DirectoryStore) -> None:
    """A commit whose answer got lost: the index names the objects, so they must stay."""

    class Lost(MemoryIndex):
        def add_blob(self, domain: str, blob: Any) -> None:
            super().add_blob(domain, blob)
            raise Unavailable("the connection broke")

    index = Lost()
    data = seeded(9 * MIB, 1)
    with pytest.raises(Unavailable):
        Ingest(store, index).ingest("a.bin", len(data), Bytes(data))
    (blob,) = index.blobs.values()
    assert reader(store, blob.recipe, blob.locations).read(0, len(data)) == data


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("at", [1, 2, 3, 5])
@pytest.mark.parametrize("shared", [False, True])
def test_a_disk_that_fails_at_any_write(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch, number: int, at: int, shared: bool
) -> None:
    index = MemoryIndex()
    ingest = Ingest(store, index)
    base = seeded(8 * MIB, 1)
    if shared:
        ingest.ingest("base.bin", len(base), Bytes(base))
    before = list(store.list(""))
    left = [at]
    pwrite = os.pwrite

    def fail(fd: int, data: bytes, offset: int) -> int:
        left[0] -= 1
        if left[0] <= 0:
            raise OSError(number, os.strerror(number))
        return pwrite(fd, data, offset)

    data = base + seeded(20 * MIB, 2)
    with monkeypatch.context() as patch:
        patch.setattr(staged.os, "pwrite", fail)
        with pytest.raises(Unavailable if number == errno.EIO else NoSpace) as caught:
            ingest.ingest("a.bin", len(data), Bytes(data))
    assert str(store.root) in str(caught.value)
    nothing_left(store)
    assert list(store.list("")) == before


def test_a_filesystem_without_direct_writes(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    refused = [0]

    def picky(fd: int, data: bytes, offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            refused[0] += 1
            raise OSError(errno.EINVAL, "Invalid argument")
        return pwrite(fd, data, offset)

    monkeypatch.setattr(staged.os, "pwrite", picky)
    data = seeded(9 * MIB + 5, 1)
    blob = Ingest(store, MemoryIndex()).ingest("a.bin", len(data), Bytes(data))
    assert reader(store, blob.recipe, blob.locations).read(0, len(data)) == data
    assert refused == [1]


def test_a_filesystem_without_reservations(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staged, "reserve", lambda _fd, _size: False)
    data = seeded(9 * MIB + 5, 1)
    blob = Ingest(store, MemoryIndex()).ingest("a.bin", len(data), Bytes(data))
    assert reader(store, blob.recipe, blob.locations).read(0, len(data)) == data


def test_content_that_changes_while_it_is_read_is_stored_as_it_was_hashed(
    store: DirectoryStore, tmp_path: Path
) -> None:
    """Chunks, blob and recipe agree, because each byte is read once."""
    path = tmp_path / "a.bin"
    path.write_bytes(seeded(24 * MIB, 1))

    class Changing(FileSource):
        def readinto(self, buffer: memoryview, /) -> int:
            with path.open("r+b") as file:
                file.write(os.urandom(24 * MIB))
            return super().readinto(buffer)

    with Changing(path) as source:
        Ingest(store, MemoryIndex()).ingest("a.bin", source.size, source)
    assert audit(store) == {"blobs": 1, "recipes": 1}


def test_a_file_that_shrinks_while_it_is_read(store: DirectoryStore, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(seeded(12 * MIB, 1))
    with FileSource(path) as source:
        os.truncate(path, 5 * MIB)
        with pytest.raises(HeliosError, match=r"a\.bin: ended after 5242880 of 12582912 bytes"):
            Ingest(store, MemoryIndex()).ingest("a.bin", source.size, source)
    nothing_left(store)


def test_a_stalled_source_holds_one_buffer_only(store: DirectoryStore) -> None:
    """Fourteen sources that stall leave room for a fifteenth that does not."""
    ingest = Ingest(store, MemoryIndex())
    go = threading.Event()
    reached = threading.Semaphore(0)

    def stall(offset: int) -> None:
        if offset >= 4 * MIB:
            reached.release()
            assert go.wait(30)

    data = seeded(9 * MIB, 1)
    threads = [
        threading.Thread(target=ingest.ingest, args=("a.bin", len(data), Bytes(data, 4 * MIB, stall)))
        for _ in range(14)
    ]
    for thread in threads:
        thread.start()
    try:
        for _ in threads:
            assert reached.acquire(timeout=30)
        other = seeded(9 * MIB, 2)
        assert ingest.ingest("b.bin", len(other), Bytes(other)).new_bytes == len(other)
    finally:
        go.set()
        for thread in threads:
            thread.join()
    nothing_left(store)


def test_no_buffer_within_the_deadline_is_an_error(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "WAIT_S", 0.1)
    ingest = Ingest(store, MemoryIndex())
    ingest.pool = slabs.SlabPool(1)
    held = ingest.pool.acquire()
    with pytest.raises(Unavailable, match="too many files"):
        ingest.ingest("a.bin", 3, Bytes(b"abc"))
    ingest.pool.release(held)
    assert ingest.ingest("a.bin", 3, Bytes(b"abc")).new_bytes == 3
    nothing_left(store)


def _on_a_small_disk(root: str) -> None:
    """Runs in a mount namespace of its own, on a tmpfs of 24 MiB at ``root``."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", root], check=True)
    report: dict[str, object] = {}
    with DirectoryStore(Path(root) / "store") as store:
        index = MemoryIndex()
        ingest = Ingest(store, index)

        def attempt(name: str, data: bytes) -> None:
            try:
                report[name] = ingest.ingest(name, len(data), Bytes(data)).new_bytes
            except NoSpace as error:
                report[name] = str(error)
            nothing_left(store)

        base = seeded(12 * MIB, 1)
        attempt("fits", base)
        attempt("too large", seeded(16 * MIB, 2))
        attempt("known but for a little", base + seeded(100, 3))
        attempt("known but for a lot", base + seeded(14 * MIB, 4))
        attempt("small", b"small")
        audit(store)
        report["blobs"] = len(index.blobs)
    print(json.dumps(report))


def test_a_full_disk(tmp_path: Path) -> None:
    """A real one. What is mostly known fits although the whole would not."""
    disk = tmp_path / "disk"
    disk.mkdir()
    code = f"import {__name__} as t; t._on_a_small_disk({str(disk)!r})"
    namespace = ["unshare", "--mount"] if os.getuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    command = [*namespace, sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["fits"] == 12 * MIB
    assert "no room in" in report["too large"]
    assert report["known but for a little"] == 100
    assert "no room in" in report["known but for a lot"]
    assert report["small"] == 5
    assert report["blobs"] == 3
    assert list(disk.iterdir()) == []


def _ingest_for_ever(root: str, url: str | None) -> None:
    database = open_database(Path(root) / "registry.db", url)
    with DirectoryStore(Path(root) / "store") as store:
        ingest = Ingest(store, SqlChunkIndex(database))
        print("ready", flush=True)
        base = seeded(30 * MIB, 1)
        for turn in range(1000):
            data = base[: (turn % 4) * 8 * MIB] + seeded(10 * MIB, os.getpid() + turn)
            ingest.ingest(f"{turn}.bin", len(data), Bytes(data))
            print("one more", flush=True)


def test_a_kill_at_any_moment_leaves_a_whole_store(tmp_path: Path, engine_url: str | None) -> None:
    """Kills of a process that ingests without end; then everything recorded is there and every object is whole."""
    for turn in range(5):
        code = f"import {__name__} as t; t._ingest_for_ever({str(tmp_path)!r}, {engine_url!r})"
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        with process.stdout:
            assert process.stdout.readline() == "ready\n"
            for _ in range(turn):
                assert process.stdout.readline() == "one more\n"
            time.sleep(0.03 * turn)
            process.kill()
            process.wait()
    with DirectoryStore(tmp_path / "store") as store:
        nothing_left(store)
        assert [p.name for p in (store.root / ".staging").iterdir() if p != store.staging()] == [".lock"]
        found = audit(store)
        assert found["blobs"] > 0
        database = open_database(tmp_path / "registry.db", engine_url)
        index = SqlChunkIndex(database)
        with database.read() as connection:
            rows = [(row.sha256, row.recipe) for row in connection.execute(blobs.select())]
        for sha256, digest in rows:
            recipe = _recipe(store, digest)
            assert recipe.blob == sha256
            locations = index.find("public", [id_ for id_, _ in recipe.chunks()])
            assert None not in locations
            assert reader(store, recipe, [at for at in locations if at]).verify() == len(recipe)
        database.close()


def _recipe(store: DirectoryStore, digest: str) -> Recipe:
    buffer = bytearray(store.info(recipe_key("public", digest)).size)
    store.read_into(recipe_key("public", digest), 0, memoryview(buffer))
    return Recipe.decode(bytes(buffer), digest)


def test_damage_is_named_and_never_delivered(store: DirectoryStore) -> None:
    data = seeded(9 * MIB, 1)
    blob = Ingest(store, MemoryIndex()).ingest("a.bin", len(data), Bytes(data))
    path = store.root / blob.objects[0].key
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(5 * MIB)
        file.write(bytes([data[5 * MIB] ^ 1]))
    opened = reader(store, blob.recipe, blob.locations)
    assert opened.read(0, 4 * MIB) == data[: 4 * MIB]
    with pytest.raises(IntegrityError, match=f"chunk 1 of blob {blob.entry.sha256} .*{blob.objects[0].key}"):
        opened.read(4 * MIB - 1, 2)
    with pytest.raises(IntegrityError, match="chunk 1"):
        opened.verify()
    assert opened.verify(8 * MIB, 100) == 1
