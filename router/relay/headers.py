"""Which headers go on, in both directions.

RFC 9110, section 7.6.1: hop-by-hop headers, and those that ``Connection`` names, concern one connection only.
``Host``, ``Content-Length`` and ``Expect`` of a request belong to the connection to the client too: the router has
read the whole body and states its length anew. Everything else passes as it came, ``Authorization``, ``traceparent``
and ``Accept-Encoding`` included, in order and with repetitions.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from typing import Final

from multidict import CIMultiDict

from router import errors

Headers = Iterable[tuple[bytes, bytes]]

HOP_BY_HOP: Final = frozenset(
    {
        b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te",
        b"trailer", b"transfer-encoding", b"upgrade", b"http2-settings",
    }
)  # fmt: skip
_REQUEST_ONLY: Final = frozenset({b"host", b"content-length", b"expect", b"x-request-id"})
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}\Z")


def request_id(headers: Headers) -> str:
    """The client's X-Request-Id when it is 1 to 128 visible ASCII characters, else a new one."""
    for name, value in headers:
        if name == b"x-request-id":
            return value.decode("ascii") if _REQUEST_ID.match(value) else secrets.token_hex(16)
    return secrets.token_hex(16)


def to_worker(headers: Headers, identity: str) -> CIMultiDict[str]:
    """The request headers that a worker gets; aiohttp adds Host and Content-Length."""
    headers = list(headers)
    dropped = HOP_BY_HOP | _REQUEST_ONLY | _named_by_connection(headers)
    kept = CIMultiDict(
        [(name.decode("latin-1"), decode(name, value)) for name, value in headers if name not in dropped]
    )  # fmt: skip
    kept["x-request-id"] = identity
    return kept


def to_client(headers: Headers, identity: str) -> list[tuple[bytes, bytes]]:
    """The answer's headers that the client gets, with lower-case names; ``headers`` may have any case."""
    lowered = [(name.lower(), value) for name, value in headers]
    dropped = HOP_BY_HOP | _named_by_connection(lowered)
    kept = [(name, value) for name, value in lowered if name not in dropped]
    if not any(name == b"x-request-id" for name, _ in kept):
        kept.append((b"x-request-id", identity.encode()))
    return kept


def find(headers: Headers, name: bytes) -> bytes | None:
    """The first value of a header whose names are lower-case."""
    return next((value for key, value in headers if key == name), None)


def decode(name: bytes, value: bytes) -> str:
    """A header's value as text, which aiohttp encodes as UTF-8 again; raises ApiError for other bytes."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        shown = name.decode("latin-1")
        raise errors.invalid_body(f"The header {shown} holds bytes that are not UTF-8.", "invalid_header") from None


def _named_by_connection(headers: Headers) -> frozenset[bytes]:
    named = [value for name, value in headers if name == b"connection"]
    if not named:
        return frozenset()
    return frozenset(token.strip().lower() for value in named for token in value.split(b","))
