"""Xorbs are made from verified parts of the store's objects: exactly, over a socket as well, and never from damage."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helios.errors import IntegrityError
from helios.http.sendfile import FileEnded, drive
from heliosfs.store.directory import DirectoryStore
from heliosfs.store.placement import PlacedBlob, PlacedObject, Placement, Run
from heliosfs.store.recipe import Recipe
from registry.hub.verified import VerifiedReader, Wanted
from registry.xet import frames as module
from registry.xet.frames import frames
from registry.xet.layout import Xorb
from tests.support.damage import flip

WANTED = Wanted("models/o/m", "c" * 40, "w.onnx")
BLOB = "b" * 64
PIECES = [7, 1, 300, 64, 1, 1, 129, 500, 33, 800, 2, 162]
"""Chunks of the xorb, 2000 bytes in all."""
CHUNK = 450
"""Of the store's own, which share no boundary with them."""


class Stored:
    """2000 bytes twice over: the xorb has them once, its middle placed in the second copy. In two objects."""

    def __init__(self, root: Path) -> None:
        self.store = DirectoryStore(root)
        half = bytes(blake3(b"content").digest(2000))
        self.content = half * 2
        chunks = [self.content[at : at + CHUNK] for at in range(0, len(self.content), CHUNK)]
        recipe = Recipe.build(BLOB, [(blake3(c).digest(), len(c)) for c in chunks])
        objects = []
        for key, data in (
            ("public/packs/aa/x", b"p" * 77 + b"".join(chunks[:3])),
            ("public/blobs/bb/y", b"".join(chunks[3:])),
        ):
            self.store.put_bytes(key, data)
            objects.append(PlacedObject(key, f"/api/v1/objects/{key}", len(data)))
        runs = [Run(0, 3, 0, 77), Run(3, len(chunks) - 3, 1, 0)]
        self.blob = PlacedBlob(recipe, Placement(BLOB, 1, 300.0, objects, runs))
        ends = [0, *accumulate(PIECES)]
        self.xorb = Xorb(b"x" * 32, PIECES)
        # Chunks 0 to 4 from the first copy, 4 to 9 from the second, the rest from the first.
        assert self.xorb.place([(0, 4, 0), (4, 9, 2000 + ends[4]), (9, 12, ends[9])])
        heads = [length.to_bytes(3, "little") for length in PIECES]
        self.served = b"".join(
            b"\0" + h + b"\0" + h + half[a:b] for h, (a, b) in zip(heads, pairwise(ends), strict=True)
        )


@pytest.fixture
def stored(tmp_path: Path) -> Iterator[Stored]:
    found = Stored(tmp_path / "store")
    with contextlib.closing(found.store):
        yield found


@pytest.fixture
def reader(stored: Stored) -> Iterator[VerifiedReader]:
    with contextlib.closing(VerifiedReader(stored.store, lambda: None)) as found:
        yield found


def read(reader: VerifiedReader, stored: Stored, start: int, stop: int, most: int) -> bytes:
    async def main() -> bytes:
        out = bytearray()
        async with contextlib.aclosing(frames(reader, stored.blob, stored.xorb, start, stop, WANTED)) as parts:
            async for part in parts:
                done = 0
                while done < part.count:
                    data = part.read(done, min(most, part.count - done))
                    assert data
                    done += len(data)
                    out += data
        return bytes(out)

    return asyncio.run(main())


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_range_in_any_pieces(stored: Stored, reader: VerifiedReader, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(stored.served) - 1))
    stop = data.draw(st.integers(start + 1, len(stored.served)))
    most = data.draw(st.integers(1, 700))
    assert read(reader, stored, start, stop, most) == stored.served[start:stop]


def test_over_a_socket_that_takes_little(
    stored: Stored, reader: VerifiedReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the socket doesn't take is put together again."""
    monkeypatch.setattr(module, "PIECE", 300)
    monkeypatch.setattr(module, "_thread", module._Thread())
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    ours.setblocking(False)

    def receive() -> bytes:
        out = bytearray()
        while len(out) < len(stored.served) and (data := theirs.recv(97)):
            out += data
        return bytes(out)

    async def main() -> bytes:
        with ThreadPoolExecutor(2) as threads:
            got = asyncio.ensure_future(asyncio.to_thread(receive))
            parts = frames(reader, stored.blob, stored.xorb, 0, len(stored.served), WANTED)
            async with contextlib.aclosing(parts):
                async for part in parts:
                    assert await drive(threads, ours.fileno(), part.move, part.count) == part.count
            return await got

    with ours, theirs:
        assert asyncio.run(main()) == stored.served


def test_many_small_chunks_at_once(stored: Stored, reader: VerifiedReader, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than one call may fill buffers."""
    monkeypatch.setattr(module, "IOV_MAX", 2)
    assert read(reader, stored, 0, len(stored.served), 10_000) == stored.served


def test_two_in_turn_in_one_thread(stored: Stored, reader: VerifiedReader) -> None:
    """Each gets its own bytes, although they share the thread's buffer."""

    async def main() -> None:
        one, other = (frames(reader, stored.blob, stored.xorb, at, at + 400, WANTED) for at in (0, 700))
        async with contextlib.aclosing(one), contextlib.aclosing(other):
            a, b = await anext(one), await anext(other)
            for _ in range(2):
                for at in (0, 10, 30):
                    assert a.read(at, 20) == stored.served[at : at + 20]
                    assert b.read(at, 7) == stored.served[700 + at : 707 + at]

    asyncio.run(main())


def test_a_damaged_chunk_never_leaves(stored: Stored, reader: VerifiedReader, expected_log_errors: Any) -> None:
    """The store's chunk that holds bytes 2700 to 3150 of the blob is what chunks 7 and 8 of the xorb come from."""
    expected_log_errors("a chunk in the store is damaged")
    flip(stored.store.root / "public/blobs/bb/y", 2750 - 3 * CHUNK)
    with pytest.raises(IntegrityError, match="chunk 6"):
        read(reader, stored, 0, len(stored.served), 1000)
    at = stored.xorb.position(4)
    assert read(reader, stored, 0, at, 1000) == stored.served[:at]


def test_an_object_that_became_shorter_is_an_error(stored: Stored, reader: VerifiedReader) -> None:
    async def main() -> None:
        async with contextlib.aclosing(frames(reader, stored.blob, stored.xorb, 0, 100, WANTED)) as parts:
            part = await anext(parts)
            path = stored.store.root / "public/packs/aa/x"
            path.chmod(0o600)
            with path.open("r+b") as file:
                file.truncate(80)
            with pytest.raises(FileEnded, match="shorter"):
                part.read(0, 100)

    asyncio.run(main())
