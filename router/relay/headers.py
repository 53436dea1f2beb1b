"""Which headers of a request go on to a worker.

RFC 9110, section 7.6.1: hop-by-hop headers, and those that ``Connection`` names, concern one connection only.
``Host``, ``Content-Length`` and ``Expect`` belong to the connection to the client too: the router has read the whole
body and states its length anew. ``traceparent`` is replaced (``trace``). Headers that name hosts to llm-d's sidecar
beside a worker are not a client's to send: it would connect to them, and take memory from there. Everything else passes
as it came, ``Authorization`` and ``Accept-Encoding`` included, in order and with repetitions. What becomes of an
answer's headers is in ``framing``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from random import getrandbits
from typing import Final

from router.relay.trace import Trace, digits

Headers = Sequence[tuple[bytes, bytes]]
"""Names are in lower case."""

HOSTS: Final = frozenset(
    {b"x-prefiller-host-port", b"x-encoder-hosts-ports", b"x-data-parallel-host-port", b"x-kv-cache-source-host-port"}
)
"""What llm-d's sidecar goes by (pkg/sidecar/proxy)."""
_DROPPED: Final = HOSTS | frozenset(
    {
        b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te",
        b"trailer", b"transfer-encoding", b"upgrade", b"http2-settings", b"host", b"content-length", b"expect",
        b"x-request-id", b"traceparent", b"tracestate",
    }
)  # fmt: skip
"""Those that do not go on just so."""
IDS: Final = {b"x-request-id": 0, b"x-correlation-id": 1, b"request-id": 2}
"""Headers in which clients name a request, the first first."""
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}\Z")
_ORDINARY: Final = frozenset({b"", b"close", b"keep-alive"})


def request_id(headers: Headers, bits: Callable[[int], int] = getrandbits) -> bytes:
    """What the client calls the request, when that is 1 to 128 visible ASCII characters, else a new id of ``bits``.

    X-Request-Id counts before X-Correlation-Id, and that before Request-Id.
    """
    given, least = b"", len(IDS)
    for name, value in headers:
        if name in IDS and (rank := IDS[name]) < least and _REQUEST_ID.match(value):
            given, least = value, rank
    return given or digits(bits(128), 16)


def to_worker(headers: Headers, identity: bytes, trace: Trace) -> bytes:
    """The request's header lines that a worker gets, besides Host and Content-Length; each ends its line."""
    own = b"x-request-id: " + identity + b"\r\ntraceparent: " + trace.parent
    lines, named = [own], list[bytes]()
    for name, value in headers:
        if name not in _DROPPED or (name == b"tracestate" and trace.continued):
            lines.append(name + b": " + value)
        elif name == b"connection" and (lowered := value.strip().lower()) not in _ORDINARY:
            named += [token.strip() + b": " for token in lowered.split(b",") if token.strip()]
    if named:
        lines = [line for line in lines if line is own or not line.startswith(tuple(named))]
    lines.append(b"")
    return b"\r\n".join(lines)
