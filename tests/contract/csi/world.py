"""What a case of csi-sanity is run against, and how cases are named."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from tests.support.csi import Client, Driver, capability

SIZE = 10 << 30
"""What csi-sanity asks for when it makes a volume, in bytes."""
TIMES = 10
"""How often it repeats a call that has to be idempotent."""


@dataclass
class World:
    """A driver, a directory for targets as csi-sanity makes it, and the volumes that a case has made."""

    driver: Driver
    directory: Path
    parameters: dict[str, str]
    made: list[str] = field(default_factory=list)

    @property
    def client(self) -> Client:
        return self.driver.client

    @property
    def target(self) -> str:
        return str(self.directory / "target")

    def request(self, name: str, **fields: Any) -> dict[str, Any]:
        return {
            "name": name,
            "volume_capabilities": [capability()],
            "capacity_range": {"required_bytes": SIZE},
            "parameters": self.parameters,
        } | fields

    def create(self, name: str | None = None, **fields: Any) -> Any:
        """A new volume, deleted in the end."""
        volume = self.client.CreateVolume(**self.request(name or f"sanity-{uuid.uuid4()}", **fields)).volume
        assert volume.volume_id
        self.made.append(volume.volume_id)
        return volume

    def publish(self, volume: Any) -> None:
        self.client.NodePublishVolume(
            volume_id=volume.volume_id,
            target_path=self.target,
            volume_capability=capability(),
            volume_context=dict(volume.volume_context),
        )

    def listed(self) -> set[str]:
        return {entry.volume.volume_id for entry in self.client.ListVolumes().entries}

    def clean_up(self) -> None:
        """As csi-sanity does after each case: unpublish, which may find nothing, and delete."""
        for volume in reversed(self.made):
            try:
                self.client.NodeUnpublishVolume(volume_id=volume, target_path=self.target)
            except grpc.RpcError as error:
                if error.code() != grpc.StatusCode.NOT_FOUND:
                    raise
            self.client.DeleteVolume(volume_id=volume)

    def call_unknown(self, method: str) -> grpc.StatusCode:
        """The status of a call that the driver's own messages do not have."""
        call = self.client.channel.unary_unary(f"/csi.v1.{method}")
        try:
            call(b"", timeout=10)
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            return code
        return grpc.StatusCode.OK

    def capabilities(self) -> set[str]:
        """What the three services report, each as ``Service.NAME``."""
        controller = self.client.ControllerGetCapabilities().capabilities
        node = self.client.NodeGetCapabilities().capabilities
        plugin = self.client.GetPluginCapabilities().capabilities
        return {
            *(f"Controller.{type(c.rpc).Type.Name(c.rpc.type)}" for c in controller),
            *(f"Node.{type(c.rpc).Type.Name(c.rpc.type)}" for c in node),
            *(f"Plugin.{type(c.service).Type.Name(c.service.type)}" for c in plugin),
        }


Case = Callable[[World], None]
CASES: dict[str, Case] = {}


def case(name: str) -> Callable[[Case], Case]:
    """Register the case of a spec by csi-sanity's own name."""

    def register(function: Case) -> Case:
        assert name not in CASES, name
        CASES[name] = function
        return function

    return register
