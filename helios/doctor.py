"""Checks of this machine: what is fine, what is not, and what to do about it.

Each check takes what it looks at, so that a test can show it any machine; ``examine`` feeds them this one.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from helios import native
from helios.config import Config, without_credentials
from helios.errors import HeliosError, UsageError
from helios.home import Home
from helios.mounts import MountEntry, mount_of

Status = Literal["ok", "warn", "fail"]
GIB = 1 << 30
PROBE_TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report; ``fix`` says what to do and is empty when nothing is wrong."""

    name: str
    status: Status
    detail: str
    fix: str = ""

    def json(self) -> dict[str, Any]:
        return asdict(self)


def check_kernel(release: str) -> Check:
    if native.kernel_version(release) < (5, 4):
        return Check("kernel", "warn", release, "Helios is tried with Linux 5.4 and newer; upgrade the kernel.")
    return Check("kernel", "ok", release)


def check_fuse_device(path: Path) -> Check:
    try:
        os.close(os.open(path, os.O_RDWR))
    except FileNotFoundError:
        fix = "Load the module (modprobe fuse); in a container give it the device (docker run --device /dev/fuse)."
        return Check("/dev/fuse", "fail", f"{path} does not exist, so nothing can be mounted", fix)
    except OSError as error:
        fix = f"Allow this user to open {path} (it is usually mode 0666), or run as root."
        return Check("/dev/fuse", "fail", f"{path} can't be opened: {error.strerror}", fix)
    return Check("/dev/fuse", "ok", f"{path} can be opened")


def check_mounting(privileged: bool, fusermount: str | None, fuse_conf: str, allow_other: bool, mtab: bool) -> Check:
    """Who may mount: with CAP_SYS_ADMIN directly, else through the setuid fusermount3."""
    if privileged:
        return Check("mounting", "ok", "CAP_SYS_ADMIN: mounts directly, other users may read the mount")
    if fusermount is None:
        fix = "Install it: apt-get install fuse3. Or run as root."
        return Check("mounting", "fail", "no CAP_SYS_ADMIN, and fusermount3 is not installed", fix)
    if not mtab:
        fix = "As root: ln -s /proc/self/mounts /etc/mtab"
        return Check("mounting", "fail", f"{fusermount} can't unmount without /etc/mtab", fix)
    allowed = any(line.strip() == "user_allow_other" for line in fuse_conf.splitlines())
    if allow_other and not allowed:
        fix = "For that, root adds the line user_allow_other to /etc/fuse.conf. Or set HELIOS_MOUNT__ALLOW_OTHER=false."
        return Check("mounting", "warn", f"through {fusermount}; other users can't read the mount", fix)
    return Check("mounting", "ok", f"through {fusermount}" + ("; other users may read the mount" if allowed else ""))


def check_native(release: str, kernel_config: str | None, privileged: bool, mode: str) -> Check:
    """Which mode mounts have. Portable is no fault: the same files, only slower, and gone when the daemon dies."""
    reasons = native.obstacles(release, kernel_config, privileged)
    if mode == "portable":
        return Check("mount mode", "ok", "portable, as mount.mode says")
    if not reasons:
        return Check("mount mode", "ok", "native: the kernel reads whole files itself")
    if mode == "native":
        return Check("mount mode", "fail", f"not native: {'; '.join(reasons)}", "Or set mount.mode to auto.")
    return Check("mount mode", "ok", f"portable: {'; '.join(reasons)}")


def check_passthrough(directory: Path, entry: MountEntry | None) -> Check:
    """Whether the kernel reads whole files of a cache directory itself, by the mount that it lies in."""
    if entry is None:
        return Check("passthrough", "warn", f"it is not known where {directory} is mounted", "Look with findmnt -T.")
    if entry.fstype in native.STACKED:
        detail = (
            f"not for {directory}: {entry.fstype} (mounted at {entry.mountpoint}) lies on top of another filesystem"
        )
        fix = (
            "Reads of it go through the mount's process, at several times the CPU time. Put mount.cache and mount.l2 on"
            " ext4, xfs or tmpfs: in a container on a volume."
        )
        return Check("passthrough", "warn", detail, fix)
    return Check("passthrough", "ok", f"{directory} is on {entry.fstype}")


def check_space(name: str, directory: Path) -> Check:
    """Free space for a directory that may not exist yet."""
    there = directory
    while not there.exists() and there != there.parent:
        there = there.parent
    if not os.access(there, os.W_OK | os.X_OK):
        return Check(name, "fail", f"{there} is not writable", "Set HELIOS_HOME to a directory of yours.")
    free = shutil.disk_usage(there).free
    detail = f"{free / GIB:.1f} GiB free at {directory}"
    if free < GIB:
        return Check(name, "fail", detail, "Free some space, or put it on a larger disk (HELIOS_HOME).")
    if free < 20 * GIB:
        return Check(name, "warn", detail, "Enough for small models only: HELIOS_HOME chooses another disk.")
    return Check(name, "ok", detail)


def check_memory(meminfo: str) -> Check:
    match = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE)
    if not match:
        return Check("memory", "warn", "/proc/meminfo does not say what is available", "Check it with free -h.")
    available = int(match[1]) * 1024
    detail = f"{available / GIB:.1f} GiB available"
    if available < 4 * GIB:
        return Check("memory", "warn", detail, "vLLM with the tiny model takes about 2 GiB; end other programs.")
    return Check("memory", "ok", detail)


def check_vllm(version: str | None, gpus: list[str]) -> Check:
    if version is None:
        fix = "In a checkout run make setup; elsewhere pip install vllm. Only serve and quickstart need it."
        return Check("vLLM", "warn", "not installed in this environment", fix)
    if "cpu" in version and gpus:
        fix = "Install vLLM's GPU build: make clean setup."
        return Check("vLLM", "warn", f"{version}: the CPU build, but there is a GPU", fix)
    return Check("vLLM", "ok", f"{version} ({'CPU' if 'cpu' in version else 'GPU'} build)")


def check_gpu(gpus: list[str]) -> Check:
    return Check("GPU", "ok", "; ".join(gpus) if gpus else "none: vLLM's CPU build serves")


def check_port(host: str, port: int) -> Check:
    """Whether the router's port is free."""
    if port == 0:
        return Check("router port", "ok", "any free one")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            fix = "If that is not Helios' router, choose another port: --port or HELIOS_ROUTER__PORT."
            return Check("router port", "warn", f"{host}:{port} is in use: {error.strerror}", fix)
    return Check("router port", "ok", f"{host}:{port} is free")


def check_server(name: str, url: str, path: str, *, needed: bool, fix: str) -> Check:
    """Whether an HTTP server answers below 500 in time."""
    from helios.http.client import HttpClient

    client = HttpClient(url, timeout_s=PROBE_TIMEOUT_S)
    try:
        with client.request("GET", path) as response:
            response.read()
        status = response.status
    except (HeliosError, OSError) as error:
        return Check(name, "fail" if needed else "warn", str(error), fix)
    finally:
        client.close()
    if status >= 500:
        return Check(name, "fail" if needed else "warn", f"{url}{path} answers {status}", fix)
    return Check(name, "ok", f"{url} answers")


def list_gpus() -> list[str]:
    """Names of NVIDIA GPUs; empty without a driver."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (subprocess.SubprocessError, OSError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def examine(config: Config, home: Home, environ: Mapping[str, str]) -> Iterator[Check]:
    """Every check of this machine, in the order they are shown."""
    release = platform.release()
    privileged = native.privileged()
    gpus = list_gpus()
    cache = Path(config.mount.cache) if config.mount.cache else home.cache
    store = config.registry.store_directory(home.store)
    yield Check("Helios", "ok", f"{_version('helios-llm')} on Python {platform.python_version()} ({sys.executable})")
    yield check_kernel(release)
    yield check_fuse_device(Path("/dev/fuse"))
    fuse_conf, allow_other = _read("/etc/fuse.conf"), config.mount.allow_other
    mtab = Path("/etc/mtab").exists()
    yield check_mounting(privileged, shutil.which("fusermount3"), fuse_conf, allow_other, mtab)
    kernel_config, may_mount = native.read_kernel_config(release), native.may_mount()
    yield check_native(release, kernel_config, may_mount, config.mount.mode)
    if config.mount.mode != "portable" and not native.obstacles(release, kernel_config, may_mount):
        for directory in (cache, *([Path(config.mount.l2)] if config.mount.l2 else [])):
            yield check_passthrough(directory, mount_of(Path(os.path.realpath(directory))))
    yield check_memory(_read("/proc/meminfo"))
    yield check_space("local tier", cache)
    if config.mount.l2:
        yield check_space("second tier", Path(config.mount.l2))
    yield check_vllm(_version("vllm"), gpus)
    yield check_gpu(gpus)
    yield check_port(config.router.host, config.router.port)
    if config.registry.urls:
        fix = "Start it, or correct registry.urls (HELIOS_REGISTRY__URLS)."
        for url in config.registry.urls:
            yield check_server("registry", url, "/readyz", needed=True, fix=fix)
    else:
        yield Check("registry", "ok", "embedded: it starts when a command needs it")
        yield check_space("object store", store or home.registry / "staging")
    yield check_upstream(config, environ)


def check_upstream(config: Config, environ: Mapping[str, str]) -> Check:
    """The Hub that `pull` takes models from. Everything but `pull` works without it."""
    if environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return Check("upstream Hub", "ok", "not used: HF_HUB_OFFLINE is set")
    try:
        url = config.registry.upstream or without_credentials(environ.get("HF_ENDPOINT", ""), "HF_ENDPOINT")
    except UsageError as error:
        return Check("upstream Hub", "fail", error.message, error.hint or "")
    url = url or "https://huggingface.co"
    fix = (
        "Only `helios pull` needs it. HF_ENDPOINT chooses another Hub, HTTPS_PROXY a proxy; HF_HUB_OFFLINE=1 says none."
    )
    return check_server("upstream Hub", url, "/api/models/gpt2", needed=False, fix=fix)
