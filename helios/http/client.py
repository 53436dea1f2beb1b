"""A small blocking HTTP/1.1 client for worker threads: TCP or unix socket, pooled, every call with a deadline.

Bodies can be read straight into a caller's buffer (``http.client`` over ``readinto`` moves 2.4-2.7 GB/s, as fast as
the Rust clients measured beside it; docs/architecture.md). Threads may share one client.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import select
import socket
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, BinaryIO
from urllib.parse import SplitResult, unquote, urlencode, urlsplit

from helios.errors import DeadlineExceeded, HeliosError, Unavailable, from_code
from helios.http.response import Answer, Deadline, Response, Watch
from helios.tokens import Token, no_token

Body = bytes | BinaryIO | None

BLOCK = 1 << 18
"""Bytes of a file that are read and sent at a time."""

MAX_ANSWER = 256 << 20
"""Longest answer that is read whole unless its reader says otherwise, in bytes."""

CONNECT_S = 5.0
"""A connection that is not there after so many seconds will hardly come."""

IDLE_S = 60.0
"""An unused connection is kept for so long, in seconds: servers close theirs after 60 to 75."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout, blocksize=BLOCK)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class HttpClient:
    """Requests to one server: ``http://host:port[/prefix]`` or ``unix:/path/to/socket``."""

    def __init__(
        self,
        base: str,
        *,
        timeout_s: float = 30.0,
        max_idle: int = 16,
        proxy: str | None = None,
        token: Token = no_token,
        admits: Callable[[str], bool] | None = None,
        context: ssl.SSLContext | None = None,
    ) -> None:
        """``proxy``: ``http://[user:password@]host:port`` that leads there, by CONNECT or, for plain HTTP, by absolute
        targets.

        ``token`` gives what every request is authorised with. ``admits`` tells of the address that a connection leads
        to whether it may (helios/http/places.py); else nothing is sent, and the request fails with Unavailable.
        ``context``: whom https trusts; None: whom this machine does.
        """
        self._token, self._admits, self._context = token, admits, context
        self.base, self.timeout_s, self._max_idle = base, timeout_s, max_idle
        self._lock = threading.Lock()
        self._idle: list[tuple[http.client.HTTPConnection, float]] = []
        self._parts = urlsplit("" if base.startswith("unix:") else base)
        self._proxy = None if proxy is None else urlsplit(proxy)
        self._at_proxy = {} if self._proxy is None else _proxy_login(self._proxy)
        plain = self._proxy is not None and not self._secure
        self._prefix = base.rstrip("/") if plain else self._parts.path.rstrip("/")

    @property
    def idle(self) -> int:
        """Connections that a request would find open."""
        with self._lock:
            return len(self._idle)

    def request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: Body = None,
        timeout_s: float | None = None,
        watch: Watch | None = None,
    ) -> Response:
        """Send a request and return the answer once its head is here.

        Raises Unavailable (no connection) or DeadlineExceeded; HTTP error statuses are returned, not raised. A
        request on a kept-alive connection that the server had closed is sent once more, if its body can be; a POST
        always gets a new connection, because sending it twice could do its work twice.
        """
        target = self._prefix + path + (f"?{urlencode(params)}" if params else "")
        deadline = Deadline.after(timeout_s or self.timeout_s)
        asked = _Request(self, method, target, self._headers(headers or {}), body, deadline, watch or Watch())
        return asked.answer()

    def ranges(self, path: str, spans: Sequence[range], *, timeout_s: float, watch: Watch) -> list[Response]:
        """Ask for ranges of one thing at the same time, on a connection each; the answers once all heads are here.

        Fails as ``request`` does, as a whole.
        """
        deadline = Deadline.after(timeout_s)
        out: list[Response] = []
        with contextlib.ExitStack() as undo:
            asked = []
            for span in spans:
                headers = self._headers({"range": f"bytes={span.start}-{span.stop - 1}"})
                request = _Request(self, "GET", self._prefix + path, headers, None, deadline, watch)
                undo.callback(request.drop)
                asked.append(request)
                request.send()
            for request in asked:
                out.append(request.answer())
            undo.pop_all()
        return out

    def _may_lead(self, sock: socket.socket) -> bool:
        return self._admits is None or self._admits(sock.getpeername()[0])

    def _headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        token, own = self._token(), {} if self._secure else self._at_proxy
        return {**own, **headers} if token is None else {**own, "authorization": f"Bearer {token}", **headers}

    def warm(self, count: int) -> None:
        """Open connections until so many are idle, all at once; where that fails requests will find out why."""
        with self._lock:
            missing = min(count, self._max_idle) - len(self._idle)
        if missing <= 0 or self.base.startswith("unix:"):
            return
        until = time.monotonic() + CONNECT_S
        with contextlib.ExitStack() as undo, contextlib.suppress(OSError):
            host, port = self._parts.hostname or "", self._parts.port or (443 if self._secure else 80)
            family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            poller, waiting = select.poll(), {}
            for _ in range(missing):
                sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, number)
                undo.callback(sock.close)
                sock.connect_ex(address)
                waiting[sock.fileno()] = sock
                poller.register(sock, select.POLLOUT)
            while waiting and (left := until - time.monotonic()) > 0:
                for fd, _ in poller.poll(left * 1000):
                    poller.unregister(fd)
                    self._adopt(waiting.pop(fd), until)

    def _adopt(self, sock: socket.socket, until: float) -> None:
        """Keep a connection that ``warm`` opened, unless it failed."""
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            return
        connection = self._new(CONNECT_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        own = socket.socket(fileno=sock.detach())
        try:
            own.settimeout(max(0.01, until - time.monotonic()))
            if isinstance(connection, http.client.HTTPSConnection):
                context = connection._context  # type: ignore[attr-defined]
                own = context.wrap_socket(own, server_hostname=self._parts.hostname)
        except OSError:
            own.close()
            raise
        connection.sock = own
        self._give(connection, self._may_lead(own))

    def json(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: Any = None,
        timeout_s: float | None = None,
    ) -> Any:
        """Send and receive JSON; an error answer is raised as the HeliosError it describes."""
        return json.loads(self.bytes(method, path, params=params, body=body, timeout_s=timeout_s) or b"null")

    def bytes(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: Any = None,
        timeout_s: float | None = None,
        limit: int = MAX_ANSWER,
    ) -> bytes:
        """Like ``json``, returning the answer's bytes; more than ``limit`` raise IntegrityError."""
        data = None if body is None else json.dumps(body).encode()
        headers = {} if data is None else {"content-type": "application/json"}
        with self.request(method, path, params=params, headers=headers, body=data, timeout_s=timeout_s) as response:
            content = response.read(limit)
        if response.status >= 400:
            raise error_of(response.status, content, f"{method} {path}")
        return content

    def close(self) -> None:
        """Close the connections, those still in use when their answer ends."""
        with self._lock:
            self._max_idle = 0
            idle, self._idle = self._idle, []
        for connection, _ in idle:
            connection.close()

    @property
    def _secure(self) -> bool:
        return self._parts.scheme == "https"

    def _take(self, deadline: Deadline, fresh: bool) -> tuple[http.client.HTTPConnection, bool]:
        """A connection, and whether it was used before."""
        while not fresh:
            with self._lock:
                if not self._idle:
                    break
                connection, since = self._idle.pop()
            if time.monotonic() - since < IDLE_S and _quiet(connection.sock):
                return connection, True
            connection.close()
        return self._new(deadline.left()), False

    def _new(self, timeout_s: float) -> http.client.HTTPConnection:
        timeout_s = min(timeout_s, CONNECT_S)
        if self.base.startswith("unix:"):
            return _UnixConnection(self.base.removeprefix("unix:"), timeout_s)
        host, port = self._parts.hostname or "", self._parts.port
        if self._proxy is not None:
            host, port = self._proxy.hostname or "", self._proxy.port or 3128
        connection = (
            http.client.HTTPSConnection(host, port, timeout=timeout_s, context=self._context, blocksize=BLOCK)
            if self._secure
            else http.client.HTTPConnection(host, port, timeout=timeout_s, blocksize=BLOCK)
        )
        if self._proxy is not None and self._secure:
            connection.set_tunnel(self._parts.hostname or "", self._parts.port or 443, self._at_proxy)
        return connection

    def _give(self, connection: http.client.HTTPConnection, ok: bool) -> None:
        with self._lock:
            if ok and len(self._idle) < self._max_idle:
                self._idle.append((connection, time.monotonic()))
                return
        connection.close()


class _Request:
    """One request on its way: sent on a connection, answered there, once more on another where it was a stale one."""

    def __init__(
        self,
        client: HttpClient,
        method: str,
        target: str,
        headers: dict[str, str],
        body: Body,
        deadline: Deadline,
        watch: Watch,
    ) -> None:
        self._client, self._method, self._target, self._headers = client, method, target, headers
        self._body, self._deadline, self._watch = body, deadline, watch
        self._connection: http.client.HTTPConnection | None = None
        self._sock: socket.socket | None = None
        self._reused = self._cut = False

    def send(self) -> None:
        """Raises like ``HttpClient.request``."""
        while self._connection is None:
            connection, self._reused = self._client._take(self._deadline, fresh=self._method == "POST")
            self._connection, self._cut = connection, False
            with self._failing():
                if connection.sock is None:
                    self._connect(connection)
                self._sock = connection.sock
                self._watch.enter(self._sock)
                self._sock.settimeout(self._deadline.left())
                connection.response_class = partial(Answer, self._deadline)  # type: ignore[assignment]
                try:
                    connection.request(self._method, self._target, body=self._body, headers=self._headers)
                except (BrokenPipeError, ConnectionResetError):
                    # Who refuses a body answers before all of it was sent, and closes: the answer says why.
                    self._cut = True

    def _connect(self, connection: http.client.HTTPConnection) -> None:
        connection.connect()
        if not self._client._may_lead(connection.sock):
            connection.close()
            raise Unavailable(f"{self._client.base} is no place that a registry may send anybody to")

    def answer(self) -> Response:
        """The answer, once its head is here. Raises like ``HttpClient.request``."""
        while True:
            self.send()
            connection, sock = self._connection, self._sock
            if connection is None or sock is None:
                continue
            raw = None
            with self._failing():
                raw = connection.getresponse()
            if isinstance(raw, Answer):
                return Response(raw, self._deadline, sock, self._watch, self._done)

    def drop(self) -> None:
        """Nobody reads the answer, or what is left of it."""
        self._done(False)

    def _done(self, ok: bool) -> None:
        connection, self._connection = self._connection, None
        if self._sock is not None:
            self._watch.leave(self._sock)
            self._sock = None
        if connection is not None:
            self._client._give(connection, ok and not self._cut)

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Swallow the end of a stale connection, so that the request is sent again; other failures are told."""
        base, what = self._client.base, f"{self._method} {self._target.partition('?')[0]}"
        try:
            yield
        except TimeoutError:
            connected = self._sock is not None
            self.drop()
            if not connected and self._deadline.at > time.monotonic():
                raise Unavailable(f"{base} can't be reached: no connection after {CONNECT_S:g} s") from None
            raise DeadlineExceeded(f"{base} did not answer {what} in time") from None
        except (OSError, http.client.HTTPException) as error:
            self.drop()
            if not self._reused or not (self._body is None or isinstance(self._body, bytes)):
                raise Unavailable(f"{base} can't be reached: {error!r}") from None
        except BaseException:  # the body's own error: half a request has left
            self.drop()
            raise


def _proxy_login(proxy: SplitResult) -> dict[str, str]:
    """The header with the name and password in a proxy's address (RFC 7617), percent-encoded there; none without."""
    if proxy.username is None:
        return {}
    login = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"proxy-authorization": f"Basic {b64encode(login.encode()).decode()}"}


def _quiet(sock: socket.socket) -> bool:
    """Whether an idle connection is still open, as far as is known: a server that closed it made it readable.

    A TLS connection may have been sent tickets meanwhile, so nothing is known of it.
    """
    if isinstance(sock, ssl.SSLSocket):
        return True
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    return not poller.poll(0)


def error_of(status: int, content: bytes, where: str) -> HeliosError:
    """The error in an API's answer: ``{"error": {"code", "message", "hint"}}``."""
    try:
        error = json.loads(content)["error"]
        return from_code(error["code"], error["message"], error.get("hint"))
    except (ValueError, KeyError, TypeError):
        return Unavailable(f"{where}: status {status}: {content[:200].decode(errors='replace')}")
