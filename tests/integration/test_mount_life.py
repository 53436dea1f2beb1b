"""A mount comes and goes: the command line, signals, killed daemons, several mounts, bad mount points."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from helios.embedded import running
from helios.home import Home
from helios.http.client import HttpClient
from helios.lockfile import LockFile, held
from helios.mounts import find_mount, state_of, state_path, states
from helios.process import ProcessId
from helios.unmounting import stop
from heliosfs.fuse.mounting import may_allow_other, set_background
from heliosfs.fuse.protocol import MAX_BACKGROUND
from tests.support.mounts import MODES, fails, kill, mounted, push, write

pytestmark = pytest.mark.fuse

DATA = os.urandom(300_000)


@pytest.fixture(params=MODES, autouse=True)
def mode(helios, request):
    helios.environ["HELIOS_MOUNT__MODE"] = request.param
    return request.param


@pytest.fixture
def published(helios_home, tmp_path):
    return push(helios_home, write(tmp_path / "model", {"weights.bin": DATA, "config.json": b"{}"}), "org/name")


@pytest.fixture
def alone(helios):
    """For what has nothing to do with content: mounts without a registry start faster."""
    helios.environ["HELIOS_REGISTRY__URLS"] = "http://127.0.0.1:1"


@pytest.fixture
def mnt(tmp_path):
    return tmp_path / "mnt"


def mount(helios, mnt, *args, **kwargs):
    return json.loads(helios("mount", mnt, "--json", *args, **kwargs).out)


def gone(state):
    return ProcessId.of(state["pid"]) is None or not ProcessId(state["pid"], state["start"]).alive()


def test_mount_prints_the_mount_point_and_umount_leaves_nothing(helios, helios_home, published, mnt):
    assert helios("mount", mnt).out == f"{mnt}\n"
    state = state_of(helios_home, mnt)
    assert (mnt / "org/name/@main/weights.bin").read_bytes() == DATA
    serving = state.worker or state.process
    assert (helios_home.run / "heliosfs-worker.pid").read_text() == f"{serving.pid}\n"
    assert serving.alive()
    assert ProcessId(state.pid, state.start).alive()
    done = helios("umount", mnt)
    assert done.out == done.err == ""
    assert find_mount(mnt) is None
    assert not state.process.alive()
    assert not mnt.exists(), "it was made for the mount"
    assert states(helios_home) == []
    left = {path.name for path in helios_home.run.iterdir()}
    assert not {name for name in left if name.startswith(("heliosfs", "mount-"))}


def test_a_directory_that_was_there_stays(helios, alone, mnt):
    mnt.mkdir()
    mount(helios, mnt)
    helios("umount", mnt)
    assert mnt.is_dir()


def test_json_says_where_everything_is(helios, helios_home, alone, mnt, mode):
    state = mount(helios, mnt)
    assert state["mountpoint"] == str(mnt)
    assert state["mode"] == mode
    assert state["reason"]
    assert state["cache"] == str(helios_home.cache)
    assert Path(state["log"]).exists()
    assert Path(state["socket"]).is_socket()
    assert json.loads(helios("umount", mnt, "--json").out) == {"unmounted": str(mnt)}


def test_the_embedded_registry_lives_as_long_as_the_mount(helios, helios_home, published, mnt, wait_for):
    mount(helios, mnt)
    time.sleep(0.2)
    assert running(helios_home) is not None
    helios("umount", mnt)
    wait_for(lambda: running(helios_home) is None, what="the registry to end")


def test_a_relative_path_and_a_link_name_the_same_mount(helios, alone, mnt, tmp_path):
    (tmp_path / "link").symlink_to("mnt")
    helios("mount", "mnt", cwd=tmp_path)
    assert "mounted already" in helios("mount", tmp_path / "link", code=1).err
    helios("umount", tmp_path / "link")
    assert find_mount(mnt) is None


def test_odd_characters_in_the_mount_point(helios, alone, tmp_path):
    odd = tmp_path / "a b\tc\\d, 'é'"
    mount(helios, odd)
    assert os.listdir(odd / ".volumes") == []
    helios("umount", odd)
    assert find_mount(odd) is None


# --- foreground and signals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sig", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_foreground_stays_until_a_signal_and_unmounts(helios, alone, mnt, sig, code):
    process = helios.start("mount", "--foreground", mnt)
    assert process.stdout.readline() == f"{mnt}\n"
    assert os.listdir(mnt / ".volumes") == []
    process.send_signal(sig)
    assert process.wait(15) == code
    assert find_mount(mnt) is None
    assert not mnt.exists()


def test_an_unmount_from_outside_ends_the_daemon(helios, helios_home, alone, mnt, wait_for):
    state = mount(helios, mnt)
    subprocess.run(["umount", mnt], check=True)
    wait_for(lambda: gone(state), what="the daemon to end")
    assert states(helios_home) == []


def test_umount_with_an_open_reader_ends_and_the_reader_gets_an_error(helios, published, mnt):
    state = mount(helios, mnt)
    fd = os.open(mnt / "org/name/@main/weights.bin", os.O_RDONLY)
    try:
        assert os.read(fd, 10) == DATA[:10]
        helios("umount", mnt)
        assert gone(state)
        assert find_mount(mnt) is None
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        with fails(errno.ENOTCONN, errno.ECONNABORTED, errno.EIO):
            os.pread(fd, 4096, 200_000)
    finally:
        os.close(fd)


def test_a_working_directory_does_not_keep_the_mount(helios, alone, mnt):
    state = mount(helios, mnt)
    os.chdir(mnt / ".volumes")
    try:
        helios("umount", mnt)
    finally:
        os.chdir("/")
    assert gone(state)


# --- killed daemons --------------------------------------------------------------------------------------------------


def test_open_files_fail_when_the_daemon_is_killed(helios, published, mnt):
    state = mount(helios, mnt)
    fd = os.open(mnt / "org/name/@main/weights.bin", os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        assert os.pread(fd, 10, 0) == DATA[:10]
        kill(state)
        with fails(errno.ENOTCONN, errno.ECONNABORTED, errno.EIO):
            os.pread(fd, 4096, 200_000)
    finally:
        with contextlib.suppress(OSError):  # the kernel asks the dead daemon what it thinks of the close
            os.close(fd)
    helios("umount", mnt)


def test_mount_repairs_what_a_killed_daemon_left(helios, published, mnt):
    kill(mount(helios, mnt))
    with fails(errno.ENOTCONN, errno.ECONNABORTED):
        os.listdir(mnt)
    again = helios("mount", mnt)
    assert again.out == f"{mnt}\n"
    assert "lost its process" in again.err
    assert (mnt / "org/name/@main/weights.bin").read_bytes() == DATA
    helios("umount", mnt)
    assert not mnt.exists()


def test_a_killed_daemon_whose_lock_lasts_a_moment_is_replaced(helios, helios_home, alone, mnt, wait_for):
    kill(mount(helios, mnt))
    wait_for(lambda: not held(state_path(helios_home, mnt)), what="the lock of the dead daemon")
    lock = LockFile.acquire(state_path(helios_home, mnt))  # held again, as the kernel does for a moment
    free = threading.Timer(1.0, os.close, [lock._fd])
    free.start()
    try:
        mount(helios, mnt)
        assert (mnt / ".hub").is_dir()
    finally:
        free.join()
    helios("umount", mnt)


def test_umount_cleans_up_after_a_killed_daemon(helios, helios_home, alone, mnt):
    kill(mount(helios, mnt))
    helios("umount", mnt)
    assert find_mount(mnt) is None
    assert states(helios_home) == []
    assert not mnt.exists()


def test_a_dead_mount_whose_home_is_gone_is_repaired(helios, helios_home, alone, mnt):
    kill(mount(helios, mnt))
    for path in (helios_home.run / "mounts").iterdir():
        path.unlink()
    assert "lost its process" in helios("mount", mnt).err
    helios("umount", mnt)


def test_umount_of_a_stopped_daemon_does_not_hang(helios, alone, mnt):
    state = mount(helios, mnt)
    os.kill(state["pid"], signal.SIGSTOP)
    begin = time.monotonic()
    stop(Home(Path(helios.environ["HELIOS_HOME"])), mnt, timeout_s=1)
    assert time.monotonic() - begin < 10
    assert find_mount(mnt) is None
    assert gone(state)


def test_a_killed_daemon_between_pushes_keeps_what_was_cached(helios, published, mnt):
    state = mount(helios, mnt)
    assert (mnt / "org/name/@main/weights.bin").read_bytes() == DATA
    kill(state)
    mount(helios, mnt)
    assert (mnt / "org/name/@main/weights.bin").read_bytes() == DATA
    helios("umount", mnt)


@pytest.mark.parametrize("option", ["--allow-other", "--no-allow-other"])
def test_others_may_read_where_it_is_wished(helios, alone, mnt, option):
    mount(helios, mnt, option)
    (line,) = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f" {mnt} " in line]
    assert ("allow_other" in line.split(",")) is (option == "--allow-other" and may_allow_other())
    helios("umount", mnt)


def test_an_upgrade_of_what_has_no_keeper_is_refused(helios, alone, mnt, mode):
    assert "nothing of" in helios("mount", "--upgrade", mnt, code=1).err
    state = mount(helios, mnt)
    again = helios("mount", "--upgrade", mnt, "--json", code=1 if mode == "portable" else 0)
    if mode == "portable":
        assert "is portable" in again.err
    else:
        assert json.loads(again.out)["worker"] != state["worker"]
    helios("umount", mnt)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_mounted_place_is_refused_by_name(helios, alone, mnt):
    state = mount(helios, mnt)
    assert f"process {state['pid']}" in helios("mount", mnt, code=1).err
    error = json.loads(helios("mount", mnt, "--json", code=1).err)["error"]
    assert error["code"] == "Conflict"
    helios("umount", mnt)


def test_a_directory_with_something_in_it_is_refused(helios, alone, mnt):
    write(mnt, {"precious": b"x"})
    assert "not empty" in helios("mount", mnt, code=1).err
    assert (mnt / "precious").read_bytes() == b"x"


def test_a_file_a_missing_parent_and_another_mount_are_refused(helios, alone, mnt, tmp_path):
    mnt.write_text("a file")
    assert "not a directory" in helios("mount", mnt, code=1).err
    assert "can't be made" in helios("mount", tmp_path / "no/such/parent", code=1).err
    assert "mount point already (proc)" in helios("mount", "/proc", code=1).err


def test_umount_of_what_is_not_ours_says_so(helios, helios_home, mnt, tmp_path):
    assert "nothing is mounted" in helios("umount", mnt, code=1).err
    assert "no mount of" in helios("umount", "/proc", code=1).err
    assert find_mount(Path("/proc")) is not None


def test_a_mount_of_another_home_is_left_alone(helios, alone, mnt, tmp_path):
    mount(helios, mnt)
    other = {"HELIOS_HOME": str(tmp_path / "other")}
    assert "not one of" in helios("mount", mnt, code=1, env=other).err
    assert "no mount of" in helios("umount", mnt, code=1, env=other).err
    assert find_mount(mnt) is not None
    helios("umount", mnt)


def test_a_cache_in_use_is_refused_and_another_one_works(helios, helios_home, published, mnt, tmp_path):
    first = mount(helios, mnt)
    second = tmp_path / "second"
    refused = helios("mount", second, code=1).err
    serving = first["worker"] or first
    assert str(serving["pid"]) in refused
    assert "cache" in refused
    assert not second.exists()
    state = mount(helios, second, "--cache", tmp_path / "cache2")
    assert state["cache"] == str(tmp_path / "cache2")
    assert (second / "org/name/@main/weights.bin").read_bytes() == DATA
    assert [s.mountpoint for s, alive in states(helios_home) if alive] == [str(mnt), str(second)]
    helios("umount", second)
    assert (mnt / "org/name/@main/weights.bin").read_bytes() == DATA
    helios("umount", mnt)


def test_a_daemon_that_fails_says_why_and_leaves_nothing(helios, alone, helios_home, mnt, tmp_path):
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the cache should be")
    failed = helios("mount", mnt, "--cache", blocked / "cache", code=1)
    assert "cache" in failed.err
    assert not mnt.exists()
    assert states(helios_home) == []


def test_a_daemon_that_dies_at_start_shows_its_last_lines(helios, alone, mnt, tmp_path):
    write(tmp_path / "broken", {"trio.py": b"raise SystemError('no trio today')"})
    failed = helios("mount", mnt, code=1, env={"PYTHONPATH": str(tmp_path / "broken")})
    assert "no trio today" in failed.err
    assert "exit status 1" in failed.err
    assert not mnt.exists()


def test_a_home_that_cannot_be_written_is_said(helios, mnt):
    failed = helios("mount", mnt, code=1, env={"HELIOS_HOME": "/proc/nowhere"})
    assert "/proc/nowhere" in failed.err
    assert "Traceback" not in failed.err
    assert not mnt.exists()


def test_giving_up_while_the_daemon_starts_leaves_nothing(helios, helios_home, mnt, tmp_path, wait_for):
    write(tmp_path / "slow", {"trio.py": b"import time; time.sleep(60)"})
    starter = helios.start("mount", mnt, env={"PYTHONPATH": str(tmp_path / "slow")})
    wait_for(lambda: list(helios_home.logs.glob("mount-*")), what="the daemon to be started")
    time.sleep(0.3)
    starter.send_signal(signal.SIGINT)
    assert starter.wait(20) == 130
    assert not mnt.exists()
    assert states(helios_home) == []


def test_wrong_usage_is_exit_2(helios, alone, mnt):
    helios("mount", code=2)
    helios("mount", mnt, "--nope", code=2)
    helios("mount", mnt, code=2, env={"HELIOS_MOUNT__LISTEN": "nonsense"})
    assert not mnt.exists()


def test_two_starters_at_once_mount_once(helios, helios_home, alone, mnt):
    results = []
    threads = [threading.Thread(target=lambda: results.append(helios("mount", mnt, code=None))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(result.code for result in results) == [0, 1, 1, 1]
    assert os.listdir(mnt / ".volumes") == []
    helios("umount", mnt)
    assert find_mount(mnt) is None


def test_metrics_over_tcp_where_asked_for(helios, alone, mnt):
    state = mount(helios, mnt, env={"HELIOS_MOUNT__LISTEN": "127.0.0.1:0"})
    client = HttpClient(state["url"], timeout_s=5)
    assert client.bytes("GET", "/readyz") == b"ready\n"
    assert b"helios_mount_inodes" in client.bytes("GET", "/metrics")
    client.close()
    helios("umount", mnt)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may say how far the kernel reads ahead")
def test_the_kernel_reads_ahead_as_it_is_told(helios_home: Home, tmp_path: Path, mode: str) -> None:
    controls = tmp_path / "controls"
    controls.mkdir()
    subprocess.run(["mount", "-t", "fusectl", "none", controls], check=True)
    asked = {"HELIOS_REGISTRY__URLS": "http://127.0.0.1:1", "HELIOS_MOUNT__MODE": mode}
    try:
        for kib, environ in ((1024, {}), (256, {"HELIOS_MOUNT__READAHEAD_KIB": "256"})):
            with mounted(helios_home, tmp_path / "mnt", **asked, **environ) as mount:
                entry = find_mount(mount.path)
                assert entry is not None
                assert Path(f"/sys/class/bdi/{entry.device}/read_ahead_kb").read_text() == f"{kib}\n"
                if mode == "portable":  # where fusectl is mounted in its place that was done already
                    assert set_background(mount.path, controls)
                of_mount = controls / entry.device.partition(":")[2]
                assert (of_mount / "max_background").read_text() == f"{MAX_BACKGROUND}\n"
                assert not set_background(tmp_path / "nothing", controls)
                assert not set_background(mount.path, tmp_path / "nothing"), "fusectl is mounted nowhere"
    finally:
        subprocess.run(["umount", controls], check=True)


READ_AHEAD = """
import sys, trio
from pathlib import Path
from heliosfs.fuse.mounting import set_readahead
place, mountpoint, kib = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
print(trio.run(set_readahead, mountpoint, kib))
try:
    place.write_text("64")
except OSError as error:
    print(error.strerror)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may say how far the kernel reads ahead")
def test_the_read_ahead_is_set_where_sys_is_read_only(helios_home: Home, tmp_path: Path, mode: str) -> None:
    """As in containers: the mount is, or the sysfs of their network namespace is from its first mount on."""
    asked = {"HELIOS_REGISTRY__URLS": "http://127.0.0.1:1", "HELIOS_MOUNT__MODE": mode}
    by_mount = ("unshare", "-m", "sh", "-c", 'mount -o remount,bind,ro /sys && exec "$@"', "sh")
    by_itself = ("unshare", "-mn", "sh", "-c", 'umount -l /sys && mount -t sysfs -o ro sysfs /sys && exec "$@"', "sh")
    rightless = (*by_mount, "setpriv", "--bounding-set", "-sys_admin")
    with mounted(helios_home, tmp_path / "mnt", **asked) as mount:
        entry = find_mount(mount.path)
        assert entry is not None
        place = Path(f"/sys/class/bdi/{entry.device}/read_ahead_kb")
        for kib, inside, works in ((256, by_mount, True), (512, by_itself, True), (128, rightless, False)):
            before = place.read_text()
            command = [*inside, sys.executable, "-c", READ_AHEAD, place, mount.path, str(kib)]
            told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
            assert told == f"{works}\nRead-only file system\n", "to others /sys stays read-only"
            assert place.read_text() == (f"{kib}\n" if works else before)
