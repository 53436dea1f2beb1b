"""The router's place in a W3C trace."""

from __future__ import annotations

import re

import pytest

from router.relay.trace import trace_of

TRACE, SPAN = b"4bf92f3577b34da6a3ce929d0e0e4736", b"00f067aa0ba902b7"
GOOD = b"00-%b-%b-01" % (TRACE, SPAN)


def bits(count: int) -> int:
    return 2**count - 2


def test_a_trace_goes_on_with_a_span_of_the_router() -> None:
    trace = trace_of([(b"a", b"b"), (b"traceparent", GOOD)], bits)
    assert trace.parent == b"00-%b-fffffffffffffffe-01" % TRACE
    assert trace.continued
    assert trace_of([(b"traceparent", b"00-%b-%b-00" % (TRACE, SPAN))], bits).parent.endswith(b"-00")


@pytest.mark.parametrize("later", [b"01-%b-%b-09", b"cc-%b-%b-09-what-comes-then"])
def test_a_later_version_is_read_as_far_as_it_is_known(later: bytes) -> None:
    trace = trace_of([(b"traceparent", later % (TRACE, SPAN))], bits)
    assert trace.parent == b"00-%b-fffffffffffffffe-01" % TRACE


@pytest.mark.parametrize(
    "given",
    [
        b"", b"00-1-2-01", GOOD.upper(), GOOD + b"-x", GOOD + b" x", b"ff" + GOOD[2:], GOOD.replace(TRACE, b"0" * 32),
        GOOD.replace(SPAN, b"0" * 16), GOOD[:-1] + b"g", b"cc" + GOOD[2:] + b".x",
    ],
)  # fmt: skip
def test_what_is_no_traceparent_begins_a_new_trace(given: bytes) -> None:
    trace = trace_of([(b"traceparent", given)], bits)
    assert not trace.continued
    assert re.fullmatch(rb"00-[0-9a-f]{32}-[0-9a-f]{16}-01", trace.parent)
    assert TRACE not in trace.parent


def test_none_or_two_begin_a_new_trace_and_ids_are_never_zero() -> None:
    for raw in ([], [(b"traceparent", GOOD)] * 2):
        trace = trace_of(raw, lambda count: 0)
        assert trace.parent == b"00-%032x-%016x-01" % (1, 1)
