"""The parts of Kubernetes' objects that say where workers are; everything else is skipped while parsing.

EndpointSlice: discovery.k8s.io/v1; Pod: v1. Lists may be null, and so may each condition of an endpoint.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from helios.decoding import from_json
from helios.kube.wire import Metadata, Object


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
    containers: tuple[Container, ...] = ()


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


def decode(content: Any, kind: type[T]) -> T:
    """Raises msgspec.DecodeError."""
    return from_json(content, kind)
