"""A real CSI driver for tests: ``helios csi`` on a unix socket, and a client that speaks to it as the kubelet does."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message_factory import GetMessageClass

from csi import csi_pb2 as messages
from helios.home import Home
from helios.mounts import FSTYPE, detach, mount_table
from tests.support.registry import log_problems

HELIOS = Path(sys.executable).parent / "helios"
SERVICES = messages.DESCRIPTOR.services_by_name


class Client:
    """``client.NodeGetInfo()``: every call of the three services by its name, fields as keywords or one message."""

    def __init__(self, socket: Path) -> None:
        self.channel = grpc.insecure_channel(f"unix:{socket}", options=[("grpc.enable_http_proxy", 0)])

    def __getattr__(self, name: str) -> Any:
        (method,) = [s.methods_by_name[name] for s in SERVICES.values() if name in s.methods_by_name]
        kind = GetMessageClass(method.input_type)
        call = self.channel.unary_unary(
            f"/{method.containing_service.full_name}/{name}",
            request_serializer=kind.SerializeToString,
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )

        def ask(request: Any = None, timeout: float = 60.0, **fields: Any) -> Any:
            return call(kind(**fields) if request is None else request, timeout=timeout, wait_for_ready=True)

        return ask


@contextlib.contextmanager
def refused(status: str, saying: str = "") -> Iterator[None]:
    """The block's call is answered with this gRPC status, and a message in which the regular expression is found."""
    try:
        yield
    except grpc.RpcError as error:
        found = error
    else:
        raise AssertionError(f"it was not refused with {status}")
    assert found.code().name == status, f"{found.code().name}: {found.details()}"
    assert re.search(saying, found.details()), found.details()
    assert "\n" not in found.details()


def capability(mode: str = "SINGLE_NODE_WRITER", *, flags: tuple[str, ...] = (), fs_type: str = "") -> Any:
    """A VolumeCapability for a mount."""
    kind = messages.VolumeCapability
    return kind(
        mount=kind.MountVolume(fs_type=fs_type, mount_flags=flags),
        access_mode=kind.AccessMode(mode=kind.AccessMode.Mode.Value(mode)),
    )


BLOCK = messages.VolumeCapability(
    block=messages.VolumeCapability.BlockVolume(),
    access_mode=messages.VolumeCapability.AccessMode(mode=messages.VolumeCapability.AccessMode.SINGLE_NODE_WRITER),
)


@dataclass
class Driver:
    """A driver that answers; ``kubelet`` is the kubelet's directory."""

    home: Home
    socket: Path
    kubelet: Path
    arguments: tuple[str, ...] = ()
    environ: dict[str, str] = field(default_factory=dict)
    log: Path = Path()
    node: bool = True
    process: subprocess.Popen[str] | None = None
    client: Client = None  # type: ignore[assignment]
    expected: list[str] = field(default_factory=list)

    def start(self) -> None:
        self.kubelet.mkdir(exist_ok=True)
        with self.log.open("ab") as log:
            command = [str(HELIOS), "csi", "--endpoint", f"unix://{self.socket}"]
            node = ["--node-id", "node-1", "--kubelet-dir", str(self.kubelet)] if self.node else []
            self.process = subprocess.Popen(
                [*command, *node, *self.arguments],
                env={**os.environ, "HELIOS_HOME": str(self.home.root), **self.environ},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            pytest.fail(f"the driver did not start: exit {self.process.wait(5)}\n{self.log.read_text()}")
        assert line.strip() == str(self.socket)
        self.client = Client(self.socket)

    def until_ready(self, within_s: float = 30.0) -> None:
        """Wait until it has recovered."""
        end = time.monotonic() + within_s
        while not self.client.Probe().ready.value:
            assert time.monotonic() < end, f"the driver is not ready\n{self.log.read_text()}"
            time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL."""
        self._close()
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def stop(self) -> int:
        self._close()
        assert self.process is not None
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(30)

    def restart(self) -> None:
        self.kill()
        self.start()

    def _close(self) -> None:
        self.client.channel.close()
        assert self.process is not None
        assert self.process.stdout is not None
        self.process.stdout.close()

    # --- as the kubelet does it ---

    def target(self, name: str) -> Path:
        """Where a pod's volume goes; its parent is there."""
        path = self.kubelet / "pods" / name / "volumes/kubernetes.io~csi/model/mount"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def publish(
        self, volume: str, target: Path, *, mode: str = "SINGLE_NODE_WRITER", timeout: float = 60.0,
        secrets: Mapping[str, str] | None = None, **context: str,
    ) -> None:  # fmt: skip
        self.client.NodePublishVolume(
            volume_id=volume,
            target_path=str(target),
            volume_capability=capability(mode),
            volume_context=context,
            secrets=secrets or {},
            timeout=timeout,
        )

    def unpublish(self, volume: str, target: Path) -> None:
        self.client.NodeUnpublishVolume(volume_id=volume, target_path=str(target))

    def mounts(self) -> list[str]:
        """What is mounted below the kubelet's directory, by target."""
        return [str(e.mountpoint) for e in mount_table() if e.mountpoint.is_relative_to(self.kubelet)]


@contextlib.contextmanager
def running_driver(home: Home, base: Path, *arguments: str, node: bool = True, **environ: str) -> Iterator[Driver]:
    """Start one whose socket, log and kubelet's directory are below ``base``; in the end it leaves on SIGTERM with exit
    0 and its log has no error."""
    driver = Driver(home, base / "csi.sock", base / "kubelet", arguments, dict(environ), base / "csi.log", node)
    driver.start()
    try:
        yield driver
        code = driver.stop()
        assert code in (0, -9), code
        problems = [p for p in log_problems(driver.log) if not any(re.search(e, p) for e in driver.expected)]
        assert not problems, "\n".join(problems)
    finally:
        if driver.process is not None and driver.process.poll() is None:
            driver.kill()
        for entry in reversed(mount_table()):
            if entry.fstype == FSTYPE and entry.mountpoint.is_relative_to(driver.kubelet):
                detach(entry.mountpoint)


def all_at_once(*calls: Any) -> list[Any]:
    """What functions give that are called at the same time: results, or the errors they raise."""
    results: list[Any] = [None] * len(calls)

    def work(number: int) -> None:
        try:
            results[number] = calls[number]()
        except Exception as error:  # it is what the caller looks at
            results[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
