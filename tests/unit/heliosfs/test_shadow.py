"""Which reads are compared with a plain download, how many wait, and how the download asks."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from helios.errors import Unavailable, UsageError
from helios.metrics import MountMetrics
from helios.names import RepoId
from heliosfs.fetch.source import BlobRef
from heliosfs.shadow.plain import PlainDownload, path_of
from heliosfs.shadow.samples import BLOCK, MAX_BYTES, MAX_RANGES, MAX_WAITING, Latency, Sampler, Tally
from heliosfs.shadow.shadow import STUCK, Shadow
from tests.support.stores import until

DATA = random.Random(3).randbytes(5000)
REPO, COMMIT = RepoId.parse("org/name"), "c" * 40


def want_of(path: str = "a/b c.json", repo: RepoId = REPO, size: int = len(DATA)) -> BlobRef:
    return BlobRef(repo, COMMIT, path, "0" * 64, size, "0" * 64)


# --- choosing ---


@given(st.integers(0, 1 << 40), st.floats(0.001, 100), st.integers())
def test_ranges_lie_in_the_file_and_do_not_overlap(size: int, percent: float, seed: int) -> None:
    found = Sampler(percent, random.Random(seed)).ranges(size)
    assert len(found) == len({offset for offset, _ in found}) <= MAX_RANGES
    assert all(0 <= offset < offset + count <= size and count <= BLOCK for offset, count in found)
    assert all(offset % BLOCK == 0 and (count == BLOCK or offset + count == size) for offset, count in found)
    if percent == 100:
        assert len(found) == min(MAX_RANGES, -(-size // BLOCK))


@pytest.mark.parametrize("percent", [1, 10, 50])
def test_about_so_many_reads_and_blocks_are_taken(percent: float) -> None:
    sampler = Sampler(percent, random.Random(1))
    assert sum(sampler.one() for _ in range(20_000)) == pytest.approx(200 * percent, rel=0.2)
    blocks = sum(len(sampler.ranges(3 * BLOCK - 1)) for _ in range(5000))
    assert blocks == pytest.approx(5000 * 3 * percent / 100, rel=0.2)


class Waiting(RuleBasedStateMachine):
    """What waits is bounded, whatever comes; nothing is lost but what was counted as dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.tally = Tally(10)
        self.held: list[int] = []
        self.offered = self.ended = 0

    @rule(count=st.integers(1, BLOCK), times=st.integers(1, 40))
    def offer(self, count: int, times: int) -> None:
        for _ in range(times):
            self.offered += 1
            if self.tally.admit(count):
                self.held.append(count)

    @precondition(lambda self: self.held)
    @rule(drop=st.booleans())
    def end(self, drop: bool) -> None:
        if drop:
            self.tally.drop(self.held.pop())
        else:
            self.tally.done(self.held.pop())
            self.ended += 1

    @invariant()
    def bounded(self) -> None:
        assert self.tally.waiting == len(self.held) <= MAX_WAITING
        assert self.tally.waiting_bytes == sum(self.held) <= MAX_BYTES
        assert self.tally.dropped == self.offered - self.ended - len(self.held)


TestWaiting = Waiting.TestCase


def test_latencies_by_nearest_rank() -> None:
    assert Latency.of([]) == Latency(0, 0.0, 0.0)
    assert Latency.of([3.0]) == Latency(1, 3.0, 3.0)
    assert Latency.of([float(n) for n in range(100, 0, -1)]) == Latency(100, 50.0, 99.0)


@pytest.mark.parametrize("percent", [-1, 0, 100.1, float("nan")])
def test_a_share_that_is_none_is_refused(percent: float) -> None:
    with pytest.raises(UsageError):
        Shadow(percent, PlainDownload([], 1.0), MountMetrics())


# --- downloading ---

Answer = Callable[[BaseHTTPRequestHandler], tuple[int, dict[str, str], bytes]]


@contextlib.contextmanager
def hub(answer: Answer) -> Iterator[tuple[str, list[str]]]:
    """A server that answers as told; gives its URL, and the paths it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked.append(self.path)
            status, headers, body = answer(self)
            self.send_response(status)
            for name, value in {"content-length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()


def ranged(handler: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
    first, last = map(int, handler.headers["range"].removeprefix("bytes=").split("-"))
    return 206, {"content-range": f"bytes {first}-{last}/{len(DATA)}"}, DATA[first : last + 1]


def fetch(url: str, *, offset: int = 100, count: int = 50) -> bytes:
    with contextlib.closing(PlainDownload([url], 5.0)) as plain:
        return bytes(plain.fetch(want_of(), offset, count))


def test_a_file_is_asked_for_as_any_client_does() -> None:
    assert path_of(want_of()) == f"/org/name/resolve/{COMMIT}/a/b%20c.json"
    assert path_of(want_of("x", RepoId.parse("gpt2"))) == f"/gpt2/resolve/{COMMIT}/x"
    assert path_of(want_of("x", RepoId.parse("o/d", "datasets"))) == f"/datasets/o/d/resolve/{COMMIT}/x"
    with hub(ranged) as (url, asked):
        assert fetch(url) == DATA[100:150]
        assert fetch(url, offset=0, count=len(DATA)) == DATA
    assert asked == [path_of(want_of())] * 2


def test_redirects_are_followed_to_other_hosts_too_but_not_for_ever() -> None:
    with hub(ranged) as (store, asked):

        def signed(handler: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
            return 302, {"location": f"{store}/bucket/object?signature=1%2F2"}, b""

        def relative(handler: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
            return (307, {"location": "/other"}, b"") if "resolve" in handler.path else ranged(handler)

        def endless(handler: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
            return 301, {"location": handler.path}, b""

        with hub(signed) as (url, _):
            assert fetch(url) == DATA[100:150]
        assert asked == ["/bucket/object?signature=1%2F2"]
        with hub(relative) as (url, _):
            assert fetch(url) == DATA[100:150]
        with hub(endless) as (url, _), pytest.raises(Unavailable, match="redirected"):
            fetch(url)


@pytest.mark.parametrize(
    "answer",
    [(200, b"x" * 50), (206, b"x" * 49), (404, b"x" * 50), (500, b""), (302, b"")],
    ids=["ignores the range", "short", "gone", "broken", "leads nowhere"],
)
def test_what_is_no_answer_is_an_error_and_no_mismatch(answer: tuple[int, bytes]) -> None:
    with hub(lambda _: (answer[0], {}, answer[1])) as (url, _), pytest.raises(Unavailable):
        fetch(url)


def test_a_body_that_breaks_off_is_an_error() -> None:
    def broken(handler: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
        handler.close_connection = True
        return 206, {"content-length": "50"}, b"x" * 20

    with hub(broken) as (url, _), pytest.raises(Unavailable):
        fetch(url)


def test_a_file_that_is_shorter_there_is_a_mismatch() -> None:
    with hub(lambda _: (416, {}, b"")) as (url, _):
        assert fetch(url) == b""


def test_the_next_registry_is_asked_when_one_is_dead() -> None:
    with hub(ranged) as (url, _), contextlib.closing(PlainDownload(["http://127.0.0.1:9", url], 5.0)) as plain:
        assert plain.fetch(want_of(), 0, 10) == DATA[:10]


# --- comparing ---


@pytest.mark.trio
async def test_files_that_the_kernel_reads_are_read_from_the_same_file(
    tmp_path: Path, nursery: object, expected_log_errors: Callable[[str], None]
) -> None:
    expected_log_errors("the mount and a plain download differ")
    path = tmp_path / "blob"
    path.write_bytes(DATA[:4000] + b"?" + DATA[4001:])
    with hub(ranged) as (url, _), contextlib.closing(PlainDownload([url], 5.0)) as plain:
        shadow = Shadow(100, plain, MountMetrics())
        shadow.read(want_of(), 0, [DATA], 0.1)
        assert shadow.report().waiting == 0, "nothing is taken before it runs"
        await nursery.start(shadow.run)  # type: ignore[attr-defined]
        fd = os.open(path, os.O_RDONLY)
        shadow.opened(want_of(), fd)
        os.close(fd)  # as when the user closes it at once
        path.unlink()
        await until(lambda: shadow.report().mismatches)
        (found,) = shadow.report().last_mismatches
        assert (found.way, found.first, found.offset, found.count) == ("passthrough", 4000, 0, len(DATA))
        shadow.read(want_of(), 10, [DATA[10:20], memoryview(DATA)[20:30]], 0.1)
        await until(lambda: shadow.report().compared == 2 and not shadow.report().waiting)
        assert shadow.report().mismatches == 1
        shadow.opened(want_of(), 1 << 20)  # a descriptor that is none: the user's open must not fail for that
        assert shadow.report().dropped == 1
        assert shadow.report().waiting == 0
        nursery.cancel_scope.cancel()  # type: ignore[attr-defined]


@pytest.mark.trio
async def test_files_on_a_disk_that_hangs_are_given_up_and_counted_and_the_rest_is_compared(
    tmp_path: Path, nursery: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, go_on, real = tmp_path / "blob", threading.Event(), os.pread
    path.write_bytes(DATA)

    def pread(fd: int, count: int, offset: int) -> bytes:
        go_on.wait(30)
        return real(fd, count, offset)

    monkeypatch.setattr("heliosfs.shadow.shadow.os.pread", pread)
    monkeypatch.setattr("heliosfs.shadow.shadow.DISK_S", 0.1)
    metrics = MountMetrics()
    with hub(ranged) as (url, _), contextlib.closing(PlainDownload([url], 5.0)) as plain:
        shadow = Shadow(100, plain, metrics)
        await nursery.start(shadow.run)  # type: ignore[attr-defined]
        with path.open("rb") as file:
            try:
                for _ in range(STUCK + 2):  # all find a place to wait before the first is given up
                    shadow.opened(want_of(), file.fileno())
                await until(lambda: shadow.report().mount_errors == STUCK + 2)
                shadow.opened(want_of(), file.fileno())
                assert (shadow.report().dropped, shadow.report().waiting) == (1, 0)
                shadow.read(want_of(), 0, [DATA], 0.1)
                await until(lambda: shadow.report().compared == 1)
            finally:
                go_on.set()
            await until(lambda: shadow._readers.available_tokens == STUCK)
            shadow.opened(want_of(), file.fileno())
            await until(lambda: shadow.report().compared == 2)
        assert (shadow.report().mismatches, shadow.report().dropped) == (0, 1)
        nursery.cancel_scope.cancel()  # type: ignore[attr-defined]
