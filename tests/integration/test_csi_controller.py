"""The CSI driver's controller part: volumes that are leases at a real registry, and nothing anywhere else."""

import contextlib
import os
import time

import pytest

from csi import csi_pb2 as messages
from tests.support.command import Command
from tests.support.csi import BLOCK, all_at_once, capability, refused, running_driver
from tests.support.mounts import mounted, run, write
from tests.support.registry import running_registry

FILES = {"config.json": b'{"a": 1}', "weights.bin": b"w" * 100_000}
NEW = {"config.json": b'{"a": 2}'}
SIZE = sum(map(len, FILES.values()))


@pytest.fixture
def registry(helios, helios_home, tmp_path):
    with running_registry(helios) as registry:
        run(helios_home, "push", write(tmp_path / "m", FILES), "org/name", HELIOS_REGISTRY__URLS=registry.url)
        yield registry


@pytest.fixture
def driver(registry, helios_home, tmp_path):
    with running_driver(
        helios_home, tmp_path, "--mode", "controller", node=False, HELIOS_REGISTRY__URLS=registry.url
    ) as driver:
        yield driver


def create(driver, name, **parameters):
    request = {"name": name, "volume_capabilities": [capability()], "parameters": {"model": "org/name"} | parameters}
    return driver.client.CreateVolume(**request).volume


def leases(registry):
    with contextlib.closing(registry.client()) as client:
        return {(lease.repo, lease.commit) for lease in client.leases() if "csi/1/" in lease.holder}


def push(home, registry, directory, spec):
    return run(home, "push", directory, spec, HELIOS_REGISTRY__URLS=registry.url).stdout.strip()


def test_a_made_volume_is_at_the_commit_that_its_revision_named(driver, registry, helios_home, tmp_path):
    volume = create(driver, "pvc-1")
    (old,) = [commit for _, commit in leases(registry)]
    assert dict(volume.volume_context) == {
        "repo": "models/org/name", "revision": "main", "commit": old, "format": "files",
    }  # fmt: skip
    assert volume.capacity_bytes == SIZE
    new = push(helios_home, registry, write(tmp_path / "new", NEW), "org/name")
    assert create(driver, "pvc-1") == volume
    assert create(driver, "pvc-2").volume_context["commit"] == new
    assert leases(registry) == {("models/org/name", old), ("models/org/name", new)}
    driver.client.DeleteVolume(volume_id=volume.volume_id)
    assert leases(registry) == {("models/org/name", new)}
    assert create(driver, "pvc-1").volume_context["commit"] == new


def test_a_commit_stays_as_long_as_its_volume(helios_home, tmp_path):
    """Its ref has moved, nobody has it mounted, and everything else goes at once."""
    at_once = {"KEEP_HISTORY": "false", "KEEP_COMMITS_S": "0", "GC_GRACE_S": "0.5", "GC_EVERY_S": "0", "LEASE_S": "2"}
    core = Command(tmp_path / "core", **{f"HELIOS_REGISTRY__{key}": value for key, value in at_once.items()})
    with running_registry(core) as registry, contextlib.closing(registry.client()) as client:

        def collect():
            time.sleep(0.6)
            *_, report = client.collect(dry_run=False, timeout_s=60)
            return report["commits"]

        push(helios_home, registry, write(tmp_path / "m", FILES), "org/name")
        env = {"HELIOS_REGISTRY__URLS": registry.url}
        with running_driver(helios_home, tmp_path, "--mode", "controller", node=False, **env) as driver:
            volume = create(driver, "pvc")
            push(helios_home, registry, write(tmp_path / "new", NEW), "org/name")
            assert [collect() for _ in range(3)] == [2] * 3
            driver.client.DeleteVolume(volume_id=volume.volume_id)
            end = time.monotonic() + 30
            while collect() != 1:
                assert time.monotonic() < end, "the commit stays"


def test_the_same_name_with_other_parameters_exists_already(driver):
    create(driver, "pvc")
    for other in ({"revision": "v1"}, {"format": "hub"}, {"prefetch": "true"}, {"model": "org/other"}):
        with refused("ALREADY_EXISTS", "there is a volume pvc already, made with other parameters"):
            create(driver, "pvc", **other)
    assert len(driver.client.ListVolumes().entries) == 1


@pytest.mark.parametrize(
    ("change", "status", "saying"),
    [
        ({"parameters": {"model": "org/unknown"}}, "NOT_FOUND", "org/unknown"),
        ({"parameters": {"model": "org/name", "revision": "v9"}}, "NOT_FOUND", "v9"),
        ({"parameters": {}}, "INVALID_ARGUMENT", "parameters has to say what the volume holds"),
        ({"parameters": {"model": "org/name", "Revision": "x"}}, "INVALID_ARGUMENT", "did you mean 'revision'"),
        ({"parameters": {"model": "../../etc/passwd"}}, "INVALID_ARGUMENT", "etc"),
        ({"name": ""}, "INVALID_ARGUMENT", "name"),
        ({"name": "x" * 129}, "INVALID_ARGUMENT", "longer than 128"),
        ({"volume_capabilities": []}, "INVALID_ARGUMENT", "volume_capabilities are missing"),
        ({"volume_capabilities": [BLOCK]}, "INVALID_ARGUMENT", "volumeMode Filesystem"),
        ({"capacity_range": {"limit_bytes": SIZE - 1}}, "OUT_OF_RANGE", f"has {SIZE} bytes, more than the limit"),
        ({"capacity_range": {"required_bytes": 5, "limit_bytes": 4}}, "INVALID_ARGUMENT", "no range"),
        ({"capacity_range": {"required_bytes": -1}}, "INVALID_ARGUMENT", "no range"),
    ],
)
def test_what_can_not_be_made_is_refused_and_leaves_nothing(driver, registry, change, status, saying):
    good = {"name": "pvc", "volume_capabilities": [capability()], "parameters": {"model": "org/name"}}
    with refused(status, saying):
        driver.client.CreateVolume(**good | change)
    assert leases(registry) == set()


def test_a_registry_that_is_away_is_told_and_found_again(driver, registry, helios):
    volume = create(driver, "pvc")
    registry.kill()
    for call in (
        lambda: create(driver, "other"),
        lambda: driver.client.DeleteVolume(volume_id=volume.volume_id),
        lambda: driver.client.ListVolumes(),
    ):
        with refused("UNAVAILABLE", "."):
            call()
    assert driver.client.Probe().ready.value
    driver.stop()
    with running_registry(helios) as again:
        driver.environ["HELIOS_REGISTRY__URLS"] = again.url
        driver.start()
        assert [entry.volume.volume_id for entry in driver.client.ListVolumes().entries] == [volume.volume_id]
        driver.client.DeleteVolume(volume_id=volume.volume_id)
        assert leases(again) == set()


def test_all_that_a_controller_knows_is_at_the_registry(driver, registry):
    made = {create(driver, f"pvc-{number}").volume_id for number in range(5)}
    driver.restart()
    seen, token = [], ""
    while True:
        page = driver.client.ListVolumes(max_entries=2, starting_token=token)
        seen += [entry.volume.volume_id for entry in page.entries]
        token = page.next_token
        if not token:
            break
    assert sorted(made) == seen
    found = driver.client.ControllerGetVolume(volume_id=seen[0]).volume
    assert (found.volume_id, found.capacity_bytes) == (seen[0], SIZE)
    with refused("NOT_FOUND", "there is no volume"):
        driver.client.ControllerGetVolume(volume_id="other")
    all_at_once(*[lambda v=v: driver.client.DeleteVolume(volume_id=v) for v in made])
    assert leases(registry) == set()


def test_clusters_that_share_a_registry_have_volumes_of_their_own(driver, registry, helios_home, tmp_path):
    env = {"HELIOS_REGISTRY__URLS": registry.url, "HELIOS_CSI__CLUSTER": "west"}
    (tmp_path / "west").mkdir()
    with running_driver(helios_home, tmp_path / "west", "--mode", "controller", node=False, **env) as west:
        ours, theirs = create(driver, "pvc"), create(west, "pvc", format="hub")
        assert [e.volume.volume_id for e in driver.client.ListVolumes().entries] == [ours.volume_id]
        west.client.DeleteVolume(volume_id=theirs.volume_id)
        assert len(driver.client.ListVolumes().entries) == 1
        assert len(west.client.ListVolumes().entries) == 0


def test_callers_who_make_one_volume_at_once_get_one(driver, registry):
    found = all_at_once(*[lambda: create(driver, "pvc")] * 16)
    volumes = [each for each in found if isinstance(each, messages.Volume)]
    assert volumes
    assert all(volume == volumes[0] for volume in volumes)
    assert {e.code().name for e in found if not isinstance(e, messages.Volume)} <= {"ABORTED"}
    assert len(leases(registry)) == 1


def test_a_volume_that_somebody_wrote_by_hand_is_looked_at_too(driver):
    def validate(**fields):
        return driver.client.ValidateVolumeCapabilities(
            **{"volume_id": "by-hand", "volume_capabilities": [capability()]} | fields
        )

    assert validate(volume_context={"model": "org/name"}).HasField("confirmed")
    for fields, saying in (
        ({"volume_context": {"model": "org/name", "x": "y"}}, "unknown key"),
        ({"volume_context": {"model": "org/name"}, "volume_capabilities": [BLOCK]}, "Filesystem"),
    ):
        answer = validate(**fields)
        assert not answer.HasField("confirmed")
        assert saying in answer.message
    with refused("NOT_FOUND", "org/unknown"):
        validate(volume_context={"model": "org/unknown"})


def test_capacity_is_there_for_models_that_are(driver):
    assert driver.client.GetCapacity(parameters={"model": "org/name"}).available_capacity >= SIZE
    assert driver.client.GetCapacity(parameters={"model": "org/unknown"}).available_capacity == 0
    assert driver.client.GetCapacity(volume_capabilities=[BLOCK]).available_capacity == 0


def test_a_process_serves_what_its_mode_says(driver, registry, helios_home, tmp_path):
    assert len(driver.client.GetPluginCapabilities().capabilities) == 1
    with refused("UNIMPLEMENTED"):
        driver.client.NodeGetInfo()
    (tmp_path / "node").mkdir()
    with running_driver(helios_home, tmp_path / "node", "--mode", "node") as node:
        assert len(node.client.GetPluginCapabilities().capabilities) == 0
        assert node.client.NodeGetInfo().node_id == "node-1"
        with refused("UNIMPLEMENTED"):
            node.client.ListVolumes()


@pytest.mark.fuse
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may bind-mount")
def test_a_pod_gets_the_commit_that_was_kept_in_whichever_format(driver, registry, helios_home, tmp_path):
    env = {"HELIOS_REGISTRY__URLS": registry.url}
    plain, hub = create(driver, "plain"), create(driver, "hub", format="hub")
    push(helios_home, registry, write(tmp_path / "new", NEW), "org/name")
    (tmp_path / "node").mkdir()
    with mounted(helios_home, tmp_path / "mnt", **env), running_driver(helios_home, tmp_path / "node") as node:
        for volume in (plain, hub):
            target = node.target(volume.volume_id)
            node.publish(volume.volume_id, target, **dict(volume.volume_context))
            commit = volume.volume_context["commit"]
            files = target / "models--org--name/snapshots" / commit if volume is hub else target
            assert (files / "config.json").read_bytes() == FILES["config.json"]
            if volume is hub:
                assert (target / "models--org--name/refs/main").read_text() == commit
            node.unpublish(volume.volume_id, target)
