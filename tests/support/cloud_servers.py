"""Servers of object stores on loopback: moto for S3, Azurite for Azure Blob, a fake for GCS.

Each context manager yields a ``Server``: its address, a bucket made for the caller, and the environment in which its
credentials are found.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import hashlib
import hmac
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from helios.config import RegistrySettings, StoreOptions
from tests.fakes.gcs_xml import gcs_xml

ROOT = Path(__file__).resolve().parents[2]
AZURITE = ROOT / ".cache" / "azurite" / "node_modules" / ".bin" / "azurite-blob"
"""Where scripts/setup.py puts it."""

SECRET = "Jr7TellNobody/" + "x" * 24
"""What must never be seen in a log."""

AZURE_ACCOUNT = "heliosaccount"
AZURE_KEY = base64.b64encode(b"AzureTellNobody!" * 4).decode()


@dataclass(frozen=True)
class Server:
    """A bucket in a server that answers. ``store`` is what ``registry.store`` gets."""

    url: str
    store: str
    environ: Mapping[str, str]
    account: str = ""

    def settings(self, *, endpoint: str = "", prefix: str = "", engine: str = "obstore", **more: object) -> object:
        """Registry settings; ``endpoint`` is a proxy's address in the place of the server's own."""
        options = StoreOptions(endpoint=self.endpoint(endpoint), region=self.region, account=self.account)
        store = f"{self.store}/{prefix}" if prefix else self.store
        return RegistrySettings(store=store, store_engine=engine, store_options=options, **more)  # type: ignore[arg-type]

    def endpoint(self, proxy: str = "") -> str:
        return (proxy or self.url) + (f"/{self.account}" if self.account else "")

    @property
    def region(self) -> str:
        return "us-east-1" if self.store.startswith("s3:") else ""


@contextlib.contextmanager
def moto(directory: Path) -> Iterator[Server]:
    """S3: moto's server, with a bucket."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)]
    with process(command, directory / "moto.log", port):
        url = f"http://127.0.0.1:{port}"
        _call(url + "/bucket", "PUT")
        environ = {"AWS_ACCESS_KEY_ID": "AKIATELLNOBODY", "AWS_SECRET_ACCESS_KEY": SECRET}
        yield Server(url, "s3://bucket", {**environ, "AWS_EC2_METADATA_DISABLED": "true"})


@contextlib.contextmanager
def azurite(directory: Path) -> Iterator[Server]:
    """Azure Blob: Azurite, which checks signatures, with a container."""
    if not AZURITE.exists() or shutil.which("node") is None:
        pytest.skip("Azurite is not there: run scripts/setup.py dev")
    port = free_port()
    command = [str(AZURITE), "--disableTelemetry", "--inMemoryPersistence", "--silent", "--skipApiVersionCheck"]
    accounts = {"AZURITE_ACCOUNTS": f"{AZURE_ACCOUNT}:{AZURE_KEY}"}
    command += ["--blobHost", "127.0.0.1", "--blobPort", str(port)]
    with process(command, directory / "azurite.log", port, accounts):
        url = f"http://127.0.0.1:{port}"
        when = datetime.datetime.now(datetime.UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
        lines = ["PUT", *[""] * 11, f"x-ms-date:{when}", "x-ms-version:2021-08-06"]
        lines += [f"/{AZURE_ACCOUNT}/{AZURE_ACCOUNT}/container", "restype:container"]
        digest = hmac.new(base64.b64decode(AZURE_KEY), "\n".join(lines).encode(), hashlib.sha256).digest()
        allowed = f"SharedKey {AZURE_ACCOUNT}:{base64.b64encode(digest).decode()}"
        headers = {"x-ms-date": when, "x-ms-version": "2021-08-06", "authorization": allowed}
        _call(f"{url}/{AZURE_ACCOUNT}/container?restype=container", "PUT", headers)
        environ = {"AZURE_STORAGE_ACCOUNT_KEY": AZURE_KEY}
        yield Server(url, "az://container", environ, AZURE_ACCOUNT)


@contextlib.contextmanager
def gcs(directory: Path) -> Iterator[Server]:
    """Google's XML API: a fake that checks signatures, because emulators speak only the JSON API."""
    with gcs_xml() as found:
        path = directory / "service-account.json"
        found.write_credentials(path)
        yield Server(found.url, "gs://bucket", {"GOOGLE_APPLICATION_CREDENTIALS": str(path)})


@contextlib.contextmanager
def credentials(server: Server) -> Iterator[None]:
    """The server's credentials in this process' environment, and nobody else's."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("AWS_", "AZURE_", "GOOGLE_")):
                patch.delenv(name)
        for name, value in server.environ.items():
            patch.setenv(name, value)
        patch.setenv("AWS_CONFIG_FILE", "/dev/null")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
        yield


def some_prefix() -> str:
    """A prefix of a test's own."""
    return f"t-{secrets.token_hex(6)}/store"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def process(
    command: Sequence[str], log: Path, port: int, environ: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A server that listens on the port while the block runs."""
    with log.open("wb") as out:
        started = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env={**os.environ, **(environ or {})}
        )
        try:
            _await(started, port, log)
            yield started
        finally:
            started.send_signal(signal.SIGTERM)
            try:
                started.wait(5)
            except subprocess.TimeoutExpired:
                started.kill()
                started.wait()


def _await(started: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + 60
    while True:
        assert started.poll() is None, log.read_text(errors="replace")
        assert time.monotonic() < end, f"{started.args} does not listen: {log.read_text(errors='replace')}"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)


def _call(url: str, method: str, headers: Mapping[str, str] | None = None) -> None:
    try:
        request = urllib.request.Request(url, method=method, headers=dict(headers or {}))
        with urllib.request.urlopen(request, timeout=30):
            return
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{method} {url}: {error} {error.read()!r}") from None
