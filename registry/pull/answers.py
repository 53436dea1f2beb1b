"""What is read of a Hub's answers: of a repository's info, and of a listing.

An upstream is not trusted with memory. Only what is asked for here is made of an answer, whose length and number of
objects are looked at before; msgspec passes over the rest without making anything of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final, TypeVar

import msgspec

from helios.decoding import from_json
from helios.errors import IntegrityError
from heliosfs.store.bulk import MAX_MANIFEST
from registry import card
from registry.pull.listing import RemoteFile

MAX_JSON: Final = MAX_MANIFEST
"""Longest answer in bytes: a file takes more of one than of a manifest."""
MAX_FILES: Final = 200_000
"""Most files of a listing: more than a manifest may have."""
MAX_OBJECTS: Final = 2 * MAX_FILES + 100_000
"""Most objects of an answer: two for each file, and what else is in an info."""
MAX_BASES: Final = 64 << 10
"""Longest text, in bytes, of what a card says a model comes from: it is not read where it is longer."""

T = TypeVar("T")


class _SiblingLfs(msgspec.Struct, frozen=True, gc=False):
    sha256: str


class Sibling(msgspec.Struct, frozen=True, gc=False):
    """A file in an info."""

    rfilename: str
    size: int | None = None
    blobId: str | None = None  # noqa: N815 - as the Hub calls it
    lfs: _SiblingLfs | None = None

    def file(self) -> RemoteFile | None:
        """None where the size or the id is left out."""
        if self.size is None or self.blobId is None:
            return None
        return RemoteFile(self.rfilename, self.size, self.blobId, None if self.lfs is None else self.lfs.sha256)


class _Card(msgspec.Struct, frozen=True):
    base_model: msgspec.Raw = msgspec.Raw()
    base_model_relation: msgspec.Raw = msgspec.Raw()


class Head(msgspec.Struct, frozen=True):
    """Of a repository's info: where a revision is, and who may read it."""

    sha: str | None = None
    private: bool | None = None
    gated: bool | str | None = None

    @property
    def restricted(self) -> bool:
        return bool(self.private) or bool(self.gated)


class Info(Head, frozen=True):
    """And what it holds."""

    siblings: list[Sibling] | None = None
    author: str | None = None
    lastModified: str | None = None  # noqa: N815
    cardData: msgspec.Raw = msgspec.Raw()  # noqa: N815

    @property
    def seconds(self) -> int | None:
        """When it was changed, in whole seconds since 1970."""
        with contextlib.suppress(ValueError):
            return int(datetime.fromisoformat(self.lastModified).timestamp()) if self.lastModified else None
        return None

    @property
    def card(self) -> dict[str, Any]:
        """The head of the README; nothing where that is no object, or longer than one of ours may be."""
        if not 0 < len(memoryview(self.cardData)) <= card.MAX_CARD:
            return {}
        found = msgspec.json.decode(self.cardData)
        return found if isinstance(found, dict) else {}

    @property
    def lineage(self) -> dict[str, str]:
        """What the card says the model comes from, however long it is."""
        if not memoryview(self.cardData):
            return {}
        try:
            given = from_json(self.cardData, _Card | None)
        except msgspec.ValidationError:  # a card that is none says nothing
            return {}
        return {} if given is None else card.lineage(_plain(given))


class _TreeLfs(msgspec.Struct, frozen=True, gc=False):
    oid: str


class Item(msgspec.Struct, frozen=True, gc=False):
    """A file, or something else, in a listing."""

    type: str
    path: str
    size: int = 0
    oid: str = ""
    lfs: _TreeLfs | None = None

    def file(self) -> RemoteFile:
        return RemoteFile(self.path, self.size, self.oid, None if self.lfs is None else self.lfs.oid)


def decode(endpoint: str, body: bytes, kind: type[T]) -> T:
    """Raises IntegrityError, saying where it is wrong, for an answer that is no ``kind``, or too large."""
    objects = body.count(b"{")  # those in texts count, too: there are not that many
    if objects > MAX_OBJECTS:
        raise odd(endpoint, f"an answer of {objects:,} objects, {MAX_OBJECTS:,} are the most")
    try:
        return from_json(body, kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise odd(endpoint, f"{error}") from None


def odd(endpoint: str, how: str) -> IntegrityError:
    """The error for an answer that makes no sense."""
    return IntegrityError(
        f"{endpoint} does not answer like a Hub: {how}"[:300], hint="Check registry.upstream or HF_ENDPOINT."
    )


def _plain(given: _Card) -> Mapping[str, Any]:
    out: dict[str, Any] = {}
    for name in given.__struct_fields__:
        raw: msgspec.Raw = getattr(given, name)
        if 0 < len(memoryview(raw)) <= MAX_BASES:
            out[name] = msgspec.json.decode(raw)
    return out
