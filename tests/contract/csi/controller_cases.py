"""csi-sanity's cases of the Controller service."""

from __future__ import annotations

import uuid

from csi import csi_pb2 as messages
from tests.contract.csi.world import SIZE, World, case
from tests.support.csi import capability, refused

SERVICE = "Controller Service [Controller Server]"


@case(f"{SERVICE} ControllerGetCapabilities should return appropriate capabilities")
def capabilities(world: World) -> None:
    found = world.client.ControllerGetCapabilities().capabilities
    assert found
    assert all(each.WhichOneof("type") == "rpc" and each.rpc.type for each in found)


@case(f"{SERVICE} GetCapacity should return capacity (no optional values added)")
def capacity(world: World) -> None:
    assert world.client.GetCapacity().available_capacity > 0


# --- ListVolumes ---


@case(f"{SERVICE} ListVolumes should return appropriate values (no optional values added)")
def listing(world: World) -> None:
    world.create()
    for entry in world.client.ListVolumes().entries:
        assert entry.volume.volume_id
        assert entry.volume.capacity_bytes >= 0


@case(f"{SERVICE} ListVolumes should fail when an invalid starting_token is passed")
def bad_token(world: World) -> None:
    with refused("ABORTED", "starting_token 'invalid-token'"):
        world.client.ListVolumes(starting_token="invalid-token")


@case(f"{SERVICE} ListVolumes check the presence of new volumes and absence of deleted ones in the volume list")
def presence(world: World) -> None:
    before = world.listed()
    volume = world.create("sanity")
    assert world.listed() == before | {volume.volume_id}
    world.client.DeleteVolume(volume_id=volume.volume_id)
    assert world.listed() == before


@case(
    f"{SERVICE} ListVolumes pagination should detect volumes added between pages and accept tokens when the last "
    "volume from a page is deleted"
)
def pagination(world: World) -> None:
    """Pending in csi-sanity, which calls it fragile."""
    there = {world.create().volume_id for _ in range(3)}
    first = world.client.ListVolumes(max_entries=2)
    assert len(first.entries) == 2
    assert first.next_token
    gone = {entry.volume.volume_id for entry in first.entries}
    for volume in gone:
        world.client.DeleteVolume(volume_id=volume)
    added = world.create().volume_id
    rest = world.client.ListVolumes(starting_token=first.next_token)
    found = [entry.volume.volume_id for entry in rest.entries]
    assert len(found) == len(set(found))
    assert there - gone <= set(found) <= (there - gone) | {added}
    assert rest.next_token == ""


# --- CreateVolume ---


@case(f"{SERVICE} CreateVolume should fail when no name is provided")
def no_name(world: World) -> None:
    with refused("INVALID_ARGUMENT", "name"):
        world.client.CreateVolume(parameters=world.parameters)


@case(f"{SERVICE} CreateVolume should fail when no volume capabilities are provided")
def no_capabilities(world: World) -> None:
    with refused("INVALID_ARGUMENT", "volume_capabilities are missing"):
        world.client.CreateVolume(name="sanity-no-capabilities", parameters=world.parameters)


@case(f"{SERVICE} CreateVolume should return appropriate values SingleNodeWriter NoCapacity")
def without_capacity(world: World) -> None:
    volume = world.create(capacity_range=None)
    assert volume.capacity_bytes > 0  # the model's


@case(f"{SERVICE} CreateVolume should return appropriate values SingleNodeWriter WithCapacity 1Gi")
def with_capacity(world: World) -> None:
    assert world.create().capacity_bytes >= SIZE


@case(
    f"{SERVICE} CreateVolume should not fail when requesting to create a volume with already existing name and same "
    "capacity"
)
def twice(world: World) -> None:
    name = f"sanity-twice-{uuid.uuid4()}"
    assert world.create(name) == world.create(name)


@case(
    f"{SERVICE} CreateVolume should fail when requesting to create a volume with already existing name and different "
    "capacity"
)
def twice_different(world: World) -> None:
    name = f"sanity-twice-different-{uuid.uuid4()}"
    volume = world.create(name, capacity_range={"required_bytes": SIZE, "limit_bytes": SIZE})
    assert volume.capacity_bytes == SIZE
    with refused("ALREADY_EXISTS", f"already, of {SIZE} bytes"):
        world.create(name, capacity_range={"required_bytes": 2 * SIZE, "limit_bytes": 2 * SIZE})


@case(f"{SERVICE} CreateVolume should not fail when creating volume with maximum-length name")
def longest_name(world: World) -> None:
    assert len(world.create(f"sanity-{uuid.uuid4()}".ljust(128, "x")).volume_id.encode()) <= 124


def _not_from(world: World, needs: str, source: dict[str, dict[str, str]]) -> None:
    """Skipped by csi-sanity; what the driver does not offer it refuses instead of ignoring it."""
    assert needs not in world.capabilities()
    with refused("INVALID_ARGUMENT", "volume_content_source"):
        world.create(volume_content_source=source)


@case(f"{SERVICE} CreateVolume should create volume from an existing source snapshot")
def from_snapshot(world: World) -> None:
    _not_from(world, "Controller.CREATE_DELETE_SNAPSHOT", {"snapshot": {"snapshot_id": "snapshot"}})


@case(f"{SERVICE} CreateVolume should fail when the volume source snapshot is not found")
def from_no_snapshot(world: World) -> None:
    _not_from(world, "Controller.CREATE_DELETE_SNAPSHOT", {"snapshot": {"snapshot_id": "non-existing-snapshot-id"}})


@case(f"{SERVICE} CreateVolume should create volume from an existing source volume")
def from_volume(world: World) -> None:
    source = world.create().volume_id
    _not_from(world, "Controller.CLONE_VOLUME", {"volume": {"volume_id": source}})


@case(f"{SERVICE} CreateVolume should fail when the volume source volume is not found")
def from_no_volume(world: World) -> None:
    _not_from(world, "Controller.CLONE_VOLUME", {"volume": {"volume_id": str(uuid.uuid4())}})


@case(f"{SERVICE} CreateVolume should create volume with a volume attribute class")
def with_class(world: World) -> None:
    assert "Controller.MODIFY_VOLUME" not in world.capabilities()
    with refused("INVALID_ARGUMENT", "mutable_parameters"):
        world.create(mutable_parameters={"key": "value"})


@case(f"{SERVICE} CreateVolume should not create volume with an invalid volume attribute class")
def with_bad_class(world: World) -> None:
    with refused("INVALID_ARGUMENT", "mutable_parameters"):
        world.create(mutable_parameters={"XXX_FakeKey": "XXX_FakeValue"})


# --- DeleteVolume ---


@case(f"{SERVICE} DeleteVolume should fail when no volume id is provided")
def delete_nothing(world: World) -> None:
    with refused("INVALID_ARGUMENT", "volume_id is missing"):
        world.client.DeleteVolume()


@case(f"{SERVICE} DeleteVolume should succeed when an invalid volume id is used")
def delete_unknown(world: World) -> None:
    world.client.DeleteVolume(volume_id="reallyfakevolumeid")
    world.client.DeleteVolume(volume_id="../../etc")


@case(f"{SERVICE} DeleteVolume should return appropriate values (no optional values added)")
def delete(world: World) -> None:
    volume = world.create()
    world.client.DeleteVolume(volume_id=volume.volume_id)
    world.client.DeleteVolume(volume_id=volume.volume_id)


# --- ValidateVolumeCapabilities ---


@case(f"{SERVICE} ValidateVolumeCapabilities should fail when no volume id is provided")
def validate_nothing(world: World) -> None:
    with refused("INVALID_ARGUMENT", "volume_id is missing"):
        world.client.ValidateVolumeCapabilities()


@case(f"{SERVICE} ValidateVolumeCapabilities should fail when no volume capabilities are provided")
def validate_no_capabilities(world: World) -> None:
    volume = world.create()
    with refused("INVALID_ARGUMENT", "volume_capabilities are missing"):
        world.client.ValidateVolumeCapabilities(volume_id=volume.volume_id)


@case(f"{SERVICE} ValidateVolumeCapabilities should return appropriate values (no optional values added)")
def validate(world: World) -> None:
    volume = world.create()
    modes = [n for n, number in messages.VolumeCapability.AccessMode.Mode.items() if number]
    for mode in modes:
        answer = world.client.ValidateVolumeCapabilities(
            volume_id=volume.volume_id, volume_capabilities=[capability(mode)]
        )
        assert list(answer.confirmed.volume_capabilities) == [capability(mode)]


@case(f"{SERVICE} ValidateVolumeCapabilities should fail when the requested volume does not exist")
def validate_unknown(world: World) -> None:
    with refused("NOT_FOUND", "there is no volume"):
        world.client.ValidateVolumeCapabilities(volume_id=str(uuid.uuid4()), volume_capabilities=[capability()])
