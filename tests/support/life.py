"""What a worker does with its disk in its life: fill, finish, adopt, evict, pin, make and delete volumes, start again.

``live`` does all of it on small blobs within a second; what it promised is told to ``mark``. ``check`` looks at a disk
after a crash. ``python -m tests.support.life`` lives in a process of its own that ends itself at the step it is told.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from unittest.mock import patch

import msgspec
import trio
from trio.testing import MockClock

from helios.errors import HeliosError
from helios.names import RepoId
from heliosfs.blobs import BlobRef, BlobStore
from heliosfs.fetch import engine, settle
from heliosfs.store.directory import DirectoryStore
from heliosfs.store.keys import PUBLIC, blob_key
from heliosfs.store.recipe import Recipe
from heliosfs.tiers.directory import TierDirectory
from heliosfs.tiers.keeping import KeepingFiles
from heliosfs.tiers.local import LocalBlob
from heliosfs.volumes.files import VolumeFiles
from heliosfs.volumes.record import VolumeRecord, frozen_refs
from tests.support.accounts import on_disk, settled
from tests.support.durable import Shim, Step
from tests.support.origin import Origin
from tests.support.stores import filled, look, read, roomy, running, until

Mark = Callable[[str, str, object], None]

CUTS = [5000, 4096, 3001, 8192]
SIZE = sum(CUTS)
DATA = {name: random.Random(name).randbytes(SIZE) for name in ("fill", "part", "gone", "late", "near")}
KIND = {"part": "json", "late": "json"}
"""Weight files are filled as soon as they are open; the others when they are read."""

SETTINGS = roomy(request_deadline_s=60.0, connections=1, buffer_mib=16, pool_mib=0)
RATE = 8.0
"""How much faster than time a life passes."""

PATIENCE_S = 30 * RATE
"""A slow machine is no failure, in seconds of the life's clock."""

MANIFEST = b"the manifest of a commit"
COMMIT = "1" * 40


def serve(origin: Origin) -> dict[str, BlobRef]:
    """The blobs of a life, by name."""
    return {name: origin.add(data, f"{name}.{KIND.get(name, 'safetensors')}", cuts=CUTS) for name, data in DATA.items()}


def store_near(root: Path, wants: dict[str, BlobRef]) -> Path:
    """An object store beside the cache that has one of them."""
    near = root / "store"
    with DirectoryStore(near) as store:
        staged = store.staging() / "blob"
        staged.write_bytes(DATA["near"])
        store.put_file(blob_key(PUBLIC, wants["near"].sha256), staged)
    return near


def volume(name: str) -> VolumeRecord:
    digest = hashlib.sha256(MANIFEST).hexdigest()
    return VolumeRecord(name, "models/org/name", COMMIT, "main", digest, 1, frozen_refs("main", COMMIT), 2)


@dataclass
class Promises:
    """What must be found after a crash, and for what is being changed also what may be."""

    chunks: dict[str, set[int]] = field(default_factory=dict)
    whole: set[str] = field(default_factory=set)
    pins: list[frozenset[str]] = field(default_factory=lambda: [frozenset()])
    """Sets of pinned revisions: the last one that was promised, and what was begun since."""
    volumes: list[frozenset[str]] = field(default_factory=lambda: [frozenset()])
    steps: int = 0
    """What a life that ended by itself counted."""

    def take(self, what: str, name: str, value: object) -> None:
        if what == "recorded":
            self.chunks.setdefault(name, set()).update(value)  # type: ignore[call-overload]
        elif what == "whole":
            self.whole.add(name)
        elif what == "removing":
            self.chunks.pop(name, None)
            self.whole.discard(name)
        elif what == "begin":
            getattr(self, name).append(frozenset(value))  # type: ignore[call-overload]
        elif what == "done":
            setattr(self, name, [frozenset(value)])  # type: ignore[call-overload]
        else:
            self.steps = int(name)


@contextlib.contextmanager
def told(mark: Mark) -> Iterator[None]:
    """Have the local tier tell what it keeps, and do everything soon."""
    record, finish, remove = LocalBlob.record, LocalBlob.finish, TierDirectory.remove

    def recorded(self: LocalBlob, chunks: list[int]) -> None:
        record(self, chunks)
        mark("recorded", self.sha256, list(chunks))

    def finished(self: LocalBlob) -> None:
        finish(self)
        mark("whole", self.sha256, None)

    def removed(self: TierDirectory, sha256: str) -> int:
        mark("removing", sha256, None)
        return remove(self, sha256)

    with (
        patch.object(LocalBlob, "record", recorded),
        patch.object(LocalBlob, "finish", finished),
        patch.object(TierDirectory, "remove", removed),
        patch.object(settle, "FLUSH_BYTES", 1),
        patch.object(engine, "DISK_PAUSE_S", 0.05),
        patch.object(engine, "DISK_LONGEST_PAUSE_S", 0.1),
    ):
        yield


async def right(store: BlobStore, want: BlobRef, name: str, offset: int = 0, size: int = SIZE) -> None:
    assert await read(store, want, offset, size) == DATA[name][offset : offset + size], f"{name} read wrong"


class Refused(Protocol):
    """A disk: ``refused``, whether it ever refused anything; ``now``, whether it refuses all that must be written."""

    @property
    def refused(self) -> bool: ...
    @property
    def now(self) -> bool: ...


class Sound:
    """A disk that works."""

    refused = now = False


async def live(root: Path, url: str, wants: dict[str, BlobRef], mark: Mark, disk: Refused) -> None:
    """One life, with a restart in the middle. Reads are always right; errors are borne where a disk refuses."""
    for _ in range(2):
        try:
            async with running(root / "cache", [url], SETTINGS, beside=root / "store") as store:
                volumes = VolumeFiles(root / "cache" / "volumes")
                await _live(store, volumes, set(volumes.load().records), wants, mark, disk)
        except* HeliosError:
            if not disk.refused:
                raise


def lived(root: Path, url: str, wants: dict[str, BlobRef], mark: Mark, disk: Refused | None = None) -> None:
    """``live``, faster than time passes."""
    trio.run(live, root, url, wants, mark, disk or Sound(), clock=MockClock(rate=RATE))


async def _live(
    store: BlobStore,
    volumes: VolumeFiles,
    there: set[str],
    wants: dict[str, BlobRef],
    mark: Mark,
    disk: Refused,
) -> None:
    async def whole(name: str) -> None:
        handle = await store.open(wants[name])
        try:
            assert await handle.read(0, SIZE) == DATA[name], f"{name} read wrong"
            await until(lambda: store.status(wants[name].sha256).complete or disk.now, PATIENCE_S)
        finally:
            await handle.close()

    pinned = {pin.revision for pin in store.room.pins.all()}

    async def pin(revision: str, on: bool) -> None:
        nonlocal pinned
        then = pinned | {revision} if on else pinned - {revision}
        mark("begin", "pins", sorted(then))
        with _borne(disk):
            if on:
                await store.room.pins.pin("models/org/name", revision, COMMIT, [wants["gone"].sha256], "critical")
            else:
                await store.room.pins.unpin("models/org/name", revision)
            pinned = then
            mark("done", "pins", sorted(then))

    async def keep(name: str, on: bool) -> None:
        nonlocal there
        then = there | {name} if on else there - {name}
        mark("begin", "volumes", sorted(then))
        with _borne(disk):
            if on:
                await trio.to_thread.run_sync(volumes.write, volume(name), MANIFEST)
            else:
                await trio.to_thread.run_sync(volumes.remove, name, None if then else volume(name).manifest)
            there = then
            mark("done", "volumes", sorted(then))

    await whole("fill")
    await right(store, wants["part"], "part", 0, 100)
    await keep("one", True)
    await pin("main", True)
    await whole("gone")
    await whole("near")
    await until(lambda: not store._blobs or disk.now, PATIENCE_S)
    await store.room.evict([wants["gone"].sha256, wants["part"].sha256])
    await right(store, wants["part"], "part", 9000, 100)
    await keep("two", True)
    await pin("v1", True)
    await keep("one", False)
    await pin("main", False)
    await right(store, wants["late"], "late", SIZE - 100, 100)
    await right(store, wants["gone"], "gone", 5000, 10)


@contextlib.contextmanager
def _borne(disk: Refused) -> Iterator[None]:
    try:
        yield
    except HeliosError:
        if not disk.refused:
            raise


def check(root: Path, wants: dict[str, BlobRef], promises: Promises, recipes: dict[str, Recipe]) -> None:
    """A disk after a crash: it can be started from, nothing on it is wrong, and what was promised is there."""
    with TierDirectory("l1", root / "cache") as l1:
        for name, want in wants.items():
            blob = l1.blob(want.sha256, want.size)
            try:
                found = look(blob, want.recipe_digest)
                have = {i for i, flag in enumerate(found.have or b"") if flag}
                if found.whole:
                    have = set(range(len(CUTS)))
                for index in have:
                    start, end = recipes[name].span(index)
                    view = memoryview(bytearray(end - start))
                    blob.read_into(view, start)
                    assert view == DATA[name][start:end], f"chunk {index} of {name} is said to be here and is wrong"
                lost = promises.chunks.get(want.sha256, set()) - have
                assert not lost, f"chunks {lost} of {name} were flushed and are lost"
                assert found.whole or want.sha256 not in promises.whole, f"{name} was whole and is not"
            finally:
                blob.close()
        names = [path.name for path in (root / "cache" / "partial").iterdir()]
        assert {n.removesuffix(".data") for n in names if n.endswith(".data")} == {
            n.removesuffix(".map") for n in names if n.endswith(".map")
        }, f"half of a pair is left: {names}"
        assert not list((root / "cache").glob("sums/*/*.*"))
    pins = {pin.revision for pin in KeepingFiles(root / "cache").load_pins()}
    assert pins in promises.pins, f"{pins} are pinned, not one of {promises.pins}"
    loaded = VolumeFiles(root / "cache" / "volumes").load()
    assert not loaded.damaged
    assert set(loaded.records) in promises.volumes, f"{set(loaded.records)} are there, not one of {promises.volumes}"
    for record in loaded.records.values():
        assert VolumeFiles(root / "cache" / "volumes").manifest(record.manifest) == MANIFEST
    left = [path for path in (root / "cache").rglob("*.tmp") if path.parent.name in ("volumes", "manifests")]
    assert not left


def start_again(root: Path, url: str, wants: dict[str, BlobRef]) -> None:
    """The next worker on this disk: reads are right, everything gets whole, accounts are exact."""
    trio.run(_start_again, root, url, wants, clock=MockClock(rate=RATE))


async def _start_again(root: Path, url: str, wants: dict[str, BlobRef]) -> None:
    async with running(root / "cache", [url], SETTINGS, beside=root / "store") as store:
        for name, want in wants.items():
            await right(store, want, name)
        store.prefetch(wants.values())
        for want in wants.values():
            await filled(store, want, PATIENCE_S)
        await settled(store, PATIENCE_S)
        assert store.room.l1.policy.used == on_disk(root / "cache")


# --- in processes of their own ---------------------------------------------------------------------------------------


class Job(msgspec.Struct):
    """One life in a child that kills itself: at step ``at``, before or after it."""

    root: str
    url: str
    at: int
    after: bool


def main() -> None:
    """For each job on stdin: live, in a child; say how many steps it made, or that it died."""
    wants = {
        name: BlobRef(RepoId.parse(repo), commit, path, sha256, size, recipe)
        for name, (repo, commit, path, sha256, size, recipe) in json.loads(sys.argv[1]).items()
    }
    for line in sys.stdin:
        job = msgspec.json.decode(line, type=Job)
        child = os.fork()
        if not child:
            os._exit(_lived(job, wants))
        _, status = os.waitpid(child, 0)
        print(json.dumps(status), flush=True)


def _lived(job: Job, wants: dict[str, BlobRef]) -> int:
    root = Path(job.root)
    promises = os.open(f"{root}.promises", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    made = 0

    def die(step: Step) -> None:
        if made == job.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(step: Step) -> int | None:
        if not job.after:
            die(step)
        return None

    def after(step: Step) -> None:
        nonlocal made
        if job.after:
            die(step)
        made += 1

    try:
        with Shim(root, before, after):

            def mark(what: str, name: str, value: object) -> None:
                os.write(promises, json.dumps([what, name, value]).encode() + b"\n")

            with told(mark):
                lived(root, job.url, wants, mark)
    except BaseException as error:
        sys.stderr.write(f"{error!r}\n")
        return 1
    os.write(promises, json.dumps(["steps", str(made), None]).encode() + b"\n")
    return 0


if __name__ == "__main__":
    main()
