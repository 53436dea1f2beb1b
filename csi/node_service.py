"""CSI's Node service: requests into what ``csi.node`` does, and answers out of it.

Staging is not reported and not there: it would be for work that the pods of one volume share, and all of that (pinning,
one listing, one cache) is done in the mount, once for a volume id, whoever publishes it first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from csi import attributes, capabilities
from csi import csi_pb2 as messages
from csi.node import Volumes
from csi.rights import Rights
from csi.until import Until
from csi.wire import Method
from helios.errors import Forbidden, InvalidInput, Unauthorized


class NodeService:
    def __init__(self, node_id: str, volumes: Volumes, rights: Rights) -> None:
        self._node_id, self._volumes, self._rights = node_id, volumes, rights

    def methods(self) -> Mapping[str, Method]:
        return {
            "NodePublishVolume": self.publish,
            "NodeUnpublishVolume": self.unpublish,
            "NodeGetVolumeStats": self.stats,
            "NodeGetCapabilities": self.get_capabilities,
            "NodeGetInfo": self.get_info,
        }

    async def publish(self, request: Any, until: Until) -> Any:
        volume = attributes.check_volume_id(request.volume_id)
        if not request.target_path:
            raise InvalidInput("target_path is missing")
        if not request.HasField("volume_capability"):
            raise InvalidInput("volume_capability is missing")
        options = capabilities.check(request.volume_capability)
        wanted = attributes.read(request.volume_context, where="volume_context")
        try:
            await self._rights.check(wanted.repo, request.volume_context, request.secrets, until)
        except (Forbidden, Unauthorized) as error:
            if await self._volumes.shows(volume, request.target_path, until):
                # CSI has no way to take a volume from a pod that runs: the kubelet shows this as the pod's event.
                message = f"{error.message}; the volume stays mounted in this pod until it ends"
                raise type(error)(message, hint=error.hint) from None
            raise
        await self._volumes.publish(volume, wanted, request.target_path, options, until)
        return messages.NodePublishVolumeResponse()

    async def unpublish(self, request: Any, until: Until) -> Any:
        volume = attributes.check_volume_id(request.volume_id)
        await self._volumes.unpublish(volume, request.target_path, until)
        return messages.NodeUnpublishVolumeResponse()

    async def stats(self, request: Any, until: Until) -> Any:
        volume = attributes.check_volume_id(request.volume_id)
        if not request.volume_path:
            raise InvalidInput("volume_path is missing")
        size, inodes, wrong = await self._volumes.usage(volume, request.volume_path, until)
        unit = messages.VolumeUsage.Unit
        usage = [
            messages.VolumeUsage(total=count, used=count, available=0, unit=each)
            for count, each in ((size, unit.BYTES), (inodes, unit.INODES))
        ]
        condition = messages.VolumeCondition(abnormal=bool(wrong), message=wrong or "the volume can be read")
        return messages.NodeGetVolumeStatsResponse(usage=usage, volume_condition=condition)

    async def get_capabilities(self, request: Any, until: Until) -> Any:
        rpc = messages.NodeServiceCapability.RPC
        types = (rpc.GET_VOLUME_STATS, rpc.VOLUME_CONDITION)
        found = [messages.NodeServiceCapability(rpc=rpc(type=each)) for each in types]
        return messages.NodeGetCapabilitiesResponse(capabilities=found)

    async def get_info(self, request: Any, until: Until) -> Any:
        return messages.NodeGetInfoResponse(node_id=self._node_id)
