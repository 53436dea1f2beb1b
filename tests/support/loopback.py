"""A small HTTP/1.1 server on loopback whose answers are a function's, plain or over TLS."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.support.certificates import Pair


@dataclass(frozen=True)
class Asked:
    """A request, whole; ``headers`` takes names in any case."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Said:
    """An answer. ``silent``: none comes, and the connection stays open; ``torn``: it is closed instead."""

    body: bytes = b""
    status: int = 200
    kind: str = "application/json"
    silent: bool = False
    torn: bool = False


def said(document: Any, status: int = 200) -> Said:
    """An answer in JSON."""
    return Said(json.dumps(document).encode(), status)


class Loopback:
    """A context in which ``answer``, called from a thread for each connection, is asked at ``url``."""

    def __init__(self, answer: Callable[[Asked], Said], pair: Pair | None = None) -> None:
        """``pair``: over TLS, with this certificate."""
        self._answer, self._gone = answer, threading.Event()
        self._open: set[socket.socket] = set()
        self._context: ssl.SSLContext | None = None
        if pair is not None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(pair.cert, pair.key)
        self.url = ""

    def __enter__(self) -> Loopback:
        outer = self

        class Server(ThreadingHTTPServer):
            def finish_request(self, request: Any, address: Any) -> None:
                outer._open.add(request)
                try:
                    if outer._context is None:
                        super().finish_request(request, address)
                        return
                    with outer._context.wrap_socket(request, server_side=True) as secured:  # in a thread of its own
                        outer._open.add(secured)
                        super().finish_request(secured, address)
                        outer._open.discard(secured)
                finally:
                    outer._open.discard(request)

            def handle_error(self, *_: Any) -> None:
                pass  # clients may go away as they like

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def _serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                found = outer._answer(Asked(self.command, self.path, self.headers, body))
                if found.silent:
                    outer._gone.wait()
                if found.silent or found.torn:
                    self.close_connection = True
                    return
                self.send_response(found.status)
                self.send_header("Content-Type", found.kind)
                self.send_header("Content-Length", str(len(found.body)))
                self.end_headers()
                self.wfile.write(found.body)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        self.url = f"{'http' if self._context is None else 'https'}://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._gone.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        for each in list(self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
