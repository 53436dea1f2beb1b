"""A Kubernetes control plane on loopback: the real etcd and kube-apiserver, for as long as a test module lasts.

Their programs lie in the directory that ``KUBEBUILDER_ASSETS`` names, as for envtest of Kubernetes' own SIGs: ``etcd``
and ``kube-apiserver``. No kubelet, scheduler or controller runs: what those would write, tests write.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.support.cloud_servers import free_port

ADMIN = "the-administrators-token"
START_S = 120.0
"""Longest start of the API server, in seconds: it has its own roles to write."""


def assets() -> Path:
    """Where the programs are; raises RuntimeError with what to do."""
    where = os.environ.get("KUBEBUILDER_ASSETS", "")
    missing = [name for name in ("etcd", "kube-apiserver") if not where or not shutil.which(name, path=where)]
    if missing:
        raise RuntimeError(
            f"{' and '.join(missing)} not found: set KUBEBUILDER_ASSETS to a directory with Kubernetes' own binaries, "
            "as `setup-envtest use` prints it"
        )
    return Path(where)


class ControlPlane:
    """One etcd and one API server below a directory; ``url`` stays when the API server is started again."""

    def __init__(self, root: Path) -> None:
        self.root, self._bin = root, assets()
        self._etcd_url, self._peer_url = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
        self._port = free_port()
        self.url = f"https://127.0.0.1:{self._port}"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._keys()

    def start(self) -> None:
        self._spawn("etcd", "--data-dir", self.root / "etcd", "--listen-client-urls", self._etcd_url,
            "--advertise-client-urls", self._etcd_url, "--listen-peer-urls", self._peer_url,
            "--initial-advertise-peer-urls", self._peer_url, "--initial-cluster", f"default={self._peer_url}",
            "--unsafe-no-fsync")  # fmt: skip
        self.start_api_server()

    def start_api_server(self) -> None:
        """Start it and wait until it is ready."""
        self._spawn("kube-apiserver", "--etcd-servers", self._etcd_url, "--bind-address", "127.0.0.1",
            "--advertise-address", "127.0.0.1", "--secure-port", str(self._port), "--cert-dir", self.root / "certs",
            "--token-auth-file", self.root / "tokens.csv", "--authorization-mode", "RBAC",
            "--service-account-issuer", "https://kubernetes.default.svc", "--service-cluster-ip-range", "10.96.0.0/24",
            "--service-account-signing-key-file", self.root / "sa.key", "--service-account-key-file",
            self.root / "sa.pub", "--disable-admission-plugins", "ServiceAccount", "--v", "1")  # fmt: skip
        end = time.monotonic() + START_S
        while not self._ready():
            process = self._processes["kube-apiserver"]
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError((self.root / "kube-apiserver.log").read_text()[-3000:])
            time.sleep(0.1)

    def stop_api_server(self) -> None:
        self._end("kube-apiserver")

    def compact(self) -> None:
        """etcd forgets what was before its present revision."""
        revision = int(self._ask_etcd("kv/range", {"key": "AA=="})["header"]["revision"])
        self._ask_etcd("kv/compaction", {"revision": str(revision), "physical": True})

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """The API server keeps its connections and says nothing."""
        process = self._processes["kube-apiserver"]
        process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        for name in list(self._processes):
            self._end(name)

    def kubeconfig(self, path: Path, token: str = ADMIN, namespace: str = "default") -> Path:
        """Write one, of a user with this token."""
        described = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {"server": self.url, "certificate-authority": str(self._authority)}}],
            "users": [{"name": "u", "user": {"token": token}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u", "namespace": namespace}}],
            "current-context": "x",
        }
        path.write_text(yaml.safe_dump(described))
        return path

    @property
    def _authority(self) -> Path:
        """The certificate that the API server has made for itself."""
        return self.root / "certs" / "apiserver.crt"

    def _keys(self) -> None:
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        (self.root / "sa.key").write_bytes(private)
        (self.root / "sa.pub").write_bytes(public)
        (self.root / "tokens.csv").write_text(f"{ADMIN},admin,1,system:masters\n")

    def _ready(self) -> bool:
        request = urllib.request.Request(f"{self.url}/readyz", headers={"authorization": f"Bearer {ADMIN}"})
        with contextlib.suppress(OSError, urllib.error.URLError):
            context = ssl.create_default_context(cafile=str(self._authority))
            with urllib.request.urlopen(request, timeout=5, context=context) as answer:
                return bool(answer.status == 200)
        return False

    def _ask_etcd(self, call: str, body: dict[str, object]) -> dict[str, dict[str, str]]:
        """etcd's JSON gateway to its gRPC."""
        request = urllib.request.Request(f"{self._etcd_url}/v3/{call}", json.dumps(body).encode(), method="POST")
        with urllib.request.urlopen(request, timeout=20) as answer:
            found: dict[str, dict[str, str]] = json.load(answer)
        return found

    def _spawn(self, name: str, *arguments: str | Path) -> None:
        with (self.root / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [str(self._bin / name), *map(str, arguments)], stdout=log, stderr=log, cwd=self.root
            )

    def _end(self, name: str) -> None:
        process = self._processes.pop(name)
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
