"""Reading bodies: bounds, what is counted is given back, and what is on disk is what came."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from functools import partial

import pytest

from router.errors import ApiError
from router.relay.intake import IN_MEMORY, Budget, Intake
from router.relay.spool import Spool
from router.routes import InferenceRoute

JSON = InferenceRoute("/v1/completions")
FORM = InferenceRoute("/v1/audio/transcriptions", body="form")
KIND = (b"content-type", b"multipart/form-data; boundary=b")


def read(
    route: InferenceRoute, *pieces: bytes, header: tuple[bytes, bytes] = KIND, limit: int = 1 << 24,
    budget: Budget | None = None,
) -> Intake:  # fmt: skip
    budget = budget or Budget(1 << 30)
    intake = Intake(route, [header], limit, budget)
    try:
        for piece in pieces:
            intake.feed(piece)
        intake.finish()
    except ApiError:
        intake.release()
        raise
    return intake


def test_json_is_joined_and_its_memory_given_back() -> None:
    budget = Budget(1000)
    body = read(JSON, b'{"mod', b"", b'el":"m"}', budget=budget)
    assert (body.content, body.model, budget.used, body.size) == (b'{"model":"m"}', "m", 13, 13)
    body.release()
    assert (budget.used, body.content) == (0, b"")
    body.release()
    assert budget.used == 0


@pytest.mark.parametrize(
    ("pieces", "status"),
    [([b"x" * 11], 413), ([b"x" * 5, b"y" * 6], 413), ([b"nonsense"], 400), ([b"x" * 9, b"y"], 503)],
)
def test_refused_bodies_are_not_counted(pieces: list[bytes], status: int) -> None:
    budget = Budget(9)
    with pytest.raises(ApiError) as refused:
        read(JSON, *pieces, limit=10, budget=budget)
    assert (refused.value.status, budget.used) == (status, 0)


def test_an_announced_length_is_enough_to_refuse() -> None:
    with pytest.raises(ApiError) as refused:
        read(JSON, header=(b"content-length", b"11"), limit=10)
    assert refused.value.status == 413


def test_only_identity_is_decoded() -> None:
    assert read(JSON, b'{"model":"m"}', header=(b"content-encoding", b"Identity")).model == "m"
    with pytest.raises(ApiError) as refused:
        read(JSON, header=(b"content-encoding", b"br"))
    assert refused.value.status == 415


def form(size: int) -> list[bytes]:
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
    tail = b'\r\n--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n--b--\r\n'
    data = head + bytes(i % 251 for i in range(size)) + tail
    return [data[i : i + 65536] for i in range(0, len(data), 65536)]


async def called(start: Callable[[Callable[..., None]], None]) -> tuple[object, ...]:
    """What a callback was called with."""
    future: asyncio.Future[tuple[object, ...]] = asyncio.get_running_loop().create_future()
    start(lambda *found: future.set_result(found))
    return await asyncio.wait_for(future, 10)


async def all_of(spool: Spool) -> bytes:
    out = b""
    while len(out) < spool.size:
        data, error = await called(partial(spool.read, len(out), 100_000))
        assert error is None
        assert isinstance(data, bytes)
        out += data
    return out


@pytest.mark.parametrize("size", [10, IN_MEMORY - 500, 3 * IN_MEMORY])
def test_forms_keep_their_bytes_and_can_be_sent_twice(size: int) -> None:
    async def main() -> None:
        pieces, budget = form(size), Budget(2 * IN_MEMORY)
        intake = Intake(FORM, [KIND], 1 << 24, budget)
        for piece in pieces:
            intake.feed(piece)
            if intake.full:
                assert await called(intake.flush) == (None,)
                assert budget.used == 0
        intake.finish()
        assert intake.model == "m"
        assert intake.size == len(b"".join(pieces))
        assert (intake.spool is not None) == (size > IN_MEMORY)
        for _ in range(2):
            beginning = b"" if intake.spool is None else await all_of(intake.spool)
            assert beginning + intake.content == b"".join(pieces)
        descriptors = len(os.listdir("/proc/self/fd"))
        intake.release()
        assert budget.used == 0
        assert len(os.listdir("/proc/self/fd")) == descriptors - (size > IN_MEMORY)

    asyncio.run(main())


def test_a_body_given_up_while_it_is_written_gives_all_back_when_that_is_over() -> None:
    async def main() -> None:
        budget = Budget(1 << 30)
        intake = Intake(FORM, [KIND], 1 << 24, budget)
        for piece in form(2 * IN_MEMORY):
            intake.feed(piece)
        descriptors = len(os.listdir("/proc/self/fd"))
        writing = asyncio.create_task(called(intake.flush))
        await asyncio.sleep(0)
        intake.release()
        await writing
        assert budget.used == 0
        assert len(os.listdir("/proc/self/fd")) == descriptors

    asyncio.run(main())


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/proc")  # where no file can be made

    async def main() -> None:
        budget = Budget(1 << 30)
        intake = Intake(FORM, [KIND], 1 << 24, budget)
        intake.feed(form(10)[0])
        (error,) = await called(intake.flush)
        assert isinstance(error, OSError)
        assert budget.used == 0
        intake.release()

    asyncio.run(main())
