"""The head and the comments that a stream gets while it waits for a worker.

A client, and what is between it and us, gives up on a connection that is silent for too long. A stream of server-sent
events may hold comments, lines that begin with a colon, which clients skip (WHATWG HTML, 9.2.6). The price: the status
is 200 from the first comment on, so what goes wrong afterwards is an event, and headers of the worker are not sent.
"""

from __future__ import annotations

from typing import Any

import msgspec

from helios.decoding import from_json
from router import errors
from router.errors import ApiError
from router.relay.framing import STATUS_LINES, Head

MAX_TEXT = 500


def head(request_id: bytes, http11: bool, keep_alive: bool) -> bytes:
    lines = [
        b"content-type: text/event-stream; charset=utf-8", b"cache-control: no-cache", b"x-request-id: " + request_id,
    ]  # fmt: skip
    if http11:
        lines.append(b"transfer-encoding: chunked")
    if not keep_alive:
        lines.append(b"connection: close")
    return STATUS_LINES[200] + b"\r\n".join(lines) + b"\r\n\r\n"


def framed(data: bytes, http11: bool) -> bytes:
    """Bytes of the stream, in a chunk where the client knows chunks."""
    return b"%x\r\n%b\r\n" % (len(data), data) if http11 else data


def unexpected(answer: Head, piece: bytes) -> ApiError:
    """The worker's answer is no stream, which is what an error of its is, too; ``piece`` is what came of it."""
    status = answer.status if answer.status >= 400 else 502
    told = _message(piece) if answer.length else ""
    return errors.no_stream(status, told[:MAX_TEXT] or f"The worker answered with {answer.status}, and no stream.")


class _Error(msgspec.Struct):
    error: Any = None
    message: Any = None


def _message(piece: bytes) -> str:
    """The message of an error as OpenAI's and Anthropic's servers write it; "" for another, or a part of one."""
    try:
        document = from_json(piece, _Error)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ""
    found = document.error.get("message") if isinstance(document.error, dict) else document.message
    return found if isinstance(found, str) else ""
