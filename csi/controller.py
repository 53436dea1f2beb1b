"""CSI's Controller service: volumes from StorageClasses whose parameters name a model and a revision.

Making one resolves the revision and keeps the commit at the registry (``csi.provisioned``); nothing is stored here.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, TypeVar

from csi import attributes, capabilities, provisioned
from csi import csi_pb2 as messages
from csi.attributes import Wanted
from csi.calls import Calls
from csi.errors import OutOfRange, Pending
from csi.pending import Targets
from csi.provisioned import Made
from csi.registry import Registry
from csi.until import Until
from csi.wire import Method
from helios.errors import Conflict, HeliosError, InvalidInput, NotFound

log = logging.getLogger("csi.controller")

T = TypeVar("T")

ROOM: Final = 1 << 60
"""What GetCapacity says, in bytes: volumes take no room of their own, so any number of them fits."""
MAX_NAME: Final = 128
"""Longest name of a volume, in bytes, by CSI 1.12."""

_TOKEN = re.compile(r"after:(helios-[a-z2-7]{32})\Z")


class Controller:
    def __init__(self, registry: Registry, calls: Calls, cluster: str) -> None:
        self._registry, self._calls, self._cluster = registry, calls, cluster
        self._pending = Targets()

    def methods(self) -> Mapping[str, Method]:
        return {
            "CreateVolume": self.create,
            "DeleteVolume": self.delete,
            "ValidateVolumeCapabilities": self.validate,
            "ListVolumes": self.list_volumes,
            "GetCapacity": self.get_capacity,
            "ControllerGetCapabilities": self.get_capabilities,
            "ControllerGetVolume": self.get,
        }

    async def create(self, request: Any, until: Until) -> Any:
        if not request.name or len(request.name.encode()) > MAX_NAME:
            raise InvalidInput(f"name is missing, or longer than {MAX_NAME} bytes")
        capabilities.check_all(request.volume_capabilities)
        if request.HasField("volume_content_source"):
            raise InvalidInput("volume_content_source: volumes are made of models, not of snapshots or volumes")
        if request.mutable_parameters:
            raise InvalidInput("mutable_parameters: volumes can't be changed", hint="Use no VolumeAttributesClass.")
        least, most = _range(request)
        wanted = attributes.read(request.parameters, where="parameters")
        volume, asked = provisioned.volume_id(request.name), provisioned.digest(wanted)
        with self._pending.operation(volume, "making"):
            found = await self._find(volume, until)
            if found:
                made = found[0]
                if made.asked != asked:
                    raise Conflict(
                        f"there is a volume {request.name} already, made with other parameters ({made.repo} at "
                        f"{made.commit})",
                        hint="Delete it first.",
                    )
                if made.capacity < least or 0 < most < made.capacity:
                    raise Conflict(f"there is a volume {request.name} already, of {made.capacity} bytes")
            else:
                commit, size = await self._run("resolving the model", lambda: self._registry.resolve(wanted), until)
                if 0 < most < max(size, least):
                    raise OutOfRange(f"{wanted.repo} at {commit} has {size} bytes, more than the limit of {most}")
                made = Made(self._cluster, volume, max(size, least), asked, str(wanted.repo), commit, 0.0)
                await self._run("keeping the commit", lambda: self._registry.keep(made), until)
                log.info("volume made", extra={"volume": volume, "repo": made.repo, "commit": commit})
            return messages.CreateVolumeResponse(volume=_shown(made, wanted))

    async def delete(self, request: Any, until: Until) -> Any:
        if not request.volume_id:
            raise InvalidInput("volume_id is missing")
        with self._pending.operation(request.volume_id, "deleting"):
            for made in await self._find(request.volume_id, until):
                await self._run("releasing the commit", partial(self._registry.release, made), until)
                log.info("volume deleted", extra={"volume": made.id, "repo": made.repo, "commit": made.commit})
        return messages.DeleteVolumeResponse()

    async def validate(self, request: Any, until: Until) -> Any:
        if not request.volume_id:
            raise InvalidInput("volume_id is missing")
        if not request.volume_capabilities:
            raise InvalidInput("volume_capabilities are missing")
        found = await self._find(request.volume_id, until)
        answer = messages.ValidateVolumeCapabilitiesResponse()
        try:
            wanted = attributes.read(request.volume_context, where="volume_context") if request.volume_context else None
            if wanted is not None:  # a PersistentVolume that somebody wrote by hand, too
                commit, _ = await self._run("resolving the model", lambda: self._registry.resolve(wanted), until)
                if found and (found[0].repo, found[0].commit) != (str(wanted.repo), commit):
                    raise InvalidInput(f"the volume is {found[0].repo} at {found[0].commit}")
            elif not found:
                raise NotFound(f"there is no volume {request.volume_id[:150]!r}")
            capabilities.check_all(request.volume_capabilities)
        except InvalidInput as error:
            answer.message = str(error)
            return answer
        answer.confirmed.volume_context.update(request.volume_context)
        answer.confirmed.volume_capabilities.extend(request.volume_capabilities)
        answer.confirmed.parameters.update(request.parameters)
        return answer

    async def list_volumes(self, request: Any, until: Until) -> Any:
        if request.max_entries < 0:
            raise InvalidInput(f"max_entries is {request.max_entries}; 0 or more are possible")
        after = ""
        if request.starting_token:
            token = _TOKEN.match(request.starting_token)
            if token is None:
                raise Pending(f"starting_token {request.starting_token[:80]!r} is none of ours: begin the list anew")
            after = token[1]
        volumes = {made.id: made for made in await self._volumes(until) if made.id > after}
        page = list(volumes.values())[: request.max_entries or None]
        entry = messages.ListVolumesResponse.Entry
        return messages.ListVolumesResponse(
            entries=[entry(volume=_shown(made)) for made in page],
            next_token=f"after:{page[-1].id}" if 0 < len(page) < len(volumes) else "",
        )

    async def get(self, request: Any, until: Until) -> Any:
        if not request.volume_id:
            raise InvalidInput("volume_id is missing")
        found = await self._find(request.volume_id, until)
        if not found:
            raise NotFound(f"there is no volume {request.volume_id[:150]!r}")
        status = messages.ControllerGetVolumeResponse.VolumeStatus()
        return messages.ControllerGetVolumeResponse(volume=_shown(found[0]), status=status)

    async def get_capacity(self, request: Any, until: Until) -> Any:
        """Any amount, but none of a model that can't be had."""
        room = ROOM
        try:
            for capability in request.volume_capabilities:
                capabilities.check(capability)
            if request.parameters:
                wanted = attributes.read(request.parameters, where="parameters")
                await self._run("resolving the model", lambda: self._registry.resolve(wanted), until)
        except (InvalidInput, NotFound):
            room = 0
        return messages.GetCapacityResponse(available_capacity=room)

    async def get_capabilities(self, request: Any, until: Until) -> Any:
        rpc = messages.ControllerServiceCapability.RPC
        types = (rpc.CREATE_DELETE_VOLUME, rpc.LIST_VOLUMES, rpc.GET_CAPACITY, rpc.GET_VOLUME)
        found = [messages.ControllerServiceCapability(rpc=rpc(type=each)) for each in types]
        return messages.ControllerGetCapabilitiesResponse(capabilities=found)

    async def _find(self, volume: str, until: Until) -> list[Made]:
        return [made for made in await self._volumes(until) if made.id == volume]

    async def _volumes(self, until: Until) -> list[Made]:
        return await self._run("listing the volumes", self._registry.volumes, until)

    async def _run(self, what: str, function: Callable[[], T], until: Until) -> T:
        return await self._calls.run(what, function, until.left)


async def keep_renewed(registry: Registry, calls: Calls, every_s: float = 3600.0) -> None:
    """Renew the leases of the volumes that there are, for ever; the first time at once."""

    def renew() -> int:
        volumes = provisioned.due(registry.volumes(), time.time())
        for made in volumes:
            try:
                registry.keep(made)
            except NotFound as error:
                log.warning("the commit of a volume has gone", extra={"volume": made.id, "reason": error.message})
        return len(volumes)

    while True:
        try:
            if count := await calls.run("renewing the volumes' leases", renew, 600.0):
                log.info("leases of volumes are renewed", extra={"volumes": count})
        except HeliosError as error:
            log.warning("leases of volumes can't be renewed now", extra={"reason": error.message})
        await asyncio.sleep(every_s)


def _range(request: Any) -> tuple[int, int]:
    """The least and the most bytes that are wanted, 0: any. Raises InvalidInput."""
    least, most = request.capacity_range.required_bytes, request.capacity_range.limit_bytes
    if least < 0 or most < 0 or 0 < most < least:
        raise InvalidInput(f"capacity_range: at least {least} and at most {most} bytes is no range")
    return least, most


def _shown(made: Made, wanted: Wanted | None = None) -> Any:
    """A volume with what its pods will need: of one in a list only what its lease tells."""
    context = {"repo": made.repo, "commit": made.commit}
    if wanted is not None:
        context |= {"revision": wanted.revision, "format": attributes.name_of(wanted.form)}
        if wanted.prefetch is not None:
            context["prefetch"] = ",".join(wanted.prefetch) or "true"
        if wanted.priority is not None:
            context["priority"] = wanted.priority
    return messages.Volume(volume_id=made.id, capacity_bytes=made.capacity, volume_context=context)
