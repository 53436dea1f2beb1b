"""Signed texts: access tokens and addresses that say themselves what they are good for, and until when."""

from __future__ import annotations

import hashlib
import hmac
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable
from typing import Final, TypeVar

import msgspec

from helios.decoding import from_json
from helios.errors import Forbidden, HeliosError

TAG_BYTES: Final = 32
SEAL_BYTES: Final = 16
MAX_TOKEN: Final = 2000
"""Longest token that is looked at, in characters."""


class TokenRefused(HeliosError):
    """There is no access token, or it is not a valid one."""

    code = "Unauthorized"
    status = 401


class Grant(msgspec.Struct, frozen=True, array_like=True):
    """What every signed text says: who it is for (a repository's canonical name) and when it ends (unix seconds)."""

    repo: str
    ends: int


class ReadGrant(Grant, frozen=True, array_like=True, tag="read"):
    """Reconstructions of the files of a repository, asked for at ``commit`` (empty: a registry before this one)."""

    commit: str = ""


class XorbGrant(Grant, frozen=True, array_like=True, tag="xorb"):
    """The bytes of xorb number ``xorb`` in the layout of a blob, for somebody who reads ``commit``, as above."""

    blob: str
    xorb: int
    commit: str = ""


G = TypeVar("G", bound=Grant)


class Signer:
    """Makes and checks signed texts with one key. Threads may share it."""

    def __init__(self, key: bytes, clock: Callable[[], float] = time.time) -> None:
        self._key, self.clock = key, clock

    def sign(self, grant: Grant) -> str:
        """The grant as text that fits into a URL or a header."""
        body = msgspec.json.encode(grant)
        return urlsafe_b64encode(self._tag(body) + body).rstrip(b"=").decode()

    def check(self, text: str | None, kind: type[G]) -> G:
        """The grant in the text. Raises TokenRefused for none or a wrong one, Forbidden for one that has ended."""
        if not text:
            raise TokenRefused("this needs an access token")
        try:
            data = urlsafe_b64decode(text.encode() + b"=" * (-len(text) % 4)) if len(text) <= MAX_TOKEN else b""
            tag, body = data[:TAG_BYTES], data[TAG_BYTES:]
            if not hmac.compare_digest(tag, self._tag(body)):
                raise ValueError
            grant = from_json(body, kind)
        except (ValueError, msgspec.DecodeError):
            raise TokenRefused("the access token is not one that this registry gave for this") from None
        if grant.ends <= self.clock():
            raise Forbidden("the access token has ended: ask for a new one")
        return grant

    def seal(self, what: str, ends: int) -> str:
        """A short mark that allows ``what``, which it does not say itself, until ``ends`` (unix seconds).

        ``what`` starts with a letter, so that no seal is a grant. 128 bits of the HMAC are enough (RFC 2104, 5).
        """
        tag = self._tag(f"{what}\n{ends:x}".encode())[:SEAL_BYTES]
        return f"{ends:x}.{urlsafe_b64encode(tag).rstrip(b'=').decode()}"

    def opens(self, what: str, seal: str) -> bool:
        """Whether the seal was made for this and has not ended."""
        try:
            ends = int(seal.partition(".")[0][:16], 16)
        except ValueError:
            return False
        made = self.seal(what, ends)
        return hmac.compare_digest(made.encode(), seal.encode("utf-8", "replace")) and ends > self.clock()

    def _tag(self, body: bytes) -> bytes:
        return hmac.digest(self._key, body, hashlib.sha256)
