"""W3C trace context (www.w3.org/TR/trace-context): the router's place in a trace.

``traceparent`` is ``00-<trace id>-<id of the caller's span>-<flags>``. A worker gets the client's trace id with a span
id of the router's, so that what a worker records and what the router logs meet under one trace. A ``traceparent`` that
the specification calls invalid is dropped with its ``tracestate``, and a new trace begins, sampled: as a worker would
begin one itself. The ids are random, no secrets.
"""

from __future__ import annotations

import re
from binascii import hexlify
from collections.abc import Callable, Sequence
from typing import Final

_VALID: Final = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?\Z", re.DOTALL)
SAMPLED: Final = 0x01
_FLAGS: Final = 0x03
"""Those that are known: sampled, and that the trace id is random."""


class Trace:
    """``id`` in lower-case hex; ``parent``: the value of ``traceparent`` for whom the router asks; ``continued``: the
    client began the trace, in its span ``caller``."""

    __slots__ = ("caller", "continued", "id", "parent")

    def __init__(self, id: bytes, parent: bytes, continued: bool, caller: bytes) -> None:
        self.id, self.parent, self.continued, self.caller = id, parent, continued, caller

    @property
    def span(self) -> bytes:
        """The router's span: that of an attempt at a worker."""
        return self.parent[36:52]

    def beside(self, bits: Callable[[int], int]) -> Trace:
        """The same place in the trace, with another span of the router's."""
        parent = b"%b%016x%b" % (self.parent[:36], bits(64) or 1, self.parent[52:])
        return Trace(self.id, parent, self.continued, self.caller)


def trace_of(headers: Sequence[tuple[bytes, bytes]], bits: Callable[[int], int]) -> Trace:
    """A request's trace, with a span for the router. Names of ``headers`` are in lower case; ``bits``: random ones."""
    given = b""
    for name, value in headers:
        if name == b"traceparent":
            given = b"twice" if given else value
    span = digits(bits(64) or 1, 8)
    if given and (found := _VALID.match(given.strip(b" \t"))):
        version, trace, parent, flags, rest = found.groups()
        known = version == b"00" and rest is None
        if (known or version not in (b"00", b"ff")) and trace.strip(b"0") and parent.strip(b"0"):
            return Trace(trace, b"00-%b-%b-%02x" % (trace, span, int(flags, 16) & _FLAGS), True, parent)
    trace = digits(bits(128) or 1, 16)
    return Trace(trace, b"00-" + trace + b"-" + span + b"-01", False, b"")


def digits(number: int, size: int) -> bytes:
    """A number of ``size`` bytes in lower-case hex; formatting it with ``%x`` takes three times as long."""
    return hexlify(number.to_bytes(size, "big"))
