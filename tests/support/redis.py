"""A Redis server from Debian's package, for as long as a test run lasts: on a unix socket, without files."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


class Server:
    """One server; ``start`` and ``stop`` may alternate: it forgets everything in between."""

    def __init__(self, root: Path) -> None:
        self.socket = root / "redis.sock"
        self._log = root / "log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def start(self) -> None:
        """Start it and wait until it answers. It ends with the thread that calls this."""
        import redis

        ours = ["--port", "0", "--unixsocket", str(self.socket), "--save", "", "--appendonly", "no"]
        dying = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*dying, "redis-server", *ours], cwd=self.socket.parent, stdout=log, stderr=log
            )
        end = time.monotonic() + 20
        while True:
            try:
                with contextlib.closing(redis.Redis(unix_socket_path=str(self.socket))) as client:
                    client.ping()
                return
            except redis.ConnectionError:
                if time.monotonic() > end or self._process.poll() is not None:
                    raise RuntimeError(f"Redis did not start:\n{self._log.read_text()}") from None
                time.sleep(0.01)

    def stop(self) -> None:
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()
            process.wait(20)
            self.socket.unlink(missing_ok=True)

    def freeze(self, frozen: bool) -> None:
        """Have it answer nothing, as behind a network that drops packets."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP if frozen else signal.SIGCONT)


@pytest.fixture(scope="session")
def redis_server() -> Iterator[Server]:
    """The server that the tests of a run share; each leaves it running."""
    if not shutil.which("redis-server"):
        pytest.skip("redis-server is not installed")
    with tempfile.TemporaryDirectory(prefix="helios-redis-", dir="/tmp", ignore_cleanup_errors=True) as directory:
        server = Server(Path(directory))
        server.start()
        try:
            yield server
        finally:
            server.stop()
