"""A slow link in front of a server: a TCP proxy whose answers share one rate over all connections."""

from __future__ import annotations

import contextlib
import socket
import threading
from urllib.parse import urlsplit

from tests.support.origin import SLICE, Throttle


class SlowLink:
    """Forwards to ``host:port``; a context manager. ``rate`` in bytes a second towards the client.

    ``passed`` counts the bytes that went towards the client, ``sent`` those towards the server. ``cuts`` breaks
    connections, one after another: each after so many more bytes towards the server.
    """

    def __init__(self, host: str, port: int, rate: float | None) -> None:
        self.throttle = Throttle(rate)
        self.passed = self.sent = 0
        self.cuts: list[int] = []
        self._target = (host, port)
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener: socket.socket | None = None
        self.url = ""

    def retarget(self, host: str, port: int) -> None:
        """Lead new connections to another server."""
        self._target = (host, port)

    def __enter__(self) -> SlowLink:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._start(self._accept, self._listener)
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._listener is not None
        self.throttle.rate = None
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            sockets = list(self._sockets)
        for each in sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    def _connected(self) -> socket.socket | None:
        """A connection to the server; None where it takes none."""
        try:
            return socket.create_connection(self._target, timeout=10)
        except OSError:
            return None

    def _start(self, target: object, *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return  # the end
            server = self._connected()
            if server is None:
                client.close()
                continue
            server.settimeout(None)
            # a small buffer: what the server has handed to the kernel counts as sent there
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2 * SLICE)
            for each in (client, server):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._sockets |= {client, server}
            self._start(self._pump, client, server, False)
            self._start(self._pump, server, client, True)

    def _cut(self, count: int) -> bool:
        """Count bytes towards the server; returns whether the connection breaks before them."""
        with self._lock:
            self.sent += count
            if not self.cuts:
                return False
            self.cuts[0] -= count
            if self.cuts[0] > 0:
                return False
            del self.cuts[0]
            return True

    def _pump(self, source: socket.socket, sink: socket.socket, slow: bool) -> None:
        try:
            while data := source.recv(SLICE):
                if slow:
                    self.throttle.wait(len(data))
                    with self._lock:
                        self.passed += len(data)
                elif self._cut(len(data)):
                    break
                sink.sendall(data)
        except OSError:
            pass  # one side left; the other is told below
        finally:
            for each in (source, sink):
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
                each.close()
            with self._lock:
                self._sockets -= {source, sink}


class Spread(SlowLink):
    """A plain TCP balancer: each connection goes to the next of some servers that takes it, and ends with it."""

    def __init__(self, *urls: str, rate: float | None = None) -> None:
        super().__init__("", 0, rate)
        addresses = [urlsplit(url) for url in urls]
        self._targets = [(each.hostname or "", each.port or 80) for each in addresses]
        self._turn = 0

    def _connected(self) -> socket.socket | None:
        for _ in self._targets:
            self._target = self._targets[self._turn % len(self._targets)]
            self._turn += 1
            if (found := super()._connected()) is not None:
                return found
        return None
