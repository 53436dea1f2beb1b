"""Real containers for tests: a containerd of the test's own, Debian's runc, and images that are made on the spot.

All that a ``Containerd`` has is below its directory and in cgroups of its name; ``close`` leaves nothing of it. A
container is started as the kubelet's runtime starts it: namespaces of its own, binds with the propagation that a
``volumeMount`` names, no new privileges unless it is privileged.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

from helios.mounts import detach, mount_table

PROGRAMS: Final = {"containerd": "containerd", "ctr": "containerd", "runc": "runc", "busybox": "busybox-static"}
"""What is needed, and Debian's package of it."""

CAPABILITIES: Final = (
    "CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "MKNOD", "NET_RAW", "SETGID", "SETUID", "SETFCAP", "SETPCAP",
    "NET_BIND_SERVICE", "SYS_CHROOT", "KILL", "AUDIT_WRITE",
)  # fmt: skip
"""What a container has unless they are dropped."""

PROPAGATION: Final = {"None": "rprivate", "HostToContainer": "rslave", "Bidirectional": "rshared"}
"""Kubernetes' ``mountPropagation`` as a mount's option."""

SNAPSHOTTER = "native"
"""It copies, which is little for a busybox, and works on every filesystem."""

_CONFIG = """\
version = 2
root = "{0}/root"
state = "{0}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs"]
[grpc]
address = "{1}"
"""


@cache
def why_no_containers() -> str | None:
    """Why containers can't run here, or None."""
    if os.geteuid() != 0:
        return "only root runs containers"
    for program, package in PROGRAMS.items():
        if not shutil.which(program):
            return f"{program} is missing (Debian: {package})"
    unshare = ["unshare", "--mount", "--uts", "--ipc", "--net", "--pid", "--fork", "true"]
    if (done := subprocess.run(unshare, capture_output=True, text=True, check=False)).returncode:
        return f"containers can't have namespaces of their own here: {done.stderr.strip()}"
    if not any(each.fstype in ("cgroup", "cgroup2") and "rw" in each.options for each in mount_table()):
        return "no control groups can be made here"
    return None


# --- images ----------------------------------------------------------------------------------------------------------


@dataclass
class Layer:
    """A layer of an image: files, directories and links of root, by path without the leading slash."""

    _data: io.BytesIO = field(default_factory=io.BytesIO)

    def __post_init__(self) -> None:
        self._tar = tarfile.open(fileobj=self._data, mode="w")  # noqa: SIM115

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        entry = tarfile.TarInfo(name)
        entry.size, entry.mode = len(data), mode
        self._tar.addfile(entry, io.BytesIO(data))

    def directory(self, name: str, mode: int = 0o755) -> None:
        entry = tarfile.TarInfo(name)
        entry.type, entry.mode = tarfile.DIRTYPE, mode
        self._tar.addfile(entry)

    def link(self, name: str, target: str) -> None:
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname = tarfile.SYMTYPE, target
        self._tar.addfile(entry)

    def bytes(self) -> bytes:
        self._tar.close()
        return self._data.getvalue()


def busybox() -> bytes:
    """A root file system: Debian's static busybox under all its names, and nothing else."""
    program = shutil.which("busybox")
    assert program is not None
    layer = Layer()
    for name in ("bin", "etc", "proc", "sys", "dev", "run"):
        layer.directory(name)
    layer.directory("tmp", 0o1777)
    layer.file("bin/busybox", Path(program).read_bytes(), 0o755)
    applets = subprocess.run([program, "--list"], capture_output=True, text=True, check=True).stdout.split()
    for applet in applets:
        if applet != "busybox":
            layer.link(f"bin/{applet}", "busybox")
    layer.file("etc/passwd", b"root:x:0:0::/:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n")
    return layer.bytes()


def archive(path: Path, name: str, layers: Sequence[bytes], user: str, environ: Mapping[str, str]) -> Path:
    """Write an image's OCI archive (image-spec 1.0, image-layout); ``user`` is ``uid:gid``."""
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    with tarfile.open(path, "w") as tar:

        def add(where: str, data: bytes) -> None:
            entry = tarfile.TarInfo(where)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))

        def blob(kind: str, data: bytes) -> dict[str, Any]:
            digest = hashlib.sha256(data).hexdigest()
            add(f"blobs/sha256/{digest}", data)
            return {
                "mediaType": f"application/vnd.oci.image.{kind}",
                "digest": f"sha256:{digest}",
                "size": len(data),
            }

        diffs = [f"sha256:{hashlib.sha256(layer).hexdigest()}" for layer in layers]
        config = {
            "architecture": machine,
            "os": "linux",
            "config": {"User": user, "Env": [f"{key}={value}" for key, value in environ.items()], "Cmd": ["sh"]},
            "rootfs": {"type": "layers", "diff_ids": diffs},
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": blob("config.v1+json", json.dumps(config).encode()),
            "layers": [blob("layer.v1.tar", layer) for layer in layers],
        }
        found = blob("manifest.v1+json", json.dumps(manifest).encode())
        found["annotations"] = {"io.containerd.image.name": name}
        add("index.json", json.dumps({"schemaVersion": 2, "manifests": [found]}).encode())
        add("oci-layout", b'{"imageLayoutVersion": "1.0.0"}')
    return path


# --- containers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bind:
    """What of the host a container sees, and where."""

    source: Path
    target: str
    propagation: str = "None"
    read_only: bool = True

    def option(self) -> str:
        options = ("rbind", "ro" if self.read_only else "rw", PROPAGATION[self.propagation])
        return f"type=bind,src={self.source},dst={self.target},options={':'.join(options)}"


class Container:
    """A container that was started; ``ctr`` waits for it, takes what it prints to its log, and removes it."""

    def __init__(
        self, owner: Containerd, name: str, process: subprocess.Popen[bytes], log: Path, pid_file: Path
    ) -> None:
        self._owner, self.name, self.log = owner, name, log
        self.process, self._pid_file = process, pid_file
        self._execs = 0

    @property
    def pid(self) -> int:
        """Of its first process, as the host has it."""
        return int(self._pid_file.read_text())

    def lines(self) -> list[str]:
        """What it has printed so far, whole lines."""
        return self.log.read_text().rpartition("\n")[0].splitlines()

    def exec(self, *command: str) -> str:
        """Run a command in it to its end; what that prints."""
        self._execs += 1
        options = ["--exec-id", f"e{self._execs}", "--fifo-dir", str(self._owner.fifos)]
        return self._owner.ctr("task", "exec", *options, self.name, *command).stdout

    def alive(self) -> bool:
        return self.process.poll() is None

    def send(self, number: signal.Signals) -> None:
        """Signal its first process, which must be there."""
        self._owner.ctr("task", "kill", "--signal", number.name, self.name)

    def wait(self, timeout_s: float = 30.0) -> int:
        """Wait until it has ended and is gone; its exit status (128 and the signal's number where one killed it)."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} does not end\n{self.log.read_text()}") from None

    def end(self, number: signal.Signals = signal.SIGTERM, timeout_s: float = 30.0) -> int:
        self.send(number)
        return self.wait(timeout_s)


class Containerd:
    """A containerd; ``directory`` is its own, and short: there are sockets in it."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._socket = directory, directory / "c.sock"
        self._namespace = f"helios-{os.getpid()}-{directory.name}"
        self.fifos = directory / "fifos"
        self._started = 0
        self._there: list[Container] = []
        self._ctr = ("ctr", "--address", str(self._socket), "--namespace", self._namespace)
        for name in ("fifos", "logs"):
            (directory / name).mkdir(parents=True)
        config = directory / "config.toml"
        config.write_text(_CONFIG.format(directory, self._socket))
        with (directory / "containerd.log").open("wb") as log:
            self._process = subprocess.Popen(["containerd", "--config", str(config)], stdout=log, stderr=log)
        end = time.monotonic() + 30
        while not self._answers():
            said = (directory / "containerd.log").read_text
            assert self._process.poll() is None, f"containerd ended\n{said()}"
            assert time.monotonic() < end, f"containerd does not start\n{said()}"
            time.sleep(0.02)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as sock:
            return sock.connect_ex(str(self._socket)) == 0

    def ctr(self, *arguments: str, codes: Sequence[int] = (0,)) -> subprocess.CompletedProcess[str]:
        command = [*self._ctr, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if codes:
            assert done.returncode in codes, f"{command}: exit {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def load(self, name: str, layers: Sequence[bytes], user: str = "0:0", **environ: str) -> str:
        """Make an image and import it; returns its name."""
        path = archive(self._directory / "image.tar", name, layers, user, {"PATH": "/bin", **environ})
        self.ctr("image", "import", "--snapshotter", SNAPSHOTTER, str(path))
        path.unlink()
        return name

    def run(
        self,
        image: str,
        *command: str,
        binds: Sequence[Bind] = (),
        environ: Mapping[str, str] | None = None,
        privileged: bool = False,
        read_only: bool = True,
        capabilities: bool = False,
        name: str = "c",
    ) -> Container:
        """Start a container as the image's user; without ``capabilities`` all of them are dropped."""
        self._started += 1
        name = f"{name}-{self._started}"
        log, pid_file = (self._directory / "logs" / f"{name}.{kind}" for kind in ("log", "pid"))
        options = ["--rm", "--snapshotter", SNAPSHOTTER, "--runc-root", str(self._directory / "runc")]
        options += ["--fifo-dir", str(self.fifos), "--pid-file", str(pid_file)]
        options += ["--read-only"] if read_only else []
        if privileged:
            options += ["--privileged", "--allow-new-privs"]
        elif not capabilities:
            options += [word for each in CAPABILITIES for word in ("--cap-drop", f"CAP_{each}")]
        wanted = {bind.propagation for bind in binds} - {"None"}
        for each in [each for each in ("Bidirectional", "HostToContainer") if each in wanted][:1]:
            options += ["--rootfs-propagation", PROPAGATION[each]]
        for bind in sorted(
            binds, key=lambda bind: bind.target.count("/")
        ):  # as runtimes do, so that none hides another
            options += ["--mount", bind.option()]
        for key, value in (environ or {}).items():
            options += ["--env", f"{key}={value}"]
        words = [*self._ctr, "run", *options, image, name, *command]
        with log.open("wb") as output:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        container = Container(self, name, process, log, pid_file)
        self._there.append(container)
        end = time.monotonic() + 30
        while not (pid_file.exists() and pid_file.read_text()) and container.alive():
            assert time.monotonic() < end, f"{name} does not start\n{log.read_text()}"
            time.sleep(0.01)
        assert pid_file.exists(), f"{name} was not started\n{log.read_text()}"
        return container

    def once(self, image: str, *command: str, binds: Sequence[Bind] = (), **options: Any) -> tuple[int, str]:
        """Run a container to its end; its exit status and what it printed."""
        container = self.run(image, *command, binds=binds, **options)
        return container.wait(60), container.log.read_text()

    def close(self) -> None:
        """End all that it has started, by pid, and leave nothing."""
        try:
            for container in filter(Container.alive, self._there):
                self.ctr("task", "kill", "--signal", "SIGKILL", container.name, codes=())
                container.wait()
        finally:
            for process in (*(container.process for container in self._there), self._process):
                process.terminate()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            for entry in reversed(mount_table()):
                if entry.mountpoint.is_relative_to(self._directory):
                    detach(entry.mountpoint)
            for group in sorted(Path("/sys/fs/cgroup").glob(f"**/{self._namespace}"), reverse=True):
                with contextlib.suppress(OSError):  # of a container that was never started whole
                    group.rmdir()

    def __enter__(self) -> Containerd:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# --- Python in a container --------------------------------------------------------------------------------------------


def python_layer() -> bytes:
    """What a layer needs so that ``python_binds`` make it this machine's Python with all that is installed here."""
    layer = Layer()
    layer.directory("usr")
    for name in ("lib", "lib64"):
        if os.path.islink(f"/{name}"):
            layer.link(name, os.readlink(f"/{name}"))
    return layer.bytes()


def python_binds() -> list[Bind]:
    """The interpreter, its libraries and the virtual environment, where they are on this machine."""
    places = [Path("/usr"), *(Path(f"/{name}") for name in ("lib", "lib64") if not os.path.islink(f"/{name}"))]
    places += [Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()]
    kept: list[Path] = []
    for place in places:
        if place.is_dir() and not any(place.is_relative_to(other) for other in kept):
            kept.append(place)
    return [Bind(place, str(place)) for place in kept]


def python_path() -> str:
    """PATH of such an image: ``python`` and ``helios`` are those of the tests."""
    return f"{Path(sys.prefix).resolve()}/bin:/bin"


@contextlib.contextmanager
def shared_mount(path: Path) -> Iterator[Path]:
    """Make a directory a mount of its own that is shared, as the root of a node is; whatever is below goes with it."""
    path.mkdir(exist_ok=True)
    subprocess.run(["mount", "--bind", path, path], check=True)
    subprocess.run(["mount", "--make-rshared", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)
