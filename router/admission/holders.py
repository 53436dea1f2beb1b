"""Whose an API key is, in a router: the keys of a file (``keys``), as it is now."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from pathlib import Path
from typing import Final

from helios.watched import WatchedFile
from router.admission.keys import digest_of, read
from router.admission.rights import Principal, Right, Tenants

REMEMBERED: Final = 4096
"""Headers with a key that are remembered."""

Header = tuple[bytes, bytes]
"""A name, in lower case, and a value."""


class Holder:
    """Somebody with a key: its digest, when it expires (unix seconds; None: never), and who that is."""

    __slots__ = ("digest", "expires", "principal")

    def __init__(self, digest: bytes, expires: float | None, principal: Principal) -> None:
        self.digest, self.expires, self.principal = digest, expires, principal


class _Content:
    """What the file says."""

    __slots__ = ("by_digest", "by_id", "salt")

    def __init__(self, salt: bytes) -> None:
        self.salt = salt
        self.by_digest: dict[bytes, Holder] = {}
        self.by_id: dict[str, Holder] = {}


class Keys:
    """The keys of a file. ``now`` gives unix seconds."""

    def __init__(self, path: Path, tenants: Tenants, now: Callable[[], float], clock: Callable[[], float]) -> None:
        """Raises UsageError for a file that can't be read."""
        self._tenants, self._now = tenants, now
        self._file = WatchedFile(path, self._read, "file of keys", clock=clock)
        self._came: dict[Header, Holder] = {}
        """What brought a key before: clients send the same header with each request. Found by the keyed hash of this
        process (``hash``), of which the same holds as of a digest."""
        self._came_of = self._file.get()
        """The content that these were found in: with another one they are looked up anew."""

    def sender(self, header: Header) -> Principal | None:
        """Who sent this very header before, if what it brought is valid still; None: ``find`` has to look."""
        content: _Content = self._file.get()
        if content is not self._came_of:
            self._came.clear()
            self._came_of = content
            return None
        found = self._came.get(header)
        return None if found is None else self._valid(found)

    def find(self, text: str, header: Header | None = None) -> Principal | None:
        """Who has the key; None for a text that is no key, or one that is not valid any more. ``header``: what brought
        it, for ``sender`` to know."""
        content: _Content = self._file.get()
        digest = digest_of(text, content.salt)
        found = content.by_digest.get(digest)
        if found is None or not hmac.compare_digest(found.digest, digest):
            return None
        if header is not None and content is self._came_of:
            if len(self._came) >= REMEMBERED:
                self._came.clear()
            self._came[header] = found
        return self._valid(found)

    def by_id(self, identity: str) -> Principal | None:
        """Who has the key with this id; None where there is none, or it is not valid any more."""
        content: _Content = self._file.get()
        found = content.by_id.get(identity)
        return None if found is None else self._valid(found)

    def _valid(self, holder: Holder) -> Principal | None:
        expires = holder.expires
        return holder.principal if expires is None or self._now() < expires else None

    def _read(self, path: Path) -> _Content:
        said = read(path)
        content = _Content(bytes.fromhex(said.salt))
        for key in said.keys:
            right = Right(tuple(key.models), tuple(key.routes))
            principal = self._tenants.principal(key.tenant, (right,), key.priority, key.id, key.limits)
            digest = bytes.fromhex(key.digest)
            content.by_digest[digest] = content.by_id[key.id] = Holder(digest, key.expires, principal)
        return content
