"""A manifest whose recipe is of other bytes than its sha256: every chunk verifies, and the file is not the blob.

Whoever reads under that manifest gets what it names; nobody else gets one byte of it, before, while or after it is
filled. Two honest recipes of one content, cut differently, are no lie, and each reads what the other brought.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from heliosfs.blobs import BlobRef
from heliosfs.tiers import doubt
from tests.support.origin import Origin
from tests.support.stores import filled, idle, read, running

MIB = 1 << 20
DATA, OTHER = random.Random(1).randbytes(3 * MIB), random.Random(2).randbytes(3 * MIB)


def beginning(want: BlobRef, commit: str) -> BlobRef:
    return dataclasses.replace(want, commit=commit * 40)


@pytest.fixture
def honest(origin: Origin) -> BlobRef:
    return beginning(origin.add(DATA), "a")


@pytest.fixture
def forged(other: Origin) -> BlobRef:
    return beginning(other.add(OTHER, named=hashlib.sha256(DATA).hexdigest()), "b")


@pytest.mark.trio
async def test_a_file_made_by_a_liar_is_nobody_elses(
    tmp_path: Path, origin: Origin, other: Origin, honest: BlobRef, forged: BlobRef, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tmp_path, [other.url]) as store:
        assert await read(store, forged, 0, len(OTHER)) == OTHER
        await filled(store, forged)
    async with running(tmp_path, [origin.url]) as store:
        assert await read(store, honest, MIB, 2 * MIB) == DATA[MIB:]
        await filled(store, honest)
    assert any("does not have the sha256" in record.message for record in caplog.records)
    async with running(tmp_path, [other.url]) as store:
        assert await read(store, forged, 0, len(DATA)) == DATA, "what is right is used, whoever asks"
    assert hashlib.sha256(next(tmp_path.glob("blobs/*/*")).read_bytes()).hexdigest() == honest.sha256


@pytest.mark.trio
async def test_a_partial_file_of_a_liar_is_nobody_elses(
    tmp_path: Path, origin: Origin, other: Origin, honest: BlobRef, forged: BlobRef
) -> None:
    async with running(tmp_path, [other.url]) as store:
        handle = await store.open(forged)
        store._filler._fits = lambda blob: False  # type: ignore[method-assign]
        assert await handle.read(0, 10) == OTHER[:10]
        await handle.close()
        await idle(store)
    async with running(tmp_path, [origin.url]) as store:
        assert await read(store, honest, 0, len(DATA)) == DATA


@pytest.mark.trio
@pytest.mark.parametrize("first", ["forged", "honest"])
async def test_both_are_open_at_once(
    tmp_path: Path,
    origin: Origin,
    other: Origin,
    honest: BlobRef,
    forged: BlobRef,
    first: str,
    expected_log_errors: Callable[[str], None],
) -> None:
    """Each reads what its own manifest names; the one that came second is kept when the first has gone."""
    expected_log_errors("a chunk is corrupt")  # each source is asked for the other's, too
    right = {honest: DATA, forged: OTHER}
    wants = [honest, forged] if first == "honest" else [forged, honest]
    async with running(tmp_path, [origin.url, other.url]) as store:
        handles = [await store.open(want) for want in wants]
        for offset in (0, 2 * MIB, MIB):
            for want, handle in zip(wants, handles, strict=True):
                assert await handle.read(offset, MIB) == right[want][offset : offset + MIB]
        await filled(store, wants[0])
        for want, handle in zip(wants, handles, strict=True):
            assert await handle.read(5, MIB) == right[want][5 : 5 + MIB]
        for handle in handles:
            await handle.close()
        await idle(store)
        assert await read(store, honest, 0, len(DATA)) == DATA
        await filled(store, honest)
        await idle(store)
    assert hashlib.sha256(next(tmp_path.glob("blobs/*/*")).read_bytes()).hexdigest() == honest.sha256


@pytest.mark.trio
async def test_two_honest_recipes_share_the_file(
    tmp_path: Path, origin: Origin, other: Origin, honest: BlobRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, real = list[str](), doubt._is
    monkeypatch.setattr(doubt, "_is", lambda places, sha256: looks.append(sha256) or real(places, sha256))
    recut = beginning(other.add(DATA, cuts=[MIB, 2 * MIB]), "b")
    assert recut.recipe_digest != honest.recipe_digest
    async with running(tmp_path, [origin.url, other.url]) as store:
        handle = await store.open(honest)
        assert await read(store, recut, MIB, MIB) == DATA[MIB : 2 * MIB]
        await filled(store, honest)
        await handle.close()
        await idle(store)
        sent = other.sent()
        for want in (recut, honest, recut):
            assert await read(store, want, 0, len(DATA)) == DATA
        assert other.sent() == sent
    assert looks == [honest.sha256], "its bytes are hashed once"
