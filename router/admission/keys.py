"""API keys: made here, known by their hash alone.

A key is ``hk-<id>-<secret>``, the secret 32 random bytes. Such a secret can't be guessed, so what protects it in the
file is one keyed hash (BLAKE2b, RFC 7693, with a random key of the file's own) and not a slow one for passwords, which
each request would pay for. Nobody can choose what such a hash gives, so the dictionary it is looked up in tells a
stranger nothing by its timing, whatever he sends; what it finds is compared once more in constant time.

The file is JSON: {"version": 1, "salt": hex, "keys": [...]}, replaced as a whole, readable for its owner alone. A
router looks at it every two seconds, so a key that is revoked works no longer than that.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Final, Literal

import msgspec

from helios.config import LimitSettings, Priority
from helios.decoding import converted, from_json
from helios.errors import NotFound, UsageError
from helios.names import TENANT
from router.admission.rights import NO_LIMITS, check_limits

PREFIX: Final = "hk-"
MAX_KEY: Final = 256
"""Longest text that is looked at as a key."""
MAX_KEYS: Final = 100_000


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """What the file says of a key. ``digest``: hexadecimal; times in unix seconds."""

    id: str
    digest: str
    tenant: str
    label: str = ""
    models: list[str] = msgspec.field(default_factory=lambda: ["*"])
    routes: list[str] = msgspec.field(default_factory=lambda: ["*"])
    limits: LimitSettings = NO_LIMITS
    priority: Priority = "normal"
    created: float = 0.0
    expires: float | None = None


class Content(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    version: Literal[1] = 1
    salt: str
    keys: list[Key] = []


def digest_of(text: str, salt: bytes) -> bytes:
    return blake2b(text[:MAX_KEY].encode("utf-8", "surrogatepass"), key=salt, digest_size=32).digest()


def read(path: Path) -> Content:
    """The file's content. Raises UsageError."""
    try:
        content = from_json(path.read_bytes(), Content)
        salt = bytes.fromhex(content.salt)
        wrong = not 16 <= len(salt) <= 64 or any(len(bytes.fromhex(key.digest)) != 32 for key in content.keys)
    except OSError as error:
        raise UsageError(f"the file of keys {path} can't be read: {error.strerror}") from None
    except (msgspec.DecodeError, ValueError) as error:
        raise UsageError(
            f"{path} is no file of keys: {error}", hint="`helios router keys create` writes one."
        ) from None
    if wrong:
        raise UsageError(f"{path} is no file of keys: a salt or a digest has the wrong length")
    return content


def create(path: Path, tenant: str, now: float, **fields: object) -> tuple[Key, str]:
    """Add a key; returns what is stored and the key itself, which nobody can read again. Raises UsageError."""
    if not TENANT.match(tenant):
        raise UsageError(f"{tenant!r} is not a tenant's name: use a-z, 0-9 and - (at most 63)")
    identity = secrets.token_hex(6)
    text = f"{PREFIX}{identity}-{secrets.token_urlsafe(32)}"
    with _changing(path) as content:
        if len(content.keys) >= MAX_KEYS:
            raise UsageError(f"{path} holds {len(content.keys)} keys; at most {MAX_KEYS} are possible")
        digest = digest_of(text, bytes.fromhex(content.salt)).hex()
        given = {"id": identity, "digest": digest, "tenant": tenant, "created": now, **fields}
        key = converted(given, Key)
        check_limits(key.limits, "limits")
        content.keys.append(key)
    return key, text


def revoke(path: Path, identity: str) -> Key:
    """Take a key out. Raises NotFound for an id that is not there, UsageError for a file that can't be read."""
    read(path)  # there must be a file
    with _changing(path) as content:
        for key in content.keys:
            if key.id == identity:
                content.keys.remove(key)
                return key
        raise NotFound(f"{path} has no key with the id {identity!r}", hint="`helios router keys list` lists them.")


@contextmanager
def _changing(path: Path) -> Iterator[Content]:
    """The content, to be changed; written as a whole at the end. One process at a time."""
    try:
        lock = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UsageError(f"the file of keys {path} can't be written: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        content = read(path) if path.exists() else Content(salt=secrets.token_hex(32))
        yield content
        _replace(path, msgspec.json.format(msgspec.json.encode(content), indent=1))
    finally:
        os.close(lock)


def _replace(path: Path, data: bytes) -> None:
    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(fd)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
