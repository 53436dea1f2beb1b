"""Other mounts of an object store, warm, for the readers of benchmarks/warm_read.py: rclone and s3fs.

The store is moto_server (S3 in one process, from PyPI); what is read afterwards comes from each peer's own cache on the
disk, so the store's speed does not count. Debian packages: rclone, s3fs, fuse3. Programs that are missing are named.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.scene import END_S, ended, read_through
from helios.mounts import find_mount

BUCKET = "bench"
START_S = 60.0
NEEDED = {
    "rclone": "apt install rclone fuse3",
    "s3fs": "apt install s3fs fuse3",
    "moto_server": "pip install moto[server]",
}


def missing() -> dict[str, str]:
    """Programs that are not installed, and what installs them."""
    return {name: how for name, how in NEEDED.items() if _program(name) is None}


def _program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def _wait(what: str, ready: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + START_S
    while not ready():
        if process.poll() is not None or time.monotonic() > until:
            raise SystemExit(f"{what} did not start (exit status {process.poll()})")
        time.sleep(0.1)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


@contextmanager
def store(work: Path, file: Path) -> Iterator[str]:
    """moto_server with one object; yields its URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(_program("moto_server")), "-H", "127.0.0.1", "-p", str(port)]
    with (work / "moto.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    with ended(process):
        _wait("moto_server", lambda: _listens(port), process)
        url = f"http://127.0.0.1:{port}"
        for args in (["mkdir", f"s3:{BUCKET}"], ["copyto", str(file), f"s3:{BUCKET}/{file.name}"]):
            subprocess.run([str(_program("rclone")), *args], env=_rclone(url), check=True, timeout=600)
        yield url


def _rclone(url: str) -> dict[str, str]:
    """Its settings; the store has no TLS, and rclone refuses to start where it is told of a bundle of CAs."""
    settings = {
        "RCLONE_CONFIG": "/dev/null",
        "RCLONE_CONFIG_S3_TYPE": "s3",
        "RCLONE_CONFIG_S3_PROVIDER": "Other",
        "RCLONE_CONFIG_S3_ENDPOINT": url,
        "RCLONE_S3_UPLOAD_CUTOFF": "5G",  # in one piece: the store refuses this rclone's parts
        "RCLONE_CONFIG_S3_ACCESS_KEY_ID": "bench",
        "RCLONE_CONFIG_S3_SECRET_ACCESS_KEY": "bench",
    }
    return {name: value for name, value in os.environ.items() if name != "AWS_CA_BUNDLE"} | settings


@contextmanager
def peer(name: str, work: Path, url: str, file: Path) -> Iterator[Path]:
    """A peer's mount with the file in its cache on the disk; yields the file's path."""
    mnt, cache = work / f"{name}-mnt", work / f"{name}-cache"
    mnt.mkdir()
    cache.mkdir()
    environ = dict(os.environ)
    if name == "rclone":
        options = ["--vfs-cache-mode", "full", "--read-only", "--vfs-read-chunk-size", "64M", "--dir-cache-time", "1h"]
        command = ["mount", f"s3:{BUCKET}", str(mnt), *options, "--cache-dir", str(cache)]
        environ = _rclone(url)
    else:
        environ |= {"AWSACCESSKEYID": "bench", "AWSSECRETACCESSKEY": "bench"}
        mount_options = f"url={url},use_path_request_style,use_cache={cache},multipart_size=64,ro,kernel_cache"
        command = [BUCKET, str(mnt), "-f", "-o", mount_options]
    with (work / f"{name}.log").open("wb") as log:
        process = subprocess.Popen([str(_program(name)), *command], env=environ, stdout=log, stderr=log)
    with ended(process):
        try:
            _wait(name, lambda: find_mount(mnt) is not None, process)
            path = mnt / file.name
            if path.stat().st_size != file.stat().st_size:
                raise SystemExit(f"{name} shows {path.stat().st_size} of {file.stat().st_size} bytes")
            read_through(path)
            yield path
        finally:
            if find_mount(mnt) is not None:
                subprocess.run(["fusermount3", "-u", "-z", str(mnt)], check=False, timeout=END_S)
