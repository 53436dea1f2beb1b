"""Which headers go on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.errors import ApiError
from router.relay import headers
from router.relay.headers import HOP_BY_HOP

NAMES = st.sampled_from(
    [b"accept", b"authorization", b"x-a", b"x-b", b"connection", b"host", b"content-length", *sorted(HOP_BY_HOP)]
)
VALUES = st.sampled_from([b"", b"1", b"x-a", b"X-B, close", b"keep-alive", "grüß".encode()])


@given(st.lists(st.tuples(NAMES, VALUES)))
def test_requests_lose_what_concerns_the_connection_and_nothing_else(given_headers: list[tuple[bytes, bytes]]) -> None:
    sent = headers.to_worker(given_headers, "id")
    named = {t.strip().lower() for k, v in given_headers if k == b"connection" for t in v.split(b",")}
    dropped = HOP_BY_HOP | {b"host", b"content-length"} | named
    expected = [(k.decode(), v.decode()) for k, v in given_headers if k not in dropped]
    assert list(sent.items()) == [*expected, ("x-request-id", "id")]


@given(st.lists(st.tuples(NAMES, VALUES)))
def test_answers_lose_what_concerns_the_connection_and_nothing_else(raw: list[tuple[bytes, bytes]]) -> None:
    sent = headers.to_client([(k.title(), v) for k, v in raw], "id")
    named = {t.strip().lower() for k, v in raw if k == b"connection" for t in v.split(b",")}
    expected = [(k, v) for k, v in raw if k not in HOP_BY_HOP | named]
    assert sent == [*expected, (b"x-request-id", b"id")]


def test_a_workers_own_request_id_stands() -> None:
    assert headers.to_client([(b"X-Request-Id", b"theirs")], "ours") == [(b"x-request-id", b"theirs")]


def test_a_header_that_is_not_text_is_refused() -> None:
    with pytest.raises(ApiError, match="x-odd"):
        headers.to_worker([(b"x-odd", b"\xff")], "id")


def test_request_ids() -> None:
    assert headers.request_id([(b"x-request-id", b"a-b_c.1")]) == "a-b_c.1"
    made = {headers.request_id(raw) for raw in ([], [(b"x-request-id", b"a b")], [(b"x-request-id", b"x" * 200)])}
    assert len(made) == 3
    assert all(len(one) == 32 for one in made)
