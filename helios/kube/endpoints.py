"""EndpointSlice: discovery.k8s.io/v1, as much of it as says where something is. Lists may be null, and so may each
condition."""

from __future__ import annotations

from helios.kube.wire import Metadata, Object


class Target(Object, frozen=True):
    """What stands behind an endpoint."""

    kind: str = ""
    namespace: str = ""
    name: str = ""
    uid: str = ""


class EndpointConditions(Object, frozen=True):
    ready: bool | None = None
    serving: bool | None = None
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
