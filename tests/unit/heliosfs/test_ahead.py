"""What reading a commit's files will need is known before they are opened; and a distant chunk comes in pieces."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import trio

from helios.errors import DeadlineExceeded, Unavailable
from heliosfs.fetch import hosts
from heliosfs.fetch.registry import RegistrySource
from heliosfs.fetch.source import BlobRef
from heliosfs.store.chunking import EDGE, LARGE, cut_plain
from heliosfs.store.recipe import MAX_CHUNK, Recipe
from tests.support.origin import COMMIT, REPO, Made, Origin
from tests.support.stores import filled, read, running, until
from tests.unit.heliosfs.test_fetch_registry import ask

CHUNK = MAX_CHUNK


@pytest.fixture
def source(origin: Origin) -> Iterator[RegistrySource]:
    with closing(RegistrySource(origin.url, timeout_s=5.0, connections=32)) as source:
        yield source


def pieces(origin: Origin, source: RegistrySource, want: BlobRef, chunks: range, *, urgent: bool = True) -> list[bytes]:
    out: list[bytes] = []
    recipe = origin.recipe(want)
    ask(source, want, recipe, chunks, lambda i, data: out.append(bytes(data)), 5.0, urgent=urgent)
    return out


@pytest.mark.trio
async def test_one_call_tells_what_all_files_of_a_commit_need(tmp_path: Path, origin: Origin) -> None:
    wants = [origin.add(Made(3 * CHUNK, seed), f"model-{seed}.safetensors") for seed in range(5)]
    async with running(tmp_path, [origin.url]) as store:
        for _ in range(3):
            store.expect(REPO, COMMIT)
        for want in wants:
            assert await read(store, want, CHUNK + 5, 100) == origin.data(want, CHUNK + 5, 100)
            await filled(store, want)
        store.expect(REPO, COMMIT)
    assert origin.count("/content") == 1
    assert origin.count("/recipe") == origin.count("/placements") == 0


@pytest.mark.trio
async def test_connections_are_ready_before_anything_is_asked(tmp_path: Path, origin: Origin) -> None:
    async with running(tmp_path, [origin.url]) as store:
        for _ in range(5):
            store.warm()
        await until(lambda: len(origin._connections) == hosts.NEW_PIECES)
    assert not origin.requests


@pytest.mark.trio
async def test_an_older_registry_is_asked_blob_by_blob(tmp_path: Path, origin: Origin) -> None:
    origin.old = True
    want = origin.add(Made(CHUNK), "data.txt")
    async with running(tmp_path, [origin.url]) as store:
        store.expect(REPO, COMMIT)
        assert await read(store, want, 5, 100) == origin.data(want, 5, 100)
        for number in range(5):
            store.expect(REPO, f"{number:040x}")
            await trio.sleep(0.02)
    assert origin.count("/content") == 1, "it is not asked again for each commit"
    assert origin.count("/recipe") == origin.count("/placements") == 1


@pytest.mark.trio
@pytest.mark.parametrize("kind", ["status", "truncate", "stall"])
async def test_a_failing_answer_delays_nobody_for_long(tmp_path: Path, origin: Origin, kind: str) -> None:
    want = origin.add(Made(CHUNK), "data.txt")
    origin.fault(kind, "/content", times=None, after=30)  # type: ignore[arg-type]
    async with running(tmp_path, [origin.url]) as store:
        store.expect(REPO, COMMIT)
        with trio.fail_after(20):
            assert await read(store, want, 5, 100) == origin.data(want, 5, 100)


@pytest.mark.trio
async def test_nothing_is_believed_that_is_not_checked(tmp_path: Path, origin: Origin) -> None:
    """A placement that contradicts the recipe is asked for once more; a wrong recipe has another digest."""
    want = origin.add(Made(3 * CHUNK), "data.txt", spread=1)
    told = origin._content()
    swapped = told.replace(b'"first": 2, "count": 1', b'"first": 2, "count": 7')
    assert swapped != told
    async with running(tmp_path, [origin.url]) as store:
        origin._content = lambda: swapped  # type: ignore[method-assign]
        store.expect(REPO, COMMIT)
        await until(lambda: origin.count("/content") == 1)
        assert await read(store, want, 2 * CHUNK + 5, 100) == origin.data(want, 2 * CHUNK + 5, 100)
    assert origin.count("/placements") == 1


def test_what_was_learnt_lasts_as_long_as_its_lease(origin: Origin) -> None:
    now = [100.0]
    want = origin.add(Made(CHUNK))
    with closing(RegistrySource(origin.url, timeout_s=5.0, connections=4, clock=lambda: now[0])) as source:
        assert source.ahead(REPO, COMMIT, 5.0) == origin.lease_s
        assert pieces(origin, source, want, range(1)) == [origin.data(want, 0, CHUNK)]
        assert origin.count("/placements") == 0
        now[0] += origin.lease_s
        assert pieces(origin, source, want, range(1)) == [origin.data(want, 0, CHUNK)]
        assert origin.count("/placements") == 1


def test_recipes_that_nobody_takes_are_bounded(origin: Origin, monkeypatch: pytest.MonkeyPatch) -> None:
    wants = [origin.add(Made(CHUNK, seed)) for seed in range(10)]
    monkeypatch.setattr("heliosfs.fetch.registry.MAX_RECIPES", 300)
    with closing(RegistrySource(origin.url, timeout_s=5.0, connections=4)) as source:
        source.ahead(REPO, COMMIT, 5.0)
        assert source._recipe_bytes <= 300
        for want in wants:
            assert Recipe.decode(source.recipe(want, 5.0), want.recipe_digest)
        assert source._recipe_bytes == 0
    assert 0 < origin.count("/recipe") < 10


def test_an_urgent_chunk_comes_over_many_connections(
    origin: Origin, source: RegistrySource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("heliosfs.fetch.hosts.DISTANT_S", 0.0)
    want = origin.add(Made(3 * CHUNK - 1000))
    source.ahead(REPO, COMMIT, 5.0)
    assert source._hosts.own.idle == hosts.NEW_PIECES
    assert pieces(origin, source, want, range(1, 3)) == [
        origin.data(want, CHUNK, CHUNK),
        origin.data(want, 2 * CHUNK, CHUNK),
    ]
    spans = origin.spans()
    assert len(spans) == 64
    assert max(length for _, length in spans) == CHUNK // hosts.NEW_PIECES
    assert sorted(spans)[0][0] == CHUNK
    assert sum(length for _, length in spans) == 2 * CHUNK - 1000
    assert source._hosts.own.idle == hosts.NEW_PIECES, "every connection is kept"


def test_short_chunks_come_together_and_each_is_handed_over_when_it_is_here(
    origin: Origin, source: RegistrySource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first ones of a large file: who waits for its first byte does not wait for what is asked for beside it."""
    monkeypatch.setattr("heliosfs.fetch.hosts.DISTANT_S", 0.0)
    want = origin.add(Made(LARGE), cuts=cut_plain(LARGE))
    source.ahead(REPO, COMMIT, 5.0)
    assert pieces(origin, source, want, range(5)) == [
        origin.data(want, *span) for span in ((0, EDGE), (EDGE, EDGE), (2 * EDGE, 2 * EDGE), (4 * EDGE, 4 * EDGE))
    ] + [origin.data(want, 8 * EDGE, 8 * EDGE)]
    assert len(origin.spans()) == 32, "at once: a round trip for each would take as long as 4 MiB"
    origin.fault("stall", lambda r: r.span is not None and r.span[0] >= 2 * EDGE, times=None)
    got: list[int] = []
    with pytest.raises(DeadlineExceeded):
        ask(source, want, origin.recipe(want), range(5), lambda i, data: got.append(i), 1.0, urgent=True)
    assert got == [0, 1]


@pytest.mark.parametrize("kind", ["status", "truncate", "reset"])
def test_a_piece_that_fails_is_no_wrong_byte(
    origin: Origin, source: RegistrySource, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("heliosfs.fetch.hosts.DISTANT_S", 0.0)
    want = origin.add(Made(CHUNK))
    source.ahead(REPO, COMMIT, 5.0)
    origin.fault(kind, lambda r: r.span is not None and r.span[0] == 10 * CHUNK // hosts.NEW_PIECES, after=500)  # type: ignore[arg-type]
    with pytest.raises(Unavailable):
        pieces(origin, source, want, range(1))
    assert pieces(origin, source, want, range(1)) == [origin.data(want, 0, CHUNK)]


def test_a_connection_that_the_server_closed_meanwhile_costs_nothing(origin: Origin) -> None:
    """It is noticed before it is used; the answers of others are not lost with it."""
    want = origin.add(Made(CHUNK))
    with closing(RegistrySource(origin.url, timeout_s=5.0, connections=32)) as source:
        source.ahead(REPO, COMMIT, 5.0)
        for connection in list(origin._connections):
            connection.shutdown(2)
        time.sleep(0.1)
        assert pieces(origin, source, want, range(1)) == [origin.data(want, 0, CHUNK)]
