"""What is known of one type of Kubernetes objects, from lists and watches. No I/O, no clock.

The protocol (kubernetes.io/docs/reference/using-api/api-concepts): a list gives all objects and the resource version at
which that was so; a watch from a version gives every change after it. Each event, and each bookmark, carries the
version to go on from when the watch has ended. A version that the server has forgotten is 410 Gone, before or inside a
watch: then everything is listed anew. A list in pages is at one version; what was known stays until its last page is
here, and a list whose token has expired (410 as well) is begun again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Generic

import msgspec

from helios.decoding import from_json
from helios.errors import HeliosError, IntegrityError
from router.discovery.objects import Bookmark, Event, Page, Status, T, decode

GONE: Final = 410
MAX_LINE: Final = 16 << 20
"""Longest event, in bytes; etcd's largest object has 1.5 MiB."""


class Gone(HeliosError):
    """The server does not know the version any more: list anew."""


class Refused(HeliosError):
    """The server answered with an error; its status is ``status``."""


class Reflector(Generic[T]):
    """The objects of a type by namespace and name; ``version`` is where a watch goes on."""

    def __init__(self, kind: type[T]) -> None:
        self._kind: type[T] = kind
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
                self._put(self._coming, decode(item, self._kind))
        except msgspec.DecodeError as error:
            raise IntegrityError(f"a list does not decode: {error}") from None
        if page.metadata.next:
            return page.metadata.next
        if not page.metadata.resource_version:
            raise IntegrityError("a list has no resource version")
        self.objects, self._coming = self._coming, {}
        self.version, self.listed = page.metadata.resource_version, True
        return None

    def event(self, line: bytes) -> bool:
        """A line of a watch: whether ``objects`` changed. Raises Gone, Refused or IntegrityError."""
        try:
            event = from_json(line, Event)
            if event.type == "ERROR":
                raise refusal(from_json(event.object, Status))
            if event.type == "BOOKMARK":
                self._advance(from_json(event.object, Bookmark).metadata.resource_version)
                return False
            one = decode(event.object, self._kind)
        except msgspec.DecodeError as error:
            raise IntegrityError(f"an event does not decode: {error}") from None
        key = one.metadata.namespace, one.metadata.name
        if event.type in ("ADDED", "MODIFIED"):
            changed = bool(self.objects.get(key) != one)
            self._put(self.objects, one)
        elif event.type == "DELETED":
            changed = self.objects.pop(key, None) is not None
        else:
            raise IntegrityError(f"an event has the type {event.type!r}")
        self._advance(one.metadata.resource_version)
        return changed

    def _advance(self, version: str) -> None:
        if not version:
            raise IntegrityError("an event has no resource version")
        self.version = version

    def _put(self, into: dict[tuple[str, str], T], one: T) -> None:
        if not one.metadata.name:
            raise IntegrityError("an object has no name")
        into[one.metadata.namespace, one.metadata.name] = one


def refusal(status: Status) -> HeliosError:
    """The error that a Status is."""
    text = f"{status.code} {status.reason}: {status.message}"
    return Gone(text) if status.code == GONE else Refused(text, code=status.reason or None)


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
