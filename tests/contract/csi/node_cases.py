"""csi-sanity's cases of the Node service, on a real mount."""

from __future__ import annotations

import os
import uuid

from tests.contract.csi.world import TIMES, World, case
from tests.support.csi import capability, refused

SERVICE = "Node Service"


@case(f"{SERVICE} NodeGetCapabilities should return appropriate capabilities")
def capabilities(world: World) -> None:
    found = world.client.NodeGetCapabilities().capabilities
    assert found
    assert all(each.WhichOneof("type") == "rpc" and each.rpc.type for each in found)


@case(f"{SERVICE} NodeGetInfo should return appropriate values")
def info(world: World) -> None:
    answer = world.client.NodeGetInfo()
    assert answer.node_id == "node-1"
    assert answer.max_volumes_per_node >= 0


# --- NodePublishVolume ---


@case(f"{SERVICE} NodePublishVolume should fail when no volume id is provided")
def publish_nothing(world: World) -> None:
    with refused("INVALID_ARGUMENT", "volume_id is missing"):
        world.client.NodePublishVolume()


@case(f"{SERVICE} NodePublishVolume should fail when no target path is provided")
def publish_nowhere(world: World) -> None:
    with refused("INVALID_ARGUMENT", "target_path is missing"):
        world.client.NodePublishVolume(volume_id=str(uuid.uuid4()))


@case(f"{SERVICE} NodePublishVolume should fail when no volume capability is provided")
def publish_without_capability(world: World) -> None:
    with refused("INVALID_ARGUMENT", "volume_capability is missing"):
        world.client.NodePublishVolume(volume_id=str(uuid.uuid4()), target_path=world.target)


@case(
    f"{SERVICE} NodePublishVolume with single node multi writer capability should fail when volume with single node "
    "single writer access mode is already mounted at a different target path"
)
def single_writer(world: World) -> None:
    """Skipped by csi-sanity without the capability: nobody writes, so nobody has to be kept from it."""
    assert not {"Node.SINGLE_NODE_MULTI_WRITER", "Controller.SINGLE_NODE_MULTI_WRITER"} & world.capabilities()
    volume, other = world.create(), str(world.directory / "other_target")
    for target in (world.target, other):
        world.client.NodePublishVolume(
            volume_id=volume.volume_id,
            target_path=target,
            volume_capability=capability("SINGLE_NODE_SINGLE_WRITER"),
            volume_context=dict(volume.volume_context),
        )
    world.client.NodeUnpublishVolume(volume_id=volume.volume_id, target_path=other)


# --- NodeUnpublishVolume ---


@case(f"{SERVICE} NodeUnpublishVolume should fail when no volume id is provided")
def unpublish_nothing(world: World) -> None:
    with refused("INVALID_ARGUMENT", "volume_id is missing"):
        world.client.NodeUnpublishVolume()


@case(f"{SERVICE} NodeUnpublishVolume should fail when no target path is provided")
def unpublish_nowhere(world: World) -> None:
    with refused("INVALID_ARGUMENT", "target_path is missing"):
        world.client.NodeUnpublishVolume(volume_id=str(uuid.uuid4()))


@case(f"{SERVICE} NodeUnpublishVolume should remove target path")
def unpublish(world: World) -> None:
    volume = world.create()
    world.publish(volume)
    assert os.listdir(world.target)
    world.client.NodeUnpublishVolume(volume_id=volume.volume_id, target_path=world.target)
    assert not os.path.lexists(world.target)


# --- NodeGetVolumeStats ---


@case(f"{SERVICE} NodeGetVolumeStats should fail when no volume id is provided")
def stats_of_nothing(world: World) -> None:
    with refused("INVALID_ARGUMENT", "volume_id is missing"):
        world.client.NodeGetVolumeStats(volume_path="some/path")


@case(f"{SERVICE} NodeGetVolumeStats should fail when no volume path is provided")
def stats_nowhere(world: World) -> None:
    with refused("INVALID_ARGUMENT", "volume_path is missing"):
        world.client.NodeGetVolumeStats(volume_id=str(uuid.uuid4()))


@case(f"{SERVICE} NodeGetVolumeStats should fail when volume is not found")
def stats_unknown(world: World) -> None:
    with refused("NOT_FOUND", "is not published at"):
        world.client.NodeGetVolumeStats(volume_id=str(uuid.uuid4()), volume_path="some/path")


@case(f"{SERVICE} NodeGetVolumeStats should fail when volume does not exist on the specified path")
def stats_elsewhere(world: World) -> None:
    volume = world.create()
    world.publish(volume)
    with refused("NOT_FOUND", "is not published at"):
        world.client.NodeGetVolumeStats(volume_id=volume.volume_id, volume_path="some/path")


# --- the whole life ---


def _life(world: World, times: int) -> None:
    assert world.client.NodeGetInfo().node_id
    name = f"sanity-node-full-{uuid.uuid4()}"
    volume = world.create(name)
    for _ in range(times):
        world.publish(volume)
    answer = world.client.NodeGetVolumeStats(volume_id=volume.volume_id, volume_path=world.target)
    assert [usage.total > 0 for usage in answer.usage] == [True, True]
    for _ in range(times):
        world.client.NodeUnpublishVolume(volume_id=volume.volume_id, target_path=world.target)
    for _ in range(times):
        world.client.DeleteVolume(volume_id=volume.volume_id)


@case(f"{SERVICE} should work")
def works(world: World) -> None:
    _life(world, 1)


@case(f"{SERVICE} should be idempotent")
def idempotent(world: World) -> None:
    _life(world, TIMES)
