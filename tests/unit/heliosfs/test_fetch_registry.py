"""A registry as a source: what it asks, and what it makes of odd answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace

import pytest

from helios.errors import DeadlineExceeded, IntegrityError, NotFound, Unavailable
from helios.http.response import Watch
from helios.names import RepoId
from heliosfs.fetch.registry import RegistrySource
from heliosfs.fetch.source import BlobRef, CorruptChunk
from heliosfs.store.recipe import MAX_CHUNK, Recipe
from tests.support.origin import REPO, Made, Origin

CHUNK = MAX_CHUNK


@pytest.fixture
def source(origin: Origin) -> Iterator[RegistrySource]:
    with closing(RegistrySource(origin.url, timeout_s=2.0, connections=4)) as source:
        yield source


def fetch(source: RegistrySource, want: BlobRef, recipe: Recipe, chunks: range, timeout_s: float = 2.0) -> list[bytes]:
    out: list[bytes] = []
    ask(source, want, recipe, chunks, lambda i, data: out.append(bytes(data)), timeout_s)
    return out


def ask(
    source: RegistrySource,
    want: BlobRef,
    recipe: Recipe,
    chunks: range,
    deliver: Callable[[int, memoryview], None],
    timeout_s: float = 2.0,
    *,
    urgent: bool = False,
) -> None:
    buffer = memoryview(bytearray(CHUNK))
    source.fetch(want, recipe, chunks, buffer, deliver, timeout_s, urgent=urgent, watch=Watch())


def test_a_range_over_several_objects(origin: Origin, source: RegistrySource) -> None:
    want = origin.add(Made(10 * CHUNK), spread=4)
    recipe = Recipe.decode(source.recipe(want, 2.0), want.recipe_digest)
    got = fetch(source, want, recipe, range(3, 9))
    assert got == [origin.data(want, i * CHUNK, CHUNK) for i in range(3, 9)]
    lengths = [length // CHUNK for _, length in origin.spans()]
    assert lengths == [1, 4, 1], "one request for each object"
    assert source.latency_s > 0


def test_the_placement_is_asked_for_once(origin: Origin, source: RegistrySource) -> None:
    want = origin.add(Made(4 * CHUNK))
    recipe = origin.recipe(want)
    threads = [threading.Thread(target=fetch, args=(source, want, recipe, range(i, i + 1))) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert origin.count("/placements") == 1
    source.refresh(want, recipe, 2.0)
    assert origin.count("/placements") == 2


def test_another_repository_that_holds_the_blob_will_do(origin: Origin, source: RegistrySource) -> None:
    want = replace(origin.add(Made(2 * CHUNK)), repo=RepoId.parse("org/removed"))
    with pytest.raises(NotFound):
        source.recipe(want, 2.0)
    twin = want.beside(replace(want, repo=REPO, also=(RepoId.parse("org/gone"), want.repo)))
    assert twin.also == (REPO, RepoId.parse("org/gone"))
    assert fetch(source, twin, Recipe.decode(source.recipe(twin, 2.0)), range(2)) == [
        origin.data(want, i * CHUNK, CHUNK) for i in range(2)
    ]


def test_an_exception_of_the_receiver_ends_the_read(origin: Origin, source: RegistrySource) -> None:
    want = origin.add(Made(4 * CHUNK))

    def refuse(index: int, data: memoryview) -> None:
        raise CorruptChunk(index, "no")

    with pytest.raises(CorruptChunk):
        ask(source, want, origin.recipe(want), range(4), refuse)
    assert fetch(source, want, origin.recipe(want), range(1))  # on another connection: that one was not at its end


def test_absolute_urls_go_to_their_host(origin: Origin, monkeypatch: pytest.MonkeyPatch) -> None:
    """A presigned URL leads to the object store, query and all."""
    with Origin() as bucket:
        want = bucket.add(Made(2 * CHUNK))
        origin.add(Made(2 * CHUNK))
        placement = origin._placement

        def absolute(blob: object) -> bytes:
            return (
                placement(blob)
                .replace(b'"url": "', f'"url": "{bucket.url}'.encode())
                .replace(  # type: ignore[arg-type]
                    want.sha256.encode() + b'", "size"', want.sha256.encode() + b'?sig=a%2Fb", "size"'
                )
            )

        monkeypatch.setattr(origin, "_placement", absolute)
        with closing(RegistrySource(origin.url, timeout_s=2.0, connections=4)) as source:
            assert fetch(source, want, bucket.recipe(want), range(2)) == [
                bucket.data(want, i * CHUNK, CHUNK) for i in (0, 1)
            ]
        assert origin.count("/objects/") == 0
        assert [r.query for r in bucket.requests] == [{"sig": "a/b"}]


@pytest.mark.parametrize(
    ("status", "error"),
    [(404, NotFound), (403, NotFound), (410, NotFound), (503, Unavailable), (429, Unavailable), (200, Unavailable)],
)
def test_statuses(origin: Origin, source: RegistrySource, status: int, error: type[Exception]) -> None:
    want = origin.add(Made(CHUNK))
    origin.fault("status", "/objects/", status=status)
    with pytest.raises(error):
        fetch(source, want, origin.recipe(want), range(1))
    assert fetch(source, want, origin.recipe(want), range(1)), "the next try is fine"


def test_an_unknown_blob(origin: Origin, source: RegistrySource) -> None:
    want = origin.add(Made(CHUNK))
    with pytest.raises(NotFound, match="no such blob"):
        source.recipe(replace(want, sha256="0" * 64), 2.0)


def test_a_broken_connection_is_no_wrong_byte(origin: Origin, source: RegistrySource) -> None:
    want = origin.add(Made(CHUNK))
    for path, call in (
        ("/recipe", lambda: source.recipe(want, 2.0)),
        ("/objects/", lambda: fetch(source, want, origin.recipe(want), range(1))),
    ):
        for kind in ("truncate", "reset"):
            origin.fault(kind, path, after=50)  # type: ignore[arg-type]
            with pytest.raises(Unavailable):
                call()


def test_an_answer_without_end_is_refused(
    origin: Origin, source: RegistrySource, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = origin.add(Made(CHUNK))
    monkeypatch.setattr("heliosfs.fetch.registry.MAX_RECORD", 60)
    with pytest.raises(IntegrityError, match="more than 60"):
        source.recipe(want, 2.0)


def test_each_chunk_has_the_whole_time(origin: Origin, source: RegistrySource) -> None:
    """A long range that keeps coming is not cut off; one chunk that trickles is."""
    want = origin.add(Made(8 << 20), cuts=[1 << 20] * 8)
    origin.throttle.rate = 3e6  # 0.35 s a chunk
    started = time.monotonic()
    assert len(fetch(source, want, origin.recipe(want), range(8), timeout_s=2.0)) == 8
    assert time.monotonic() - started > 2.5
    origin.throttle.rate = 100e3
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        fetch(source, want, origin.recipe(want), range(1), timeout_s=0.5)
    assert time.monotonic() - started < 5
