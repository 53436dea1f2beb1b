"""What is fetched behind a weight file that was opened, while the indexes of its directory are being read."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import trio
import trio.testing

from helios.names import RepoId
from heliosfs.blobs import BlobRef
from heliosfs.following import Following
from heliosfs.store.manifest import FileEntry
from heliosfs.tree.nodes import BlobFile
from heliosfs.tree.snapshot import Snapshot
from heliosfs.tree.source import Known

pytestmark = pytest.mark.trio

REPO, COMMIT = RepoId.parse("org/name"), "1" * 40
INDEX = b'{"weight_map": {"t": 1}}'
PARTS = [f"model-{n:05}-of-00003.safetensors" for n in (1, 2, 3)]


def entry(number: int, size: int = 1000) -> FileEntry:
    return FileEntry(f"{number:064x}", size, f"{number:040x}", f"{number:064x}")


FILES = {path: entry(number) for number, path in enumerate([*PARTS, "a.safetensors"])}
SNAPSHOT = Snapshot(REPO, COMMIT, 0, FILES | {"model.safetensors.index.json": entry(9, len(INDEX))})


class Commits:
    """A source of one commit."""

    async def snapshot(self, _repo: RepoId, _commit: str) -> Known[Snapshot]:
        return Known(SNAPSHOT, 0.0)


@dataclass
class Blobs:
    """A store whose files are read once ``gate`` is set, and which notes what is to be fetched."""

    nursery: trio.Nursery
    gate: trio.Event = field(default_factory=trio.Event)
    read_often: int = 0
    fetched: list[str] = field(default_factory=list)

    def soon(self, call: Callable[[], Awaitable[None]]) -> None:
        self.nursery.start_soon(call)

    async def open(self, _want: BlobRef) -> Blobs:
        return self

    async def read(self, _offset: int, _size: int) -> bytes:
        self.read_often += 1
        await self.gate.wait()
        return INDEX

    async def close(self) -> None:
        await trio.lowlevel.checkpoint()

    def prefetch(self, wants: Iterable[BlobRef]) -> None:
        self.fetched += [want.path for want in wants]


async def opened(following: Following, path: str) -> None:
    await following.opened(BlobFile(SNAPSHOT.files[path], SNAPSHOT, path, executable=False))


async def test_what_is_opened_while_an_index_is_read_is_followed_too() -> None:
    async with trio.open_nursery() as nursery:
        blobs = Blobs(nursery)
        following = Following(cast(Any, Commits()), cast(Any, blobs))
        await opened(following, "a.safetensors")
        await trio.testing.wait_all_tasks_blocked()
        await opened(following, PARTS[0])
        assert blobs.fetched == []
        blobs.gate.set()
    assert blobs.fetched == PARTS[1:]
    assert blobs.read_often == 1, "what is known is not read again"


async def test_so_many_are_remembered_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heliosfs.following.MAX_OPENED", 2)
    async with trio.open_nursery() as nursery:
        blobs = Blobs(nursery)
        following = Following(cast(Any, Commits()), cast(Any, blobs))
        for path in ("a.safetensors", PARTS[2], PARTS[0]):
            await opened(following, path)
        blobs.gate.set()
    assert blobs.fetched == PARTS[:2], "of the third file that was opened nothing follows"
