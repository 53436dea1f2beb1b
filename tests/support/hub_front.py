"""What stands in front of a registry and passes everything on; of the Hub's files it can lie, be dead, or stall."""

from __future__ import annotations

import contextlib
import http.client
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Mode = Literal["honest", "lies", "dead", "stalls"]


class HubFront:
    """A context manager; ``url`` is what to use instead of the registry's. ``asked`` counts requests for files."""

    def __init__(self, target: str, mode: Mode = "honest") -> None:
        self.mode: Mode = mode
        self.asked = 0
        self._target = urlsplit(target)
        self._over = threading.Event()
        front = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 1 << 16

            def do_GET(self) -> None:
                front.answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubFront:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        of_hub = "/resolve/" in handler.path
        self.asked += of_hub
        if of_hub and self.mode == "stalls":
            self._over.wait(600)
        if of_hub and self.mode in ("dead", "stalls"):
            handler.close_connection = True
            return
        upstream = http.client.HTTPConnection(self._target.hostname or "", self._target.port, timeout=30)
        try:
            kept = {k: v for k, v in handler.headers.items() if k.lower() not in ("host", "connection")}
            upstream.request("GET", handler.path, headers=kept)
            answer = upstream.getresponse()
            body = bytearray(answer.read())
        finally:
            upstream.close()
        if of_hub and self.mode == "lies" and body:
            body[len(body) // 2] ^= 1
        with contextlib.suppress(ConnectionError):
            handler.send_response(answer.status)
            for name, value in answer.headers.items():
                if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                    handler.send_header(name, value)
            handler.send_header("content-length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body)
