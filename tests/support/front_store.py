"""A front store on directories: the cloud is a real store in one of them, which can be told to fail."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from helios.errors import IntegrityError, NotFound, Unavailable
from helios.metrics import RegistryMetrics
from heliosfs.store.directory import DirectoryStore
from heliosfs.store.front.disk import Memory
from heliosfs.store.front.near import Near
from heliosfs.store.front.store import FrontStore
from heliosfs.store.keys import blob_key
from heliosfs.store.objects import Good, ObjectInfo

LIMIT = 10_000
RECORD = "public/commits/models/org/name/" + "1" * 40


def blob(number: int) -> tuple[str, bytes]:
    data = random.Random(number).randbytes((900, 1800, 2500, 4000, 6000, 12_000)[number])
    return blob_key("public", hashlib.sha256(data).hexdigest()), data


class Cloud(DirectoryStore):
    """The cloud: its own staging, and faults."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.down = self.dead = False
        self.gate = threading.Event()
        """Not set: uploads and reads wait."""
        self.gate.set()
        self.came = threading.Event()
        """Set when an upload comes to the gate."""
        self.lose: set[str] = set()
        """What is done and not answered: ``put`` or ``delete``, once each."""

    def _strike(self) -> None:
        if self.down or self.dead:
            raise Unavailable("the cloud is down")

    def _after(self, what: str) -> None:
        self._strike()
        if what in self.lose:
            self.lose.discard(what)
            raise Unavailable("the answer was lost")

    def near(self, key: str) -> bool:
        return False

    @property
    def local(self) -> None:
        return None

    def put_file(self, key: str, path: Path) -> None:  # type: ignore[override]
        self.came.set()
        self.gate.wait(20)
        self._strike()
        super().put_file(key, path, keep=True)  # a file of its own, as in another place
        path.unlink(missing_ok=True)
        self._after("put")

    def put_bytes(self, key: str, data: bytes) -> None:
        self._strike()
        super().put_bytes(key, data)
        self._after("put")

    def delete(self, key: str) -> None:
        self._strike()
        super().delete(key)
        self._after("delete")

    def info(self, key: str) -> ObjectInfo:
        self._strike()
        return super().info(key)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        self.gate.wait(20)
        self._strike()
        super().read_into(key, offset, buffer)

    def heal(self, key: str, offset: int, length: int, good: Good) -> bool:
        found = memoryview(bytearray(length))
        try:
            self.read_into(key, offset, found)
        except (NotFound, IntegrityError):
            return False
        return good(found)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        self._strike()
        yield from super().list(prefix)


def until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def read(store: FrontStore, key: str) -> bytes:
    buffer = bytearray(store.info(key).size)
    store.read_into(key, 0, memoryview(buffer))
    return bytes(buffer)


class Front:
    """A front store on directories, that can die and be opened again."""

    def __init__(self, root: Path, *, back: bool) -> None:
        self.root, self.back = root, back
        self.front, self.cloud_root = root / "front", root / "cloud"
        self.open()

    def open(self, *, down: bool = False) -> None:
        self.cloud = Cloud(self.cloud_root)
        self.cloud.down = down
        metrics = RegistryMetrics()
        memory = Memory(self.root / "front.json")
        self.near = Near(self.front, "s3://bucket", memory, LIMIT, 0.0, metrics)
        self.store = FrontStore(self.cloud, self.near, metrics, back=self.back)

    def die(self) -> None:
        """As if killed: nothing it does from here on reaches anything."""
        self.cloud.dead = True
        self.near.remember = lambda *_: None  # type: ignore[method-assign]
        with self.near.journal:
            self.near.waiting._append = lambda *_args, **_more: None  # type: ignore[method-assign]
            self.near.memory.note = lambda **_: None  # type: ignore[method-assign]
            self.near._missed.note = lambda *_args, **_more: True  # type: ignore[method-assign]
            self.near._missed.clear = lambda: None  # type: ignore[method-assign]
        self.store.close()

    def take_away(self, *, refuses: bool = True) -> None:
        """The disk is gone; unless it ``refuses``, what was open on it can be written yet."""
        self.front.rename(self.root / "away")
        if refuses:
            with self.near.journal:
                self.near.waiting.close()

    def bring_back(self) -> None:
        (self.root / "away").rename(self.front)

    def settle(self) -> None:
        until(lambda: not self.near.waiting.items and not self.near.doubtful)
