"""A worker that does with its connection just what a test wants: it reads and writes when it is told to."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Speaking(BaseHTTPRequestHandler):
    """Just enough of a vLLM to be up: what it does with a POST is the heir's."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.say(b'{"object": "list", "data": [{"id": "m"}]}')

    def say(self, body: bytes, status: int = 200) -> None:
        """Answer, and leave the connection as it is."""
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Handler(Speaking):
    server: Worker

    def do_POST(self) -> None:
        self.server.serve(self)


class Worker(ThreadingHTTPServer):
    """A worker whose sockets hold little; ``serve`` answers what is POSTed, ``moved`` counts its bytes."""

    daemon_threads = True

    def __init__(self, serve: Callable[[Handler], None]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            self.socket.setsockopt(socket.SOL_SOCKET, option, 64 << 10)
        self.serve, self.moved = serve, 0
        self.url = f"m=http://127.0.0.1:{self.server_port}"


@contextmanager
def working(serve: Callable[[Handler], None]) -> Iterator[Worker]:
    with Worker(serve) as worker:
        thread = threading.Thread(target=worker.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield worker
        finally:
            worker.shutdown()
            thread.join()
