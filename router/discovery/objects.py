"""The parts of Kubernetes' objects that say where workers are; everything else is skipped while parsing.

EndpointSlice: discovery.k8s.io/v1; Pod, Service: v1. Lists may be null, and so may each condition of an endpoint.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from helios.decoding import from_json
from helios.kube.endpoints import EndpointSlice
from helios.kube.wire import Metadata, Object


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


class Service(Object, frozen=True):
    """Its name, labels and annotations."""

    metadata: Metadata


T = TypeVar("T", EndpointSlice, Pod, Service)


def decode(content: Any, kind: type[T]) -> T:
    """Raises msgspec.DecodeError."""
    return from_json(content, kind)
