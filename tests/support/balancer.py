"""A plain load balancer on loopback: each request goes to the next of some servers, whatever connection it came on."""

from __future__ import annotations

import http.client
import itertools
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import urlsplit

HOP = ("connection", "keep-alive", "transfer-encoding", "te", "upgrade")


class Balancer:
    """A context manager; ``url`` is where it listens. ``passed`` says, per server, which requests went there."""

    def __init__(self, *servers: str) -> None:
        self.passed: dict[str, list[str]] = {server: [] for server in servers}
        self._turns, self._lock = itertools.cycle(servers), threading.Lock()
        balancer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 1 << 16

            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                balancer._pass_on(self)

            do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Balancer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _pass_on(self, asked: BaseHTTPRequestHandler) -> None:
        body = self._body(asked)
        with self._lock:
            server = next(self._turns)
            self.passed[server].append(f"{asked.command} {asked.path}")
        parts = urlsplit(server)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
        try:
            headers = {name: value for name, value in asked.headers.items() if name.lower() not in HOP}
            connection.request(asked.command, asked.path, body=body or None, headers=headers)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        asked.send_response(answer.status)
        for name, value in answer.headers.items():
            if name.lower() not in (*HOP, "content-length"):
                asked.send_header(name, value)
        length = answer.headers.get("content-length", str(len(content)))
        asked.send_header("content-length", length)
        asked.end_headers()
        if asked.command != "HEAD":
            asked.wfile.write(content)

    @staticmethod
    def _body(asked: BaseHTTPRequestHandler) -> bytes:
        if "chunked" not in asked.headers.get("transfer-encoding", ""):
            return asked.rfile.read(int(asked.headers.get("content-length", "0")))
        out = b""
        while count := int(asked.rfile.readline().split(b";")[0], 16):
            out += asked.rfile.read(count)
            asked.rfile.readline()
        asked.rfile.readline()
        return out
