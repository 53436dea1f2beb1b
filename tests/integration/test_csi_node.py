"""The CSI driver's node part: a real driver, a real mount, real binds, and everything that is killed under them."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import grpc
import pytest

from csi import csi_pb2 as messages
from helios.home import Home
from helios.mounts import find_mount, mount_table
from tests.support.csi import BLOCK, all_at_once, capability, refused, running_driver
from tests.support.mounts import Mount, call, fails, kill, mounted, next_worker, push, run, worker, write
from tests.support.registry import running_registry

pytestmark = [pytest.mark.fuse, pytest.mark.skipif(os.geteuid() != 0, reason="only root may bind-mount")]

FILES = {"config.json": b'{"a": 1}', "weights.bin": b"w" * 3_000_000, "sub/deep.txt": b"deep"}
MODES = [name for name, number in messages.VolumeCapability.AccessMode.Mode.items() if number]
NEW = {"config.json": b'{"a": 2}'}


def contents(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in Path(directory).rglob("*") if p.is_file()}


def volumes(mount):
    return [record["id"] for record in call(mount, "GET", "volumes")["volumes"]]


@pytest.fixture(scope="module")
def mount(tmp_path_factory):
    base = tmp_path_factory.mktemp("csi")
    home = Home(base / "home")
    push(home, write(base / "first", FILES), "org/name")
    with mounted(home, base / "mnt") as mount:
        yield mount


@pytest.fixture(scope="module")
def shared(mount, tmp_path_factory):
    with running_driver(mount.home, tmp_path_factory.mktemp("driver")) as driver:
        yield driver


@pytest.fixture
def driver(shared, mount):
    """A driver that has published nothing, and in the end has nothing published and nothing left."""
    yield shared
    assert shared.mounts() == []
    assert volumes(mount) == []


def test_a_published_volume_shows_one_model_read_only_and_nothing_else(driver, mount):
    target = driver.target("pod")
    driver.publish("pvc-1", target, model="org/name")
    assert contents(target) == FILES
    assert sorted(os.listdir(target)) == ["config.json", "sub", "weights.bin"]
    with fails(errno.EROFS):
        (target / "new").write_bytes(b"x")
    with fails(errno.EROFS):
        (target / "config.json").open("r+b")
    with fails(errno.EROFS):
        (target / "config.json").unlink()
    entry = find_mount(target)
    assert {"ro", "nosuid", "nodev"} <= entry.options
    assert volumes(mount) == ["csi.pvc-1"]
    driver.unpublish("pvc-1", target)
    assert not target.exists()
    assert volumes(mount) == []


def test_a_volume_can_be_a_hub_cache(driver, mount):
    commit = json.loads(run(mount.home, "show", "org/name", "--json").stdout)["refs"]["main"]
    target = driver.target("pod")
    driver.publish("v", target, model="org/name", format="hub")
    assert os.listdir(target) == ["models--org--name"]
    assert contents(target / "models--org--name/snapshots" / commit) == FILES
    driver.unpublish("v", target)


def test_publishing_and_unpublishing_ten_times_is_like_once(driver):
    target = driver.target("pod")
    for _ in range(10):
        driver.publish("v", target, model="org/name")
    assert driver.mounts() == [str(target)]
    assert contents(target) == FILES
    for _ in range(10):
        driver.unpublish("v", target)


def test_pods_share_a_volume_until_the_last_one_leaves(driver, mount):
    first, second = driver.target("first"), driver.target("second")
    driver.publish("v", first, model="org/name")
    driver.publish("v", second, model="org/name")
    driver.unpublish("v", first)
    assert contents(second) == FILES
    assert volumes(mount) == ["csi.v"]
    driver.unpublish("v", second)


def test_a_volume_stays_at_its_commit_when_the_ref_moves(driver, mount, tmp_path):
    old = push(mount.home, write(tmp_path / "old", FILES), "org/moves")
    first, second, third = (driver.target(name) for name in ("first", "second", "third"))
    driver.publish("v", first, model="org/moves")
    push(mount.home, write(tmp_path / "new", NEW), "org/moves")
    driver.publish("v", first, model="org/moves")
    driver.publish("v", second, model="org/moves")
    assert contents(first) == contents(second) == FILES
    driver.publish("pinned", third, model="org/moves", revision="main", commit=old)
    assert contents(third) == FILES
    for volume, target in (("v", first), ("v", second), ("pinned", third)):
        driver.unpublish(volume, target)
    driver.publish("v", first, model="org/moves", commit=old)
    with refused("ALREADY_EXISTS", "is models/org/moves@main at"):
        driver.publish("v", second, model="org/moves", revision="main", commit="0" * 40)
    driver.unpublish("v", first)


@pytest.mark.parametrize("mode", MODES)
def test_every_access_mode_is_mounted_read_only(driver, mode):
    target = driver.target("pod")
    driver.publish("v", target, mode=mode, model="org/name")
    with fails(errno.EROFS):
        (target / "new").write_bytes(b"x")
    driver.unpublish("v", target)


def test_mount_options_are_taken_where_they_mean_something(driver):
    target = driver.target("pod")
    wanted = {"volume_id": "v", "target_path": str(target), "volume_context": {"model": "org/name"}}
    flags = ("ro", "noexec", "noatime")
    driver.client.NodePublishVolume(**wanted, volume_capability=capability(flags=flags), readonly=True)
    assert "noexec" in find_mount(target).options
    driver.unpublish("v", target)


def test_a_container_that_was_there_before_sees_a_volume_come_and_go(driver):
    """It has the kubelet's directory as a slave, as mountPropagation HostToContainer makes it."""
    target = driver.target("pod")
    pods = driver.kubelet / "pods"
    subprocess.run(["mount", "--bind", pods, pods], check=True)
    subprocess.run(["mount", "--make-shared", pods], check=True)
    container = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "slave", "sh", "-c", "echo; exec sleep 60"], stdout=subprocess.PIPE
    )
    try:
        assert container.stdout.readline()
        seen = Path(f"/proc/{container.pid}/root") / target.relative_to("/")
        driver.publish("v", target, model="org/name")
        assert contents(seen) == FILES
        driver.unpublish("v", target)
        assert not seen.exists()
    finally:
        container.kill()
        container.wait()
        container.stdout.close()
        subprocess.run(["umount", "--lazy", pods], check=True)


def test_prefetching_makes_the_files_local(driver, mount, tmp_path, wait_for):
    push(mount.home, write(tmp_path / "m", {"config.json": b"{}", "a.bin": b"a" * 5_000_000}), "org/warm")
    target = driver.target("pod")
    driver.publish("v", target, model="org/warm", prefetch="true")
    wait_for(lambda: os.getxattr(target / "a.bin", "user.helios.tier") == b"l1", 20, "the file to be local")
    driver.unpublish("v", target)


# --- what is refused -------------------------------------------------------------------------------------------------

GOOD = {"model": "org/name"}


@pytest.mark.parametrize(
    ("change", "status", "saying"),
    [
        ({"volume_id": ""}, "INVALID_ARGUMENT", "volume_id is missing"),
        ({"volume_id": "../../etc"}, "INVALID_ARGUMENT", r"volume_id '\.\./\.\./etc' can't be used"),
        ({"volume_id": ".."}, "INVALID_ARGUMENT", "volume_id"),
        ({"volume_id": "a/b"}, "INVALID_ARGUMENT", "volume_id"),
        ({"volume_id": "a\nb"}, "INVALID_ARGUMENT", "volume_id"),
        ({"volume_id": "x" * 125}, "INVALID_ARGUMENT", "at most 124"),
        ({"target_path": ""}, "INVALID_ARGUMENT", "target_path is missing"),
        ({"target_path": "pods/x"}, "INVALID_ARGUMENT", "not an absolute path"),
        ({"target_path": "/etc/cron.d"}, "INVALID_ARGUMENT", r"not below .*/kubelet .*csi\.kubelet"),
        ({"target_path": "{kubelet}"}, "INVALID_ARGUMENT", "not below"),
        ({"target_path": "{kubelet}/../elsewhere"}, "INVALID_ARGUMENT", r"has a \.\. in it"),
        ({"target_path": "{kubelet}-not/x"}, "INVALID_ARGUMENT", "not below"),
        ({"target_path": "{kubelet}/link/x"}, "INVALID_ARGUMENT", "not below"),
        ({"target_path": "{kubelet}/no/parent"}, "UNAVAILABLE", "can't be made: No such file"),
        ({"volume_capability": None}, "INVALID_ARGUMENT", "volume_capability is missing"),
        ({"volume_capability": BLOCK}, "INVALID_ARGUMENT", "volumeMode Filesystem"),
        ({"volume_capability": messages.VolumeCapability()}, "INVALID_ARGUMENT", "no access_type"),
        ({"volume_capability": capability("UNKNOWN")}, "INVALID_ARGUMENT", "no access_mode"),
        ({"volume_capability": capability(flags=("rw",))}, "INVALID_ARGUMENT", "read-only"),
        ({"volume_capability": capability(flags=("discard",))}, "INVALID_ARGUMENT", "'discard' is unknown here; known"),
        ({"volume_context": {}}, "INVALID_ARGUMENT", "it says neither"),
        ({"volume_context": GOOD | {"repo": "models/org/name"}}, "INVALID_ARGUMENT", "it says both"),
        ({"volume_context": GOOD | {"revison": "v1"}}, "INVALID_ARGUMENT", "did you mean 'revision'"),
        ({"volume_context": GOOD | {"format": "tar"}}, "INVALID_ARGUMENT", "known: files, hub"),
        ({"volume_context": GOOD | {"commit": "v1"}}, "INVALID_ARGUMENT", "commit 'v1' is none"),
        ({"volume_context": GOOD | {"revision": "0" * 40, "commit": "1" * 40}}, "INVALID_ARGUMENT", "two commits"),
        ({"volume_context": {"model": "../../etc"}}, "INVALID_ARGUMENT", "etc"),
        ({"volume_context": GOOD | {"revision": "../x"}}, "INVALID_ARGUMENT", "x"),
        ({"volume_context": {"model": "org/unknown"}}, "NOT_FOUND", "org/unknown"),
        ({"volume_context": GOOD | {"revision": "v9"}}, "NOT_FOUND", "v9"),
    ],
)
def test_what_can_not_be_published_is_refused_and_leaves_nothing(driver, change, status, saying):
    if not (driver.kubelet / "link").is_symlink():
        (driver.kubelet / "link").symlink_to("/etc")
    target = driver.target("refused")
    fields = {
        "volume_id": "v",
        "target_path": str(target),
        "volume_capability": capability(),
        "volume_context": GOOD,
    } | change
    fields["target_path"] = fields["target_path"].replace("{kubelet}", str(driver.kubelet))
    before = sorted(driver.kubelet.rglob("*"))
    with refused(status, saying):
        driver.client.NodePublishVolume(**fields)
    assert sorted(driver.kubelet.rglob("*")) == before
    assert driver.mounts() == []


def test_what_is_at_the_target_already_is_not_hidden(driver):
    target = driver.target("pod")
    target.mkdir()
    (target / "precious").write_bytes(b"x")
    with refused("FAILED_PRECONDITION", "is not empty"):
        driver.publish("v", target, model="org/name")
    with refused("FAILED_PRECONDITION", "can't be removed: Directory not empty"):
        driver.unpublish("v", target)
    (target / "precious").unlink()
    target.rmdir()
    target.write_bytes(b"a file")
    with refused("FAILED_PRECONDITION", "no directory"):
        driver.publish("v", target, model="org/name")
    target.unlink()
    target.symlink_to("/etc")
    with refused("FAILED_PRECONDITION", "no directory"):
        driver.publish("v", target, model="org/name")
    target.unlink()


def test_a_mount_of_somebody_else_is_left_alone(driver):
    target = driver.target("pod")
    target.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", target], check=True)
    try:
        with refused("FAILED_PRECONDITION", "mount point of tmpfs"):
            driver.publish("v", target, model="org/name")
        with refused("FAILED_PRECONDITION", "mount point of tmpfs"):
            driver.unpublish("v", target)
    finally:
        subprocess.run(["umount", target], check=True)
        target.rmdir()


def test_another_volume_at_the_target_is_neither_replaced_nor_unmounted(driver):
    target = driver.target("pod")
    driver.publish("v", target, model="org/name")
    with refused("ALREADY_EXISTS", "shows v as files, not w as files"):
        driver.publish("w", target, model="org/name")
    with refused("ALREADY_EXISTS", "shows v as files, not v as hub"):
        driver.publish("v", target, model="org/name", format="hub")
    with refused("NOT_FOUND", "shows v as files, not w"):
        driver.unpublish("w", target)
    assert contents(target) == FILES
    driver.unpublish("v", target)


def test_a_volume_in_use_is_not_given_another_content(driver):
    first, second = driver.target("first"), driver.target("second")
    driver.publish("v", first, model="org/name")
    with refused("ALREADY_EXISTS", "the volume csi.v is models/org/name@main"):
        driver.publish("v", second, model="org/name", revision="v1")
    assert not second.exists()
    driver.unpublish("v", first)


# --- statistics ------------------------------------------------------------------------------------------------------


def stats(driver, volume, path):
    answer = driver.client.NodeGetVolumeStats(volume_id=volume, volume_path=str(path))
    unit = messages.VolumeUsage.Unit
    return {unit.Name(u.unit): (u.total, u.used, u.available) for u in answer.usage}, answer.volume_condition


def test_a_volume_tells_its_bytes_and_inodes(driver):
    target = driver.target("pod")
    driver.publish("v", target, model="org/name")
    usage, condition = stats(driver, "v", target)
    size = sum(len(data) for data in FILES.values())
    assert usage == {"BYTES": (size, size, 0), "INODES": (5, 5, 0)}
    assert (condition.abnormal, condition.message) == (False, "the volume can be read")
    with refused("NOT_FOUND", "not published at"):
        stats(driver, "v", target.parent)
    with refused("NOT_FOUND", "not published at"):
        stats(driver, "w", target)
    driver.unpublish("v", target)


# --- at the same time, interrupted, killed ---------------------------------------------------------------------------


def test_calls_for_one_target_at_once_are_done_or_told_to_come_again(driver):
    target = driver.target("pod")
    for _ in range(5):
        found = all_at_once(*[lambda: driver.publish("v", target, model="org/name")] * 12)
        codes = {error.code() for error in found if isinstance(error, grpc.RpcError)}
        assert None in found
        assert codes <= {grpc.StatusCode.ABORTED}
        assert driver.mounts() == [str(target)]
        found = all_at_once(*[lambda: driver.unpublish("v", target)] * 12)
        assert None in found
        assert {error.code() for error in found if isinstance(error, grpc.RpcError)} <= {grpc.StatusCode.ABORTED}
        assert driver.mounts() == []


def test_many_pods_at_once_get_their_volumes(driver):
    targets = [driver.target(f"pod-{number}") for number in range(50)]
    calls = [lambda n=n, t=t: driver.publish(f"v{n % 5}", t, model="org/name") for n, t in enumerate(targets)]
    assert all_at_once(*calls) == [None] * 50
    assert all(contents(target) == FILES for target in targets)
    calls = [lambda n=n, t=t: driver.unpublish(f"v{n % 5}", t) for n, t in enumerate(targets)]
    assert all_at_once(*calls) == [None] * 50
    assert not any(target.exists() for target in targets)


def test_a_caller_who_gives_up_leaves_a_volume_that_can_be_published_and_unpublished(driver, wait_for):
    target = driver.target("pod")
    for number in range(20):
        with contextlib.suppress(grpc.RpcError):
            driver.publish("v", target, model="org/name", timeout=0.001 * number)

    def again():
        (found,) = all_at_once(lambda: driver.publish("v", target, model="org/name"))
        assert found is None or found.code() == grpc.StatusCode.ABORTED
        return found is None

    wait_for(again, what="the volume to be published")
    assert driver.mounts() == [str(target)]
    driver.unpublish("v", target)


def test_a_driver_that_is_killed_at_any_moment_leaves_nothing_that_its_successor_does_not_clear(driver, mount):
    targets = [driver.target(f"pod-{number}") for number in range(4)]
    for moment in range(6):
        calls = [lambda n=n, t=t: driver.publish(f"v{n}", t, model="org/name") for n, t in enumerate(targets)]

        def end(moment=moment):
            time.sleep(0.004 * moment)
            os.kill(driver.process.pid, signal.SIGKILL)

        all_at_once(*calls, end)
        driver.process.wait(10)
        driver.restart()
        for entry in mount_table():
            if entry.mountpoint in targets:
                assert "ro" in entry.options
        for number, target in enumerate(targets):
            driver.publish(f"v{number}", target, model="org/name")
            assert contents(target) == FILES
        assert sorted(driver.mounts()) == sorted(map(str, targets))
        for number, target in enumerate(targets):
            driver.unpublish(f"v{number}", target)


def test_a_volume_stays_readable_while_the_driver_is_away(driver):
    target = driver.target("pod")
    driver.publish("v", target, model="org/name")
    driver.kill()
    assert contents(target) == FILES
    driver.start()
    driver.publish("v", target, model="org/name")
    assert driver.mounts() == [str(target)]
    driver.unpublish("v", target)


def test_a_second_driver_at_the_socket_is_refused(driver):
    done = run(driver.home, "csi", "--endpoint", f"unix://{driver.socket}", "--node-id", "n", code=1)
    assert "a driver serves at" in done.stderr
    assert driver.client.NodeGetInfo().node_id == "node-1"


# --- the mount goes --------------------------------------------------------------------------------------------------


@pytest.fixture
def own(helios_home, tmp_path):
    """A home with a model, for a test that breaks its mount."""
    push(helios_home, write(tmp_path / "m", FILES), "org/name")
    return helios_home


def test_a_published_volume_survives_the_mounts_worker(own, tmp_path, wait_for):
    with mounted(own, tmp_path / "mnt") as mount, running_driver(own, tmp_path) as driver:
        if mount.state["mode"] != "native":
            pytest.skip("a portable mount has no worker that could be replaced")
        target = driver.target("pod")
        driver.publish("v", target, model="org/name")
        last = worker(mount)
        with open(target / "weights.bin", "rb") as file:
            assert file.read(100) == b"w" * 100
            last.send(signal.SIGKILL)
            assert file.read() == b"w" * 2_999_900
        next_worker(mount, last)
        assert contents(target) == FILES
        driver.publish("v", target, model="org/name")
        driver.unpublish("v", target)


def test_a_dead_mount_is_unpublished_at_once_and_replaced_by_a_new_one(own, tmp_path):
    with running_driver(own, tmp_path) as driver:
        target, other = driver.target("pod"), driver.target("other")
        with refused("UNAVAILABLE", "has no mount: nothing can be published on this node"):
            driver.publish("v", target, model="org/name", timeout=2)
        mnt = tmp_path / "mnt"
        first = Mount(own, mnt, json.loads(run(own, "mount", mnt, "--json").stdout))
        driver.publish("v", target, model="org/name")
        driver.publish("v", other, model="org/name")
        kill(first.state)
        with fails(errno.ENOTCONN, errno.ECONNABORTED):
            (target / "weights.bin").read_bytes()
        _, condition = stats(driver, "v", target)
        assert condition.abnormal
        begin = time.monotonic()
        driver.unpublish("v", other)
        assert time.monotonic() - begin < 8
        assert not other.exists()
        with mounted(own, mnt) as second:
            _, condition = stats(driver, "v", target)
            assert condition.abnormal
            assert "mounted anew" in condition.message
            driver.publish("v", target, model="org/name")
            assert contents(target) == FILES
            assert driver.mounts() == [str(target)]
            driver.unpublish("v", target)
            assert volumes(second) == []


def test_a_volumes_files_have_the_class_that_it_asks_for(driver, mount):
    target, other = driver.target("pod"), driver.target("other")
    with refused("INVALID_ARGUMENT", "known: scratch, normal, critical, pinned"):
        driver.publish("v", target, model="org/name", priority="high")
    driver.publish("v", target, model="org/name", priority="scratch")
    driver.publish("v", target, model="org/name", priority="scratch")
    assert call(mount, "GET", "volumes/csi.v")["priority"] == "scratch"
    with refused("ALREADY_EXISTS", "has the class scratch, not pinned"):
        driver.publish("v", other, model="org/name", priority="pinned")
    driver.unpublish("v", target)
    driver.publish("v", target, model="org/name", priority="pinned")
    assert call(mount, "GET", "volumes/csi.v")["priority"] == "pinned"
    driver.unpublish("v", target)


def test_a_mount_that_hangs_holds_nobody_for_longer_than_the_deadline(own, tmp_path):
    with mounted(own, tmp_path / "mnt") as mount, running_driver(own, tmp_path, HELIOS_CSI__DEADLINE_S="3") as driver:
        target, other = driver.target("pod"), driver.target("other")
        driver.publish("v", target, model="org/name")
        stopped = [int(mount.state["pid"])] + ([worker(mount).pid] if mount.state["worker"] else [])
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        try:
            begin = time.monotonic()
            with pytest.raises(grpc.RpcError) as error:
                driver.publish("w", other, model="org/name")
            assert error.value.code().name in ("DEADLINE_EXCEEDED", "UNAVAILABLE")
            driver.unpublish("v", target)
            assert time.monotonic() - begin < 30
            assert driver.mounts() == []
            assert not target.exists()
            assert not other.exists()
            assert driver.client.Probe().ready.value
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)


def test_resolved_models_are_published_while_the_registry_is_away(helios, tmp_path, helios_home):
    with running_registry(helios) as registry:
        env = {"HELIOS_REGISTRY__URLS": registry.url}
        run(helios_home, "push", write(tmp_path / "m", FILES), "org/name", **env)
        with mounted(helios_home, tmp_path / "mnt", **env), running_driver(helios_home, tmp_path) as driver:
            target = driver.target("pod")
            driver.publish("v", target, model="org/name", prefetch="true")
            assert contents(target) == FILES
            registry.kill()
            driver.publish("w", driver.target("later"), model="org/name")
            assert contents(driver.target("later")) == FILES
            with refused("UNAVAILABLE", "."):
                driver.publish("x", driver.target("new"), model="org/other", timeout=20)
            assert not driver.target("new").exists()
            driver.unpublish("v", target)
            driver.unpublish("w", driver.target("later"))
