"""Sealing: how objects of an encrypted domain are encrypted, contents and names. docs/format.md is normative.

A sealed object is

    head     80 bytes  magic b"HSEA", version u16 (1), flags u16 (0), key id 16 bytes, salt 32 bytes,
                       size of a block u32 (65,536), 4 zero bytes, tag of the head 16 bytes
    blocks   each 65,536 bytes of the content, encrypted, and 16 bytes tag; the last is shorter, or even empty
    end      32 bytes  BLAKE3 of head and blocks: whoever has no key can tell damage, too

Blocks are AES-256-GCM under a key of the object's own, in the STREAM construction (Hoang, Reyhanitabar, Rogaway, Vizár:
Online Authenticated-Encryption and its Nonce-Reuse Misuse-Resistance, CRYPTO 2015), as in Tink's streaming AEAD: the
nonce is the block's number and whether it is the last, so blocks can be read in any order and none moved or cut off.
The object's key comes from the domain's by HKDF-SHA256 (RFC 5869) with the salt and the object's name, so an object
can't stand in for another. The salt is an HMAC of name and content: a key never meets two contents, whatever is written
again, and the same object written twice has the same bytes, as ``ObjectStore`` asks for. What that tells, that two
writes were equal, the name tells anyway.

Names are encrypted with AES-SIV (RFC 5297), which is deterministic: they are found without a table.
"""

from __future__ import annotations

import base64
import hmac
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from helios.errors import IntegrityError
from heliosfs.store.keys import SEALED

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

MAGIC: Final = b"HSEA"
VERSION: Final = 1
BLOCK: Final = 1 << 16
TAG: Final = 16
SECRET_SIZE: Final = 32
SEGMENT: Final = 200
"""Longest segment of an encrypted name."""

_HEAD = struct.Struct("<4sHH16s32sI4s16s")
HEAD_SIZE: Final = _HEAD.size
END_SIZE: Final = 32
_FIELDS: Final = HEAD_SIZE - TAG


class DomainKey:
    """A domain's key of 256 bits, and those that follow from it. It is never shown."""

    def __init__(self, secret: bytes) -> None:
        """Raises ValueError for a key of another length."""
        from cryptography.hazmat.primitives.ciphers.aead import AESSIV

        if len(secret) != SECRET_SIZE:
            raise ValueError(f"a key has {SECRET_SIZE} bytes, not {len(secret)}")
        self._secret = secret
        self.id = _derive(secret, b"id", 16).hex()
        """Tells keys apart, 32 hexadecimal digits, and tells nothing of them."""
        self._salts = _derive(secret, b"salts", 32)
        self._names = AESSIV(_derive(secret, b"names", 64))

    def __repr__(self) -> str:
        return f"<DomainKey {self.id}>"

    __str__ = __repr__

    def __reduce__(self) -> str:
        raise TypeError("a key is not copied to elsewhere")

    def seal_key(self, key: str) -> str:
        """The key under which the object ``key`` is stored."""
        domain, kind, rest = key.split("/", 2)
        hidden = self._names.encrypt(rest.encode(), [f"{domain}/{kind}".encode()])
        text = base64.b32encode(hidden).decode().rstrip("=").lower()
        parts = [text[start : start + SEGMENT] for start in range(0, len(text), SEGMENT)]
        return "/".join([domain, SEALED, kind, text[:2], *parts])

    def open_key(self, key: str) -> str | None:
        """The key of the object that is stored under ``key``; None where this key has not sealed it."""
        from cryptography.exceptions import InvalidTag

        domain, _, kind, _, *parts = key.split("/")
        text = "".join(parts).upper()
        try:
            hidden = base64.b32decode(text + "=" * (-len(text) % 8))
            rest = self._names.decrypt(hidden, [f"{domain}/{kind}".encode()]).decode()
        except (ValueError, InvalidTag):
            return None
        return f"{domain}/{kind}/{rest}"

    def head(self, key: str, digest: bytes) -> bytes:
        """The head of the object ``key`` whose content has this BLAKE3."""
        salt = hmac.digest(self._salts, b"salt\0" + key.encode() + b"\0" + digest, "sha256")
        fields = _HEAD.pack(MAGIC, VERSION, 0, bytes.fromhex(self.id), salt, BLOCK, bytes(4), bytes(TAG))[:_FIELDS]
        return fields + self._tag(key, fields)

    def opened(self, key: str, head: bytes) -> AESGCM:
        """What opens the blocks of the object ``key``. Raises IntegrityError for a head that is not its own."""
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        if len(head) != HEAD_SIZE:
            raise IntegrityError(f"{key} is shorter than the head of an encrypted object")
        magic, version, flags, id_, salt, block, zero, _ = _HEAD.unpack(head)
        if magic != MAGIC:
            raise IntegrityError(f"{key} is no encrypted object: it starts with {magic!r}")
        if version != VERSION or flags or block != BLOCK or zero != bytes(4):
            raise IntegrityError(f"{key} is encrypted in version {version} (flags {flags}); upgrade Helios")
        if id_.hex() != self.id or not hmac.compare_digest(head[_FIELDS:], self._tag(key, head[:_FIELDS])):
            raise IntegrityError(f"the head of the encrypted object {key} is damaged")
        return AESGCM(_derive(self._secret, b"object\0" + key.encode(), 32, salt))

    def _tag(self, key: str, fields: bytes) -> bytes:
        return hmac.digest(self._salts, b"head\0" + key.encode() + b"\0" + fields, "sha256")[:TAG]


def sealed_size(size: int) -> int:
    """Bytes that an object of ``size`` bytes takes."""
    return HEAD_SIZE + size + TAG * _blocks(size) + END_SIZE


def plain_size(sealed: int) -> int | None:
    """Bytes of the object that takes ``sealed`` bytes; None where none does."""
    body = sealed - HEAD_SIZE - END_SIZE
    size = body - TAG * max(1, -(-body // (BLOCK + TAG)))
    return size if size >= 0 and sealed_size(size) == sealed else None


def block_span(first: int, stop: int, size: int) -> tuple[int, int]:
    """Where blocks ``first`` to ``stop`` of an object of ``size`` bytes begin and end in the sealed object."""
    end = min(stop * BLOCK, size)
    return HEAD_SIZE + first * (BLOCK + TAG), HEAD_SIZE + end + stop * TAG


def covering(offset: int, length: int, size: int) -> range:
    """The blocks that hold these bytes."""
    return range(offset // BLOCK, max(1, -(-(offset + length) // BLOCK))) if length else range(0, min(1, _blocks(size)))


def seal_block(cipher: AESGCM, number: int, data: memoryview | bytes, *, last: bool) -> bytes:
    """A block as it is stored."""
    return cipher.encrypt(_nonce(number, last), data, None)


def open_blocks(cipher: AESGCM, key: str, blocks: range, size: int, data: memoryview) -> Iterator[bytes]:
    """The contents of consecutive blocks, whose stored bytes are ``data``. Raises IntegrityError."""
    from cryptography.exceptions import InvalidTag

    last = _blocks(size) - 1
    start = 0
    for number in blocks:
        length = min(BLOCK, size - number * BLOCK) + TAG
        try:
            yield cipher.decrypt(_nonce(number, number == last), data[start : start + length], None)
        except InvalidTag:
            raise IntegrityError(f"the encrypted object {key} is damaged in block {number}") from None
        start += length


def _blocks(size: int) -> int:
    return max(1, -(-size // BLOCK))


def _nonce(number: int, last: bool) -> bytes:
    return bytes(7) + number.to_bytes(4, "big") + (b"\1" if last else b"\0")


def _derive(secret: bytes, what: bytes, length: int, salt: bytes | None = None) -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(SHA256(), length, salt, b"helios sealed object 1\0" + what).derive(secret)
