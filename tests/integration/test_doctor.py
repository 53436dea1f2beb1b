"""`helios doctor`: any machine can be shown to the checks, and this one is examined."""

import errno
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from helios import doctor, native
from helios.config import Config
from tests.support.disks import overlay, small_disk
from tests.support.mounts import MODES


def test_a_report_for_programs(helios):
    result = helios("doctor", "--json", code=None, env={"HF_HUB_OFFLINE": "1", "HELIOS_ROUTER__PORT": "0"})
    report = result.json()
    names = [check["name"] for check in report["checks"]]
    assert names == [
        "Helios", "kernel", "/dev/fuse", "mounting", "mount mode", *(["passthrough"] if "native" in MODES else []),
        "memory", "local tier", "vLLM", "GPU", "router port", "registry", "object store", "upstream Hub",
    ]  # fmt: skip
    assert report["ok"] == all(check["status"] != "fail" for check in report["checks"])
    assert result.code == (0 if report["ok"] else 1)
    for check in report["checks"]:
        assert check["detail"]
        assert bool(check["fix"]) == (check["status"] != "ok")


def test_a_report_for_people(helios):
    lines = helios("doctor", code=None, env={"HF_HUB_OFFLINE": "1"}).out.splitlines()
    assert lines[0].startswith("ok    Helios")


def test_a_registry_that_can_not_be_reached_fails(helios):
    result = helios("doctor", code=1, env={"HELIOS_REGISTRY__URLS": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"})
    assert "fail  registry" in result.out
    assert "HELIOS_REGISTRY__URLS" in result.out
    assert result.out.splitlines()[-1] == "failed: registry"


@pytest.mark.parametrize(("release", "status"), [("6.18.44-x", "ok"), ("5.3.0", "warn"), ("odd", "warn")])
def test_kernels(release, status):
    assert doctor.check_kernel(release).status == status


def test_no_fuse_device(tmp_path):
    missing = doctor.check_fuse_device(tmp_path / "fuse")
    assert (missing.status, "modprobe fuse" in missing.fix) == ("fail", True)


def test_a_fuse_device_of_others(tmp_path, monkeypatch):
    def refuse(path, flags):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(doctor.os, "open", refuse)
    check = doctor.check_fuse_device(tmp_path / "fuse")
    assert (check.status, "Permission denied" in check.detail) == ("fail", True)


def test_who_may_mount():
    assert doctor.check_mounting(True, None, "", True, False).status == "ok"
    assert "fuse3" in doctor.check_mounting(False, None, "", True, True).fix
    assert (
        "user_allow_other"
        in doctor.check_mounting(False, "/usr/bin/fusermount3", "#user_allow_other\n", True, True).fix
    )
    assert doctor.check_mounting(False, "/usr/bin/fusermount3", "user_allow_other\n", True, True).status == "ok"
    assert doctor.check_mounting(False, "/usr/bin/fusermount3", "", False, True).status == "ok"
    assert "ln -s" in doctor.check_mounting(False, "/usr/bin/fusermount3", "user_allow_other\n", True, False).fix


def test_capabilities_are_read():
    assert native.effective_capabilities("Name:\tx\nCapEff:\t0000000000200000\n") >> native.CAP_SYS_ADMIN & 1
    assert native.effective_capabilities("") == 0


@pytest.mark.parametrize(
    ("release", "config", "privileged", "mode", "expected"),
    [
        ("6.9.0", "CONFIG_FUSE_PASSTHROUGH=y\n", True, "auto", ("ok", "native: ")),
        ("6.9.0", None, True, "auto", ("ok", "native: ")),
        ("6.8.9", "CONFIG_FUSE_PASSTHROUGH=y\n", True, "auto", ("ok", "portable: the kernel is 6.8.9, it needs 6.9")),
        (
            "6.12.0",
            "# not set\n",
            True,
            "auto",
            ("ok", "portable: the kernel is built without CONFIG_FUSE_PASSTHROUGH"),
        ),
        ("6.12.0", "CONFIG_FUSE_PASSTHROUGH=y\n", False, "auto", ("ok", "portable: it needs CAP_SYS_ADMIN")),
        ("6.12.0", "CONFIG_FUSE_PASSTHROUGH=y\n", False, "native", ("fail", "not native: it needs CAP_SYS_ADMIN")),
        ("6.12.0", "CONFIG_FUSE_PASSTHROUGH=y\n", True, "portable", ("ok", "portable, as mount.mode says")),
    ],
)
def test_the_mount_mode_and_why(release, config, privileged, mode, expected):
    check = doctor.check_native(release, config, privileged, mode)
    assert check.status == expected[0]
    assert check.detail.startswith(expected[1])
    assert bool(check.fix) == (check.status != "ok")


@pytest.mark.skipif("native" not in MODES, reason="native mounts need root and Linux 6.9")
def test_a_cache_that_the_kernel_can_not_read_itself(helios, tmp_path):
    """As in a container, whose root is an overlay, with one tier on a volume and the other not."""
    with small_disk(tmp_path / "volume", 8) as volume, overlay(tmp_path / "root", 8) as root:
        environ = {"HELIOS_MOUNT__CACHE": str(volume / "l1"), "HELIOS_MOUNT__L2": str(root / "var" / "l2")}
        report = helios("doctor", "--json", code=None, env={"HF_HUB_OFFLINE": "1", **environ}).json()
    first, second = [check for check in report["checks"] if check["name"] == "passthrough"]
    assert (first["status"], first["detail"]) == ("ok", f"{volume}/l1 is on tmpfs")
    assert second["status"] == "warn"
    assert f"{root}/var/l2: overlay (mounted at {root})" in second["detail"]
    assert "volume" in second["fix"]


def test_space(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 5 * doctor.GIB})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    assert doctor.check_space("store", tmp_path / "not" / "there" / "yet").status == "warn"
    usage.free = doctor.GIB // 2
    assert doctor.check_space("store", tmp_path).status == "fail"
    usage.free = 100 * doctor.GIB
    assert doctor.check_space("store", tmp_path).status == "ok"


def test_memory():
    assert doctor.check_memory("MemAvailable:    1048576 kB\n").status == "warn"
    assert doctor.check_memory("MemAvailable:   16777216 kB\n").status == "ok"
    assert doctor.check_memory("").status == "warn"


def test_vllm_and_gpu():
    assert doctor.check_vllm(None, []).status == "warn"
    assert doctor.check_vllm("0.32.0+cpu", []).status == "ok"
    assert doctor.check_vllm("0.32.0+cpu", ["NVIDIA H100, 80 GiB"]).status == "warn"
    assert doctor.check_vllm("0.32.0", ["NVIDIA H100, 80 GiB"]).status == "ok"
    assert "H100" in doctor.check_gpu(["NVIDIA H100, 80 GiB"]).detail


def test_a_busy_router_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        busy = doctor.check_port("127.0.0.1", taken.getsockname()[1])
    assert (busy.status, "--port" in busy.fix) == ("warn", True)
    assert doctor.check_port("127.0.0.1", 0).status == "ok"


@pytest.mark.parametrize(("status", "expected"), [(200, "ok"), (404, "ok"), (503, "fail")])
def test_a_server_that_answers(status, expected):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert doctor.check_server("registry", url, "/readyz", needed=True, fix="start it").status == expected
        server.shutdown()
        thread.join()


def test_the_upstream_is_only_needed_for_pulls():
    assert doctor.check_upstream(Config(), {"HF_HUB_OFFLINE": "1"}).status == "ok"
    check = doctor.check_upstream(Config(), {"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert (check.status, "helios pull" in check.fix) == ("warn", True)
    check = doctor.check_upstream(Config(), {"HF_ENDPOINT": "http://bob:TellNobody@127.0.0.1:9"})
    assert (check.status, "TellNobody" in str(check)) == ("fail", False)


def test_help_starts_fast_because_commands_are_imported_when_they_run():
    code = "import sys, helios.cli.main; print(*sorted({m.split('.')[0] for m in sys.modules} & set(sys.argv[1:])))"
    heavy = [
        "rich",
        "starlette",
        "uvicorn",
        "trio",
        "openai",
        "torch",
        "numpy",
        "registry",
        "heliosfs",
        "router",
        "sqlalchemy",
    ]
    done = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
