"""nginx for the benchmarks: a plain server of files, or in front of something."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.common import ROOT
from benchmarks.scene import ended

START_S = 20.0

CONFIG = """
daemon off;
user root;
worker_processes {workers};
pid {work}/nginx.pid;
error_log {work}/nginx.log warn;
events {{ worker_connections 512; }}
http {{
  access_log off;
  {http}
  sendfile on;
  tcp_nopush off;
  keepalive_requests 100000;
  client_body_temp_path {work}/body;
  proxy_temp_path {work}/proxy;
  fastcgi_temp_path {work}/fastcgi;
  uwsgi_temp_path {work}/uwsgi;
  scgi_temp_path {work}/scgi;
  server {{
    listen {address}:{port};
    {locations}
  }}
}}
"""

_ASK = """
import sys, urllib.request
try:
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(sys.argv[1] + "/readyz", timeout=5).read()
except OSError:
    sys.exit(1)
"""


@contextmanager
def nginx(
    work: Path,
    locations: str,
    *,
    address: str = "127.0.0.1",
    port: int = 0,
    workers: int = 2,
    http: str = "",
    within: Sequence[str] = (),
) -> Iterator[str]:
    """nginx with these ``location`` blocks, one of which answers ``/readyz``; yields its URL.

    ``locations`` may hold whatever else a ``server`` block may: more ports to listen on, above all.

    Port 0: a free one. ``http`` is what else its ``http`` block holds.
    """
    if shutil.which("nginx") is None:
        raise SystemExit("nginx is missing: apt install nginx-light")
    port = port or free_ports(1, address)[0]
    config = work / "nginx.conf"
    config.write_text(
        CONFIG.format(work=work, address=address, port=port, workers=workers, http=http, locations=locations)
    )
    command = [*within, "nginx", "-c", str(config), "-p", str(work), "-e", str(work / "nginx.log")]
    url = f"http://{address}:{port}"
    with ended(subprocess.Popen(command)) as process:
        until = time.monotonic() + START_S
        while subprocess.run([*within, sys.executable, "-c", _ASK, url], check=False, cwd=ROOT).returncode:
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"nginx did not start; see {work / 'nginx.log'}")
            time.sleep(0.1)
        yield url


def free_ports(count: int, address: str = "127.0.0.1") -> list[int]:
    """Ports that nobody listens on, no two the same."""
    with ExitStack() as held:
        found = [held.enter_context(socket.create_server((address, 0))) for _ in range(count)]
        return [int(one.getsockname()[1]) for one in found]
