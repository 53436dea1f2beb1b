"""What the head of a client's request says, and what a worker gets of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from router.relay import headers
from router.relay.headers import Headers
from router.relay.trace import Trace, trace_of
from router.routes import InferenceRoute
from router.worker import Worker

_NOTED: Final = frozenset({*headers.IDS, b"traceparent"})
"""Headers that name a request."""


class RequestHead:
    """One request's. ``identity`` is its id, ``trace`` its place in a trace."""

    __slots__ = ("headers", "identity", "query", "route", "trace")

    def __init__(self, route: InferenceRoute, query: bytes, raw: Headers, bits: Callable[[int], int]) -> None:
        """``raw``: headers with lower-case names; ``bits``: random ones, for the ids of spans."""
        self.route, self.query, self.headers = route, query, raw
        noted = [pair for pair in raw if pair[0] in _NOTED]
        self.identity, self.trace = headers.request_id(noted, bits), trace_of(noted, bits)

    @property
    def ids(self) -> dict[str, str]:
        """What names the request in logs, here and at its worker."""
        trace = self.trace
        return {"request_id": self.identity.decode(), "trace_id": trace.id.decode(), "span_id": trace.span.decode()}

    def to_worker(self, worker: Worker, raw: Headers, size: int, trace: Trace, identity: bytes = b"") -> bytes:
        """As a worker gets it, with these headers and its place in the trace; the body has ``size`` bytes.

        ``identity``: what it is called there; empty: as ever."""
        at, query = worker.address, b"?" + self.query if self.query else b""
        return b"".join(
            (
                b"POST ", at.prefix, self.route.raw_path, query, b" HTTP/1.1\r\nhost: ", at.authority,
                b"\r\ncontent-length: ", str(size).encode(), b"\r\n",
                headers.to_worker(raw, identity or self.identity, trace), b"\r\n",
            )
        )  # fmt: skip
