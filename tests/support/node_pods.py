"""A node's pods as the chart has them, in real containers: the test is the kubelet and the DaemonSets' controller.

A pod's containers get the command, arguments, environment, volumes with their propagation, privileges and read-only
roots of the template. Different from a node: there is no network between pods, so the nodes' models lie in the worker's
own home and no registry is named; no memory limits; containers of others' images (node-driver-registrar) don't run.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from tests.support.chart import ROOT, Chart
from tests.support.containers import (
    Bind,
    Container,
    Containerd,
    Layer,
    busybox,
    python_binds,
    python_layer,
    python_path,
)
from tests.support.manifests import expanded

REPOSITORY: Final = "helios.test"
NODE: Final = "node-1"
NOT_HERE: Final = ("HELIOS_REGISTRY__URLS", "HELIOS_REGISTRY__TOKEN_FILE")
PROBE: Final = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)"

Object = dict[str, Any]


def load_images(containerd: Containerd, version: str) -> None:
    """Make the images of the nodes' parts with Helios as it is here under the name of a version."""
    layers = [busybox(), python_layer(), _product(version)]
    environ = {"PATH": python_path(), "PYTHONPATH": "/opt/helios", "PYTHONDONTWRITEBYTECODE": "1"}
    for part in ("keeper", "worker", "csi"):
        containerd.load(f"{REPOSITORY}/{part}:{version}", layers, **environ)


def _product(version: str) -> bytes:
    layer = Layer()
    for package in ("helios", "heliosfs", "registry", "csi"):
        for path in sorted((ROOT / package).rglob("*")):
            if path.is_file() and path.suffix != ".pyc":
                layer.file(f"opt/helios/{path.relative_to(ROOT)}", path.read_bytes())
    about = f"Metadata-Version: 2.1\nName: helios-llm\nVersion: {version}\n"
    layer.file(f"opt/helios/helios_llm-{version}.dist-info/METADATA", about.encode())
    return layer.bytes()


class Pod:
    """A pod that was started."""

    def __init__(self, template: Object, starts: Mapping[str, Callable[[], Container]]) -> None:
        self._template, self._starts = template, starts
        self.containers = {name: start() for name, start in starts.items()}

    def restart(self, name: str) -> None:
        """Start a container that has ended again, as the kubelet does until the pod is deleted."""
        assert not self.containers[name].alive()
        self.containers[name] = self._starts[name]()

    def delete(self) -> dict[str, int]:
        """SIGTERM to every container; each must have ended within the pod's grace period. Their exit statuses."""
        for container in filter(Container.alive, self.containers.values()):
            container.send(signal.SIGTERM)
        grace_s = self._template["spec"]["terminationGracePeriodSeconds"]
        return {name: container.wait(grace_s) for name, container in self.containers.items()}

    def until(self, kind: str, within_s: float = 60.0) -> None:
        """Wait until the probe (``readinessProbe``) of each container that has one says yes."""
        end = time.monotonic() + within_s
        for found in self._template["spec"]["containers"]:
            container = self.containers.get(found["name"])
            if container is None or kind not in found:
                continue
            ports = {each["name"]: each["containerPort"] for each in found["ports"]}
            asked = found[kind]["httpGet"]
            url = f"http://127.0.0.1:{ports[asked['port']]}{asked['path']}"
            command = ["nsenter", "--target", str(container.pid), "--net", sys.executable, "-c", PROBE, url]
            while (done := subprocess.run(command, capture_output=True, text=True, check=False)).returncode:
                said = f"{done.stderr}\n{container.log.read_text()}"
                assert container.alive(), f"{container.name} ended\n{said}"
                assert time.monotonic() < end, f"{container.name}: {kind} does not come true\n{said}"
                time.sleep(0.1)


class Node:
    """A node: ``root`` and ``kubelet`` are the chart's directories on it, below one that is a shared mount."""

    def __init__(self, containerd: Containerd, chart: Chart, base: Path) -> None:
        self._containerd, self._chart, self._base = containerd, chart, base
        self.root, self.kubelet = base / "helios", base / "kubelet"
        self.mountpoint = self.root / "mounts" / "models"
        self.socket = self.kubelet / "plugins" / "csi.helios.dev" / "csi.sock"
        for path in (self.root, self.kubelet / "plugins_registry", self.kubelet / "pods"):
            path.mkdir(parents=True)
        self._made = 0

    def objects(self, version: str) -> list[Object]:
        """The chart as it is upgraded to a version of the images."""
        values = {
            "images": {"repository": REPOSITORY, "tag": version},
            "registryUrls": ["http://registry.example:8470"],
            "node": {"root": str(self.root), "kubelet": str(self.kubelet)},
        }
        return self._chart.objects(values)

    def start(self, part: str, version: str) -> Pod:
        """Start a new pod of the DaemonSet of this part (keeper, worker, csi-node), as of this version."""
        objects = self.objects(version)
        (template,) = [
            each["spec"]["template"]
            for each in objects
            if each["kind"] == "DaemonSet" and each["metadata"]["name"] == f"helios-{part}"
        ]
        self._made += 1
        made = self._made
        uid, spec = str(uuid.uuid4()), template["spec"]
        volumes = {each["name"]: self._volume(each, uid, objects) for each in spec["volumes"]}
        fields = {"metadata.uid": uid, "spec.nodeName": NODE}

        def starts(found: Object) -> Callable[[], Container]:
            return lambda: self._run(f"{part}-{made}-{found['name']}", found, volumes, fields)

        for found in spec.get("initContainers", []):
            container = starts(found)()
            assert container.wait() == 0, container.log.read_text()
        ours = [found for found in spec["containers"] if found["image"].startswith(f"{REPOSITORY}/")]
        return Pod(template, {found["name"]: starts(found) for found in ours})

    def _run(self, name: str, found: Object, volumes: Mapping[str, Path], fields: Mapping[str, str]) -> Container:
        environ: dict[str, str] = {}
        for each in found.get("env", []):
            known = "value" in each
            value = expanded(each["value"], environ) if known else fields[each["valueFrom"]["fieldRef"]["fieldPath"]]
            environ[each["name"]] = value
        words = [expanded(word, environ) for word in [*found["command"], *found.get("args", [])]]
        binds = [
            Bind(
                volumes[each["name"]],
                each["mountPath"],
                each.get("mountPropagation", "None"),
                each.get("readOnly", False),
            )
            for each in found["volumeMounts"]
        ]
        return self._containerd.run(
            found["image"],
            *words,
            binds=[*python_binds(), *binds],
            environ={key: value for key, value in environ.items() if key not in NOT_HERE},
            privileged=found["securityContext"].get("privileged", False),
            read_only=found["securityContext"]["readOnlyRootFilesystem"],
            name=name,
        )

    def _volume(self, volume: Object, uid: str, objects: list[Object]) -> Path:
        if "hostPath" in volume:
            path = Path(volume["hostPath"]["path"])
            if volume["hostPath"]["type"] == "DirectoryOrCreate":
                path.mkdir(parents=True, exist_ok=True)
            assert path.is_dir(), f"no hostPath {path}"
            return path
        path = self._base / "volumes" / uid / volume["name"]
        path.mkdir(parents=True)
        if "configMap" in volume:
            for name, text in self._data(volume["configMap"]["name"], objects):
                (path / name).write_text(text)
        else:
            assert set(volume) <= {"name", "emptyDir"}, volume
        return path

    def _data(self, name: str, objects: list[Object]) -> Iterator[tuple[str, str]]:
        (found,) = [each for each in objects if each["kind"] == "ConfigMap" and each["metadata"]["name"] == name]
        yield from found["data"].items()
