"""Which headers of a request go on. Those of answers: test_framing.py."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.relay import headers
from router.relay.trace import Trace

OURS = [b"host", b"content-length", b"expect", b"x-request-id", b"traceparent"]
TRACE = Trace(b"a" * 32, b"00-%b-%b-01" % (b"a" * 32, b"b" * 16), continued=True, caller=b"c" * 16)
HOP_BY_HOP = [
    b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"proxy-authorization",
    b"proxy-connection", b"proxy-authenticate", b"http2-settings",
]  # fmt: skip
NAMES = st.sampled_from([b"accept", b"authorization", b"x-a", b"x-b", *OURS, *HOP_BY_HOP])
VALUES = st.sampled_from([b"", b"1", b"x-a", b"X-B, close", b"keep-alive", "grüß".encode(), b"\xff"])


@given(st.lists(st.tuples(NAMES, VALUES)))
def test_requests_lose_what_concerns_the_connection_and_nothing_else(raw: list[tuple[bytes, bytes]]) -> None:
    sent = headers.to_worker(raw, b"id", TRACE)
    named = {t.strip().lower() for k, v in raw if k == b"connection" for t in v.split(b",")}
    expected = [b"%b: %b" % (k, v) for k, v in raw if k not in {*OURS, *HOP_BY_HOP, *named}]
    assert sent.split(b"\r\n") == [b"x-request-id: id", b"traceparent: " + TRACE.parent, *expected, b""]


def test_no_client_tells_a_worker_s_sidecar_where_to_connect() -> None:
    raw = [(name, b"10.0.0.9:22") for name in headers.HOSTS] + [(b"x-data-parallel-rank", b"1")]
    sent = headers.to_worker([*raw, *raw], b"id", TRACE)
    assert b"10.0.0.9" not in sent
    assert sent.count(b"x-data-parallel-rank: 1\r\n") == 2


def test_request_ids() -> None:
    assert headers.request_id([(b"x-request-id", b"a-b_c.1")]) == b"a-b_c.1"
    made = {headers.request_id(raw) for raw in ([], [(b"x-request-id", b"a b")], [(b"x-request-id", b"x" * 200)])}
    assert len(made) == 3
    others = [(b"request-id", b"c"), (b"x-correlation-id", b"b")]
    assert headers.request_id(others) == b"b"
    assert headers.request_id([*others, (b"x-request-id", b"a")]) == b"a"
    assert headers.request_id([(b"x-request-id", b"not visible"), *others]) == b"b"
    assert all(len(one) == 32 for one in made)
