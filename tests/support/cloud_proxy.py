"""A proxy on loopback in front of an object store's server: it logs what passes, and lets things go wrong.

Bodies pass in pieces, so that a large one needs no memory; ``seen`` says who asked for what and how many bytes went
each way. The server behind it stays the real one: only what a fault says is changed.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import unquote, urlsplit

BLOCK = 64 << 10

SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Slow down.</Message></Error>"

DENIED = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Not you.</Message></Error>"

ONE_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "expect"})


@dataclass
class Seen:
    """One request; ``received`` and ``sent`` count bytes of bodies, from the client and to it."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    status: int = 0
    received: int = 0
    sent: int = 0


@dataclass
class Fault:
    """What goes wrong with requests that match: ``skip`` are left alone first, then ``times`` are struck (-1: all)."""

    match: Callable[[Seen], bool]
    times: int = 1
    skip: int = 0
    status: int | None = None
    """Answer with this at once, and with ``body``, or one that suits the status."""
    body: bytes = b""
    reset: bool = False
    """Reset the connection when the request has come, before anything passes."""
    lose_answer: bool = False
    """Let the request pass and reset the connection instead of answering."""
    truncate_at: int | None = None
    """Close the connection after so many bytes of the answer's body."""
    flip_at: int | None = None
    """Flip a bit of the answer's body at this offset."""
    flip_sent_at: int | None = None
    """Flip a bit of the request's body at this offset."""
    stall: bool = False
    """Never answer."""
    delay_s: float = 0.0
    hits: int = 0


class CloudProxy:
    """Passes on to ``target`` (an http URL); a context manager. ``url`` is what clients get."""

    def __init__(self, target: str) -> None:
        parts = urlsplit(target)
        assert parts.hostname is not None
        assert parts.port is not None
        self.address = parts.hostname, parts.port
        self.seen: list[Seen] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        self.over = threading.Event()
        proxy = self

        class Handler(_Handler):
            pass

        Handler.proxy = proxy
        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def fault(self, match: str | Callable[[Seen], bool], *, method: str | None = None, **what: object) -> Fault:
        """Let requests go wrong whose path with query holds the text (or that match)."""

        def matches(seen: Seen) -> bool:
            if method is not None and seen.method != method:
                return False
            return match(seen) if callable(match) else match in f"{unquote(seen.path)}?{seen.query}"

        fault = Fault(matches, **what)  # type: ignore[arg-type]
        with self.lock:
            self.faults.append(fault)
        return fault

    def strike(self, seen: Seen) -> Fault | None:
        """Log the request; what goes wrong with it."""
        with self.lock:
            self.seen.append(seen)
            for fault in self.faults:
                if not fault.match(seen):
                    continue
                if fault.skip:
                    fault.skip -= 1
                elif fault.times < 0 or fault.hits < fault.times:
                    fault.hits += 1
                    return fault
        return None

    def calm(self) -> None:
        """No faults any more, and nothing seen yet."""
        with self.lock:
            self.faults.clear()
            self.seen.clear()

    def find(self, method: str, part: str = "") -> list[Seen]:
        """Requests so far, in order, whose path with query holds the text."""
        with self.lock:
            return [s for s in self.seen if s.method == method and part in f"{s.path}?{s.query}"]

    def __enter__(self) -> CloudProxy:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.over.set()
        self._server.shutdown()
        self._server.close_all()
        self._server.server_close()
        self._thread.join(10)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self._open: set[socket.socket] = set()

    def process_request(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]
        self._open.add(request)
        super().process_request(request, client_address)  # type: ignore[arg-type]

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        self._open.discard(request)
        super().shutdown_request(request)

    def close_all(self) -> None:
        for each in list(self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        return  # a client that left


class _Handler(BaseHTTPRequestHandler):
    proxy: CloudProxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    _upstream: http.client.HTTPConnection | None = None

    def log_message(self, format: str, *args: object) -> None:
        return

    def handle_expect_100(self) -> bool:
        self.send_response_only(100)
        self.end_headers()
        return True

    def finish(self) -> None:
        if self._upstream is not None:
            self._upstream.close()
        super().finish()

    def _any(self) -> None:
        path, _, query = self.path.partition("?")
        seen = Seen(self.command, path, query, {k.lower(): v for k, v in self.headers.items()})
        fault = self.proxy.strike(seen)
        if fault is not None:
            self.proxy.over.wait(fault.delay_s)
            if fault.stall:
                self.proxy.over.wait(600)
                return self._reset()
            if fault.reset:
                return self._reset()
            if fault.status is not None:
                self._take(seen, None)
                return self._refuse(seen, fault)
        answer = self._pass_on(seen, fault)
        seen.status = answer.status
        if fault is not None and fault.lose_answer:
            answer.read()
            return self._reset()
        self._send(answer, seen, fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _any

    def _take(self, seen: Seen, fault: Fault | None) -> bytes:
        """The request's body, piece by piece where it is long."""
        return b"".join(self._body(seen, fault))

    def _body(self, seen: Seen, fault: Fault | None):  # type: ignore[no-untyped-def]
        left = int(self.headers.get("content-length") or 0)
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            raise AssertionError("the proxy takes bodies with a length")
        while left:
            data = self.rfile.read(min(left, BLOCK))
            if not data:
                return
            if fault is not None and fault.flip_sent_at is not None:
                data = _flip(data, fault.flip_sent_at - seen.received)
            left -= len(data)
            seen.received += len(data)
            yield data

    def _pass_on(self, seen: Seen, fault: Fault | None) -> http.client.HTTPResponse:
        if self._upstream is not None:
            self._upstream.close()  # a connection each: what is behind may close one whenever it likes
        self._upstream = upstream = http.client.HTTPConnection(*self.proxy.address, timeout=60)
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ONE_HOP:
                upstream.putheader(name, value)
        upstream.endheaders()
        for data in self._body(seen, fault):
            upstream.send(data)
        return upstream.getresponse()

    def _send(self, answer: http.client.HTTPResponse, seen: Seen, fault: Fault | None) -> None:
        self.send_response_only(answer.status, answer.reason)
        body = self.command != "HEAD" and answer.status not in (204, 304)
        for name, value in answer.getheaders():
            if name.lower() not in ONE_HOP and not (name.lower() == "content-length" and answer.chunked):
                self.send_header(name, value)
        whole = answer.read() if answer.chunked else None
        if whole is not None:
            self.send_header("content-length", str(len(whole)))
        elif body and answer.getheader("content-length") is None:
            self.send_header("content-length", "0")
        self.end_headers()
        while body:
            data = whole if whole is not None else answer.read(BLOCK)
            whole = b"" if whole is not None else None
            if not data:
                return
            if fault is not None and fault.flip_at is not None:
                data = _flip(data, fault.flip_at - seen.sent)
            if fault is not None and fault.truncate_at is not None:
                data = data[: fault.truncate_at - seen.sent]
            self.wfile.write(data)
            seen.sent += len(data)
            if fault is not None and fault.truncate_at is not None and seen.sent >= fault.truncate_at:
                self.close_connection = True
                return

    def _refuse(self, seen: Seen, fault: Fault) -> None:
        assert fault.status is not None
        seen.status = fault.status
        self.send_response_only(fault.status)
        self.send_header("content-type", "application/xml")
        body = fault.body or (DENIED if fault.status < 500 else SLOW_DOWN)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


def _flip(data: bytes, at: int) -> bytes:
    if not 0 <= at < len(data):
        return data
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
