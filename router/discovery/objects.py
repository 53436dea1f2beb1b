"""The parts of Kubernetes' objects that say where workers are; everything else is skipped while parsing.

EndpointSlice: discovery.k8s.io/v1; Pod: v1. Lists may be null, and so may each condition of an endpoint.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from helios.decoding import from_json


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


class Target(Object, frozen=True):
    """What stands behind an endpoint."""

    kind: str = ""
    namespace: str = ""
    name: str = ""
    uid: str = ""


class EndpointConditions(Object, frozen=True):
    ready: bool | None = None
    terminating: bool | None = None


class Endpoint(Object, frozen=True):
    addresses: list[str] | None = None
    conditions: EndpointConditions | None = None
    target_ref: Target | None = None


class SlicePort(Object, frozen=True):
    name: str | None = None
    port: int | None = None
    app_protocol: str | None = None


class EndpointSlice(Object, frozen=True):
    metadata: Metadata
    address_type: str = "IPv4"
    endpoints: list[Endpoint] | None = None
    ports: list[SlicePort] | None = None


class ContainerPort(Object, frozen=True):
    container_port: int
    name: str | None = None


class Container(Object, frozen=True):
    ports: list[ContainerPort] | None = None


class PodSpec(Object, frozen=True):
    containers: list[Container] = []


class PodCondition(Object, frozen=True):
    type: str = ""
    status: str = ""


class PodStatus(Object, frozen=True):
    phase: str = ""
    pod_ip: str | None = msgspec.field(default=None, name="podIP")
    conditions: list[PodCondition] | None = None


class Pod(Object, frozen=True):
    metadata: Metadata
    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()


T = TypeVar("T", EndpointSlice, Pod)


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


class Status(Object, frozen=True):
    """metav1.Status: why something was refused."""

    code: int = 0
    reason: str = ""
    message: str = ""


class Bookmark(Object, frozen=True):
    metadata: Metadata


def decode(content: Any, kind: type[T]) -> T:
    """Raises msgspec.DecodeError."""
    return from_json(content, kind)
