"""What is known of one type of Kubernetes objects, from lists and watches. No I/O, no clock.

The protocol (kubernetes.io/docs/reference/using-api/api-concepts): a list gives all objects and the resource version at
which that was so; a watch from a version gives every change after it. Each event, and each bookmark, carries the
version to go on from when the watch has ended. A version that the server has forgotten is 410 Gone, before or inside a
watch: then everything is listed anew. A list in pages is at one version; what was known stays until its last page is
here, and a list whose token has expired (410 as well) is begun again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, Generic, Protocol, TypeVar

import msgspec

from helios.decoding import from_json
from helios.errors import HeliosError, IntegrityError
from helios.kube.wire import Bookmark, Event, Page, Status, StatusDetails

GONE: Final = 410
MAX_LINE: Final = 16 << 20
"""Longest event, in bytes; etcd's largest object has 1.5 MiB."""


class Refused(HeliosError):
    """The server answered with an error; its HTTP status is ``status``, its reason ``code``."""

    retry_after_s: float | None = None
    """How long it asks to wait before the next try, in seconds."""
    details: StatusDetails | None = None


class Gone(Refused):
    """The server does not know the version any more: list anew."""


class Identity(Protocol):
    """What of an object's metadata says which it is."""

    @property
    def namespace(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def resource_version(self) -> str: ...


class Identified(Protocol):
    """An object, as much of it as somebody wants to know. Two are equal if nothing that counts has changed."""

    @property
    def metadata(self) -> Identity: ...


T = TypeVar("T", bound=Identified)


class Reflector(Generic[T]):
    """The objects of a type by namespace and name; ``version`` is where a watch goes on."""

    def __init__(
        self, decode: Callable[[Any], T], changed: Callable[[T | None, T | None], None] | None = None, *,
        newer: Callable[[T, T], bool] = lambda known, coming: True,
    ) -> None:  # fmt: skip
        """``decode`` may raise msgspec.DecodeError. ``changed`` is told of each change, by a watch or found by a new
        list, after it was made: what the object was, and what it is. ``newer``: whether what a watch says of an object
        counts after what is known of it; False for what ``put`` knew before the watch."""
        self._decode, self._changed, self._newer = decode, changed, newer
        self._coming: dict[tuple[str, str], T] = {}
        self.objects: dict[tuple[str, str], T] = {}
        self.version = ""
        self.listed = False
        """Whether a whole list has come."""

    def begin(self) -> None:
        """A list is asked for from its beginning."""
        self._coming = {}

    def page(self, content: bytes) -> str | None:
        """A page of a list: the token of the next one, or None when ``objects`` are now all there are.

        Raises IntegrityError for what is no list.
        """
        try:
            page = from_json(content, Page)
            for item in page.items or ():
                self._put(self._coming, self._decode(item))
        except msgspec.DecodeError as error:
            raise IntegrityError(f"a list does not decode: {error}") from None
        if page.metadata.next:
            return page.metadata.next
        if not page.metadata.resource_version:
            raise IntegrityError("a list has no resource version")
        self._replace(page.metadata.resource_version)
        return None

    def absent(self) -> None:
        """The server knows no such type: there are no objects."""
        self._coming = {}
        self._replace("")

    def _replace(self, version: str) -> None:
        before, self.objects, self._coming = self.objects, self._coming, {}
        self.version, self.listed = version, True
        if self._changed is None:
            return
        for key, one in self.objects.items():
            if (was := before.get(key)) != one:
                self._changed(was, one)
        for key, was in before.items():
            if key not in self.objects:
                self._changed(was, None)

    def event(self, line: bytes) -> bool:
        """A line of a watch: whether ``objects`` changed. Raises Gone, Refused or IntegrityError."""
        try:
            event = from_json(line, Event)
            if event.type == "ERROR":
                raise refusal(from_json(event.object, Status))
            if event.type == "BOOKMARK":
                self._advance(from_json(event.object, Bookmark).metadata.resource_version)
                return False
            one = self._decode(event.object)
        except msgspec.DecodeError as error:
            raise IntegrityError(f"an event does not decode: {error}") from None
        key = one.metadata.namespace, one.metadata.name
        before = self.objects.get(key)
        if before is not None and not self._newer(before, one):
            self._advance(one.metadata.resource_version)
            return False
        if event.type in ("ADDED", "MODIFIED"):
            changed = bool(before != one)
            self._put(self.objects, one)
        elif event.type == "DELETED":
            changed = self.objects.pop(key, None) is not None
        else:
            raise IntegrityError(f"an event has the type {event.type!r}")
        self._advance(one.metadata.resource_version)
        if changed and self._changed is not None:
            self._changed(before, self.objects.get(key))
        return changed

    def put(self, one: T) -> None:
        """An object as the answer to a write showed it, which no watch has told of yet."""
        key = one.metadata.namespace, one.metadata.name
        before = self.objects.get(key)
        if before != one and (before is None or self._newer(before, one)):
            self._put(self.objects, one)
            if self._changed is not None:
                self._changed(before, one)

    def drop(self, key: tuple[str, str]) -> None:
        """An object that a write has removed."""
        before = self.objects.pop(key, None)
        if before is not None and self._changed is not None:
            self._changed(before, None)

    def _advance(self, version: str) -> None:
        if not version:
            raise IntegrityError("an event has no resource version")
        self.version = version

    def _put(self, into: dict[tuple[str, str], T], one: T) -> None:
        if not one.metadata.name:
            raise IntegrityError("an object has no name")
        into[one.metadata.namespace, one.metadata.name] = one


def refusal(status: Status) -> Refused:
    """The error that a Status is."""
    text = f"{status.code} {status.reason}: {status.message}"
    error = (Gone if status.code == GONE else Refused)(text, code=status.reason or None)
    error.status, error.details = status.code, status.details
    return error


class Lines:
    """Pieces of a watch -> its lines. Raises IntegrityError beyond ``MAX_LINE`` bytes without an end."""

    def __init__(self) -> None:
        self._rest: list[bytes] = []
        self._size = 0

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """The lines that end in this piece."""
        *whole, rest = piece.split(b"\n")
        for part in whole:
            self._rest.append(part)
            line, self._rest, self._size = b"".join(self._rest), [], 0
            if line.strip():
                yield line
        self._rest.append(rest)
        self._size += len(rest)
        if self._size > MAX_LINE:
            raise IntegrityError(f"an event has more than {MAX_LINE >> 20} MiB")
