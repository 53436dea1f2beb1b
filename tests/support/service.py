"""Small HTTP servers on loopback, for what the router asks."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class Service(Protocol):
    """Something that the router asks."""

    url: str

    def answer(self, body: bytes) -> tuple[int, Any]:
        """The status and the document for one question."""
        ...


@contextmanager
def served(service: Service) -> Iterator[None]:
    """``service.url`` is where it answers, while the context lasts."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, document = service.answer(self.rfile.read(int(self.headers.get("content-length", 0))))
            content = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, *_: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        service.url = f"http://127.0.0.1:{server.server_port}/"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
