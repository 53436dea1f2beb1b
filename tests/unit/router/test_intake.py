"""Reading bodies: bounds, deadlines, and what is counted is given back."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import pytest

from router.errors import ApiError
from router.relay.intake import FORM_IN_MEMORY, Body, Budget, ClientGone, Intake
from router.routes import InferenceRoute

JSON = InferenceRoute("/v1/completions")
FORM = InferenceRoute("/v1/audio/transcriptions", body="form")


def receiver(pieces: Iterable[bytes], end: bool = True) -> Any:
    left = list(pieces)

    async def receive() -> dict[str, Any]:
        if left:
            return {"type": "http.request", "body": left.pop(0), "more_body": bool(left) or not end}
        return {"type": "http.disconnect"}

    return receive


def read(
    route: InferenceRoute,
    receive: Any,
    *headers: tuple[bytes, bytes],
    limit: int = 1 << 24,
    budget: Budget | None = None,
) -> Body:
    intake = Intake(limit, 0.05, budget or Budget(1 << 30))
    return asyncio.run(intake.read(route, {"headers": list(headers)}, receive))


def test_json_is_joined_and_its_memory_given_back() -> None:
    budget = Budget(1000)
    with read(JSON, receiver([b'{"mod', b"", b'el":"m"}']), budget=budget) as body:
        assert (body.content, body.model, budget.used) == (b'{"model":"m"}', "m", 13)
        assert body.payload() == body.content
        body.forget()
        assert (budget.used, body.content) == (0, b"")
    assert budget.used == 0


@pytest.mark.parametrize(
    ("pieces", "status"),
    [([b"x" * 11], 413), ([b"x" * 5, b"y" * 6], 413), ([b"nonsense"], 400), ([b"x" * 9, b"y"], 503)],
)
def test_refused_bodies_are_not_counted(pieces: list[bytes], status: int) -> None:
    budget = Budget(9)
    with pytest.raises(ApiError) as refused:
        read(JSON, receiver(pieces), limit=10, budget=budget)
    assert (refused.value.status, budget.used) == (status, 0)


def test_an_announced_length_is_enough_to_refuse() -> None:
    with pytest.raises(ApiError) as refused:
        read(JSON, receiver([]), (b"content-length", b"11"), limit=10)
    assert refused.value.status == 413


def test_a_client_that_leaves_inside_its_body() -> None:
    budget = Budget(100)
    with pytest.raises(ClientGone):
        read(JSON, receiver([b'{"model"'], end=False), budget=budget)
    assert budget.used == 0


def test_a_body_that_stops_coming() -> None:
    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    with pytest.raises(ApiError) as refused:
        read(JSON, receive)
    assert refused.value.status == 408


def test_only_identity_is_decoded() -> None:
    assert read(JSON, receiver([b'{"model":"m"}']), (b"content-encoding", b"Identity")).model == "m"
    with pytest.raises(ApiError) as refused:
        read(JSON, receiver([b""]), (b"content-encoding", b"br"))
    assert refused.value.status == 415


def form(size: int) -> list[bytes]:
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
    tail = b'\r\n--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n--b--\r\n'
    data = head + bytes(i % 251 for i in range(size)) + tail
    return [data[i : i + 65536] for i in range(0, len(data), 65536)]


@pytest.mark.parametrize("size", [10, FORM_IN_MEMORY - 500, 3 * FORM_IN_MEMORY])
def test_forms_keep_their_bytes_and_can_be_sent_twice(size: int) -> None:
    pieces, budget = form(size), Budget(2 * FORM_IN_MEMORY)
    with read(FORM, receiver(pieces), (b"content-type", b"multipart/form-data; boundary=b"), budget=budget) as body:
        assert body.model == "m"
        for _ in range(2):
            payload = body.payload()
            sent = payload if isinstance(payload, bytes) else payload.read()
            assert sent == b"".join(pieces)
        assert (body.file is not None) == (size > FORM_IN_MEMORY)
        assert budget.used == (0 if body.file else len(sent))
        file = body.file
    assert budget.used == 0
    assert file is None or file.closed


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/proc")  # where no file can be made
    budget = Budget(1 << 30)
    with pytest.raises(ApiError) as refused:
        read(FORM, receiver(form(2 << 20)), (b"content-type", b"multipart/form-data; boundary=b"), budget=budget)
    assert (refused.value.status, budget.used) == (507, 0)
