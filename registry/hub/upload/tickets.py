"""Tickets: addresses that say themselves what may be sent to them, because clients upload without their token.

huggingface_hub sends LFS content to the address that the batch call gave it, and nothing else: no Authorization. So the
address carries what was allowed (repository, content, size, until when), signed with a key that only registries know.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable
from typing import Final

import msgspec

from helios.errors import Forbidden

LIFE_S: Final = 12 * 3600
"""How long an upload may be started, in seconds: a batch of 256 large files is sent one after the other."""

_TAG: Final = 32
_MAX: Final = 1000


class Ticket(msgspec.Struct, frozen=True, array_like=True):
    """One object that may be sent: the repository's canonical name, sha256, size in bytes, end in unix seconds."""

    repo: str
    sha256: str
    size: int
    ends: int


class Tickets:
    """Makes and checks tickets with one key."""

    def __init__(self, key: bytes, clock: Callable[[], float] = time.time) -> None:
        self._key, self._clock = key, clock

    def make(self, repo: str, sha256: str, size: int) -> str:
        """A ticket as text that fits into a path."""
        body = msgspec.json.encode(Ticket(repo, sha256, size, int(self._clock()) + LIFE_S))
        return urlsafe_b64encode(self._tag(body) + body).rstrip(b"=").decode()

    def check(self, text: str, repo: str) -> Ticket:
        """The ticket in the text, if it is one for this repository; raises Forbidden."""
        try:
            data = urlsafe_b64decode(text.encode() + b"=" * (-len(text) % 4)) if len(text) <= _MAX else b""
            tag, body = data[:_TAG], data[_TAG:]
            if not hmac.compare_digest(tag, self._tag(body)):
                raise ValueError
            ticket = msgspec.json.decode(body, type=Ticket)
        except (ValueError, msgspec.DecodeError):
            raise Forbidden("this address for an upload is not one that the registry gave") from None
        if ticket.repo != repo:
            raise Forbidden("this address for an upload is another repository's")
        if ticket.ends <= self._clock():
            raise Forbidden("this address for an upload has ended: ask for a new one")
        return ticket

    def _tag(self, body: bytes) -> bytes:
        return hmac.digest(self._key, b"lfs\0" + body, hashlib.sha256)
