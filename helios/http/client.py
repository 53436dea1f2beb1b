"""A small blocking HTTP/1.1 client for worker threads: TCP or unix socket, pooled, every call with a deadline.

Bodies can be read straight into a caller's buffer (``http.client`` over ``readinto`` moves 2.4-2.7 GB/s, as fast as
the Rust clients measured beside it; docs/architecture.md). Threads may share one client.
"""

from __future__ import annotations

import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, BinaryIO
from urllib.parse import urlencode, urlsplit

from helios.errors import DeadlineExceeded, HeliosError, IntegrityError, Unavailable, from_code

Body = bytes | BinaryIO | None

BLOCK = 1 << 18
"""Bytes of a file that are read and sent at a time."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout, blocksize=BLOCK)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


@dataclass(slots=True)
class Deadline:
    """A point in monotonic time."""

    at: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        return cls(time.monotonic() + seconds)

    def left(self) -> float:
        """Seconds left; raises DeadlineExceeded when none are."""
        left = self.at - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded("no answer before the deadline")
        return left


class _Timely(io.RawIOBase):
    """A socket's bytes, none of them after the deadline: not even when a head or a chunk's length trickles in."""

    def __init__(self, sock: socket.socket, deadline: Deadline) -> None:
        self._sock, self._deadline = sock, deadline
        self._raw = sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(self._deadline.left())
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Answer(http.client.HTTPResponse):
    """Reads with a deadline."""

    def __init__(self, deadline: Deadline, sock: socket.socket, **options: Any) -> None:
        super().__init__(sock, **options)
        self.fp.close()
        self.fp = io.BufferedReader(_Timely(sock, deadline))


class Response:
    """An answer whose body is still to be read; leaving the context returns the connection to the pool."""

    def __init__(self, raw: http.client.HTTPResponse, deadline: Deadline, done: Callable[[bool], None]):
        self._raw, self._deadline, self._done = raw, deadline, done
        self.status = raw.status
        self.headers = raw.headers

    def __enter__(self) -> Response:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._done(kind is None and self._raw.isclosed() and not self._raw.will_close)

    def read_into(self, buffer: memoryview) -> None:
        """Fill the buffer from the body; a body that ends early raises IntegrityError."""
        filled = self._fill(buffer)
        if filled < len(buffer):
            raise IntegrityError(f"the answer ended after {filled} of {len(buffer)} bytes")

    def extend(self, seconds: float) -> None:
        """Let the rest of the body take until ``seconds`` from now: for a long body that keeps coming."""
        self._deadline.at = time.monotonic() + seconds

    def read(self, limit: int | None = None) -> bytes:
        """The whole body; one of more than ``limit`` bytes raises IntegrityError, one that breaks off Unavailable."""
        length = self._raw.length
        if not length:  # none, or unknown: chunked, or until the connection ends
            data: bytes = self._guard(self._raw.read if limit is None else partial(self._raw.read, limit + 1))
            if limit is not None and len(data) > limit:
                raise IntegrityError(f"the answer has more than {limit} bytes")
            return data
        if limit is not None and length > limit:
            raise IntegrityError(f"the answer has {length} bytes, more than {limit}")
        body = bytearray(length)
        filled = self._fill(memoryview(body))
        if filled < length:
            raise Unavailable(f"the answer broke off after {filled} of {length} bytes")
        return bytes(body)

    def lines(self) -> Iterator[bytes]:
        """Lines of a streamed body as they come."""
        while True:
            line = self._guard(self._raw.readline)
            if not line:
                return
            yield line.rstrip(b"\n")

    def _fill(self, view: memoryview) -> int:
        filled = 0
        while filled < len(view):
            count: int = self._guard(partial(self._read_once, view[filled:]))
            if not count:
                break
            filled += count
        return filled

    def _read_once(self, view: memoryview) -> int:
        """Like the response's ``readinto``, but one recv(2) at most where the length is known."""
        raw = self._raw
        if raw.chunked or raw.length is None or raw.isclosed():
            return raw.readinto(view)
        count: int = raw.fp.readinto1(view[: raw.length])
        raw.length -= count
        if not count or not raw.length:
            raw._close_conn()  # type: ignore[attr-defined]
        return count

    def _guard(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except TimeoutError:
            raise DeadlineExceeded("the answer stalled") from None
        except (OSError, http.client.HTTPException) as error:
            raise Unavailable(f"the connection broke: {error!r}") from None


class HttpClient:
    """Requests to one server: ``http://host:port[/prefix]`` or ``unix:/path/to/socket``."""

    def __init__(self, base: str, *, timeout_s: float = 30.0, max_idle: int = 16) -> None:
        self.base, self.timeout_s, self._max_idle = base, timeout_s, max_idle
        self._lock = threading.Lock()
        self._idle: list[http.client.HTTPConnection] = []
        self._prefix = "" if base.startswith("unix:") else urlsplit(base).path.rstrip("/")

    def request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: Body = None,
        timeout_s: float | None = None,
    ) -> Response:
        """Send a request and return the answer once its head is here.

        Raises Unavailable (no connection) or DeadlineExceeded; HTTP error statuses are returned, not raised. A
        request on a kept-alive connection that the server had closed is sent once more, if its body can be; a POST
        always gets a new connection, because sending it twice could do its work twice.
        """
        deadline = Deadline.after(timeout_s or self.timeout_s)
        target = self._prefix + path + (f"?{urlencode(params)}" if params else "")
        while True:
            connection, reused = self._take(deadline, fresh=method == "POST")
            try:
                if connection.sock is None:
                    connection.connect()
                connection.sock.settimeout(deadline.left())
                connection.response_class = partial(_Answer, deadline)  # type: ignore[assignment]
                connection.request(method, target, body=body, headers=dict(headers or {}))
                raw = connection.getresponse()
            except TimeoutError:
                connection.close()
                raise DeadlineExceeded(f"{self.base} did not answer {method} {path} in time") from None
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if reused and (body is None or isinstance(body, bytes)):
                    continue
                raise Unavailable(f"{self.base} can't be reached: {error!r}") from None
            except BaseException:  # the body's own error: half a request has left
                connection.close()
                raise
            return Response(raw, deadline, lambda ok, c=connection: self._give(c, ok))  # type: ignore[misc]

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
        limit: int | None = None,
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
        for connection in idle:
            connection.close()

    def _take(self, deadline: Deadline, fresh: bool) -> tuple[http.client.HTTPConnection, bool]:
        with self._lock:
            if self._idle and not fresh:
                return self._idle.pop(), True
        if self.base.startswith("unix:"):
            return _UnixConnection(self.base.removeprefix("unix:"), deadline.left()), False
        parts = urlsplit(self.base)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        return kind(parts.hostname or "", parts.port, timeout=deadline.left(), blocksize=BLOCK), False

    def _give(self, connection: http.client.HTTPConnection, ok: bool) -> None:
        with self._lock:
            if ok and len(self._idle) < self._max_idle:
                self._idle.append(connection)
                return
        connection.close()


def error_of(status: int, content: bytes, where: str) -> HeliosError:
    """The error in an API's answer: ``{"error": {"code", "message", "hint"}}``."""
    try:
        error = json.loads(content)["error"]
        return from_code(error["code"], error["message"], error.get("hint"))
    except (ValueError, KeyError, TypeError):
        return Unavailable(f"{where}: status {status}: {content[:200].decode(errors='replace')}")
