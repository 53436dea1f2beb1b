"""What a client gets at the end that no worker sent: an error as a whole answer, or as a stream's last event."""

from __future__ import annotations

from typing import Final

from router.errors import ApiError
from router.relay.framing import STATUS_LINES, Framing, Head, Mode

TAIL: Final = 6
"""Bytes at the end of what was sent that tell whether an event is open."""
_BOUNDARIES: Final = {True: (b"\n\n\r\n", b"\r\n\r\n\r\n"), False: (b"\n\n", b"\r\n\r\n")}
"""How an event ends, inside a chunk or not."""


def takes_event(framing: Framing | None, head: Head | None, tail: bytes) -> bool:
    """Whether an event can be put behind what was sent, which ends with ``tail``."""
    if framing is None or head is None or not head.events:
        return False
    inside = chunked(head)
    return (framing.between_chunks or not inside) and (not tail or tail.endswith(_BOUNDARIES[inside]))


def event(content: bytes, head: Head | None) -> bytes:
    """An event as it goes into the answer with this head."""
    return b"%x\r\n%b\r\n" % (len(content), content) if head is not None and chunked(head) else content


def answer(error: ApiError, content: bytes, identity: bytes, keep_alive: bool) -> bytes:
    """A whole answer."""
    lines = [STATUS_LINES[error.status], b"content-length: %d\r\n" % len(content)]
    lines += [b"%b: %b\r\n" % pair for pair in headers(error, identity)]
    if not keep_alive:
        lines.append(b"connection: close\r\n")
    return b"".join([*lines, b"\r\n", content])


def headers(error: ApiError, identity: bytes) -> list[tuple[bytes, bytes]]:
    """What the head of an error's answer says, but for what is the connection's."""
    found = [(b"content-type", b"application/json"), (b"x-request-id", identity)]
    if error.retry_after_s is not None:
        found.append((b"retry-after", b"%d" % error.retry_after_s))
    if error.allow is not None:
        found.append((b"allow", error.allow.encode()))
    if error.challenge is not None:
        found.append((b"www-authenticate", error.challenge.encode()))
    return found


def chunked(head: Head) -> bool:
    """Whether the body goes on in chunks."""
    return head.mode is Mode.CHUNKED or (head.chunked and head.mode is Mode.VERBATIM)
