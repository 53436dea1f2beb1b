"""CSI's Identity service: what the driver is called, what it can do, whether it works."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from csi import csi_pb2 as messages
from csi.health import Health
from csi.until import Until
from csi.wire import Method


class Identity:
    def __init__(self, name: str, health: Health, *, controller: bool) -> None:
        """``controller``: this process serves the controller's calls, too."""
        self._name, self._health, self._controller = name, health, controller

    def methods(self) -> Mapping[str, Method]:
        return {
            "GetPluginInfo": self.get_plugin_info,
            "GetPluginCapabilities": self.get_plugin_capabilities,
            "Probe": self.probe,
        }

    async def get_plugin_info(self, request: Any, until: Until) -> Any:
        return messages.GetPluginInfoResponse(name=self._name, vendor_version=driver_version())

    async def get_plugin_capabilities(self, request: Any, until: Until) -> Any:
        kind = messages.PluginCapability.Service
        types = [kind.CONTROLLER_SERVICE] if self._controller else []
        capabilities = [messages.PluginCapability(service=kind(type=each)) for each in types]
        return messages.GetPluginCapabilitiesResponse(capabilities=capabilities)

    async def probe(self, request: Any, until: Until) -> Any:
        """Not ready before it has recovered, nor when only a restart would help (csi.health)."""
        answer = messages.ProbeResponse()
        answer.ready.value = not self._health.unready
        return answer


def driver_version() -> str:
    try:
        return version("helios-llm")
    except PackageNotFoundError:
        return "unknown"
