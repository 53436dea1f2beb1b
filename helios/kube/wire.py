"""What lists and watches of a Kubernetes API server say; everything that is not named here is skipped while parsing."""

from __future__ import annotations

import msgspec


class Object(msgspec.Struct, frozen=True, rename="camel"):
    """Base of what the API server sends."""


class Metadata(Object, frozen=True):
    name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None
    deletion_timestamp: str | None = None


class ListMetadata(Object, frozen=True):
    resource_version: str = ""
    next: str | None = msgspec.field(default=None, name="continue")


class Page(Object, frozen=True):
    """A part of a list; what is in it is converted to its type by whoever asked."""

    metadata: ListMetadata
    items: list[msgspec.Raw] | None = None


class Event(Object, frozen=True):
    """A line of a watch. The object of ``ERROR`` is a ``Status``, that of ``BOOKMARK`` has nothing but a version."""

    type: str
    object: msgspec.Raw


class StatusCause(Object, frozen=True):
    """One field that was wrong."""

    field: str = ""
    message: str = ""


class StatusDetails(Object, frozen=True):
    causes: list[StatusCause] | None = None
    retry_after_seconds: int = 0


class Status(Object, frozen=True):
    """metav1.Status: why something was refused."""

    code: int = 0
    reason: str = ""
    message: str = ""
    details: StatusDetails | None = None


class Bookmark(Object, frozen=True):
    metadata: Metadata
