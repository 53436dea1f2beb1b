"""The blocking client's answers: read under a deadline, into the caller's buffers, while another thread may look on."""

from __future__ import annotations

import contextlib
import http.client
import io
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Final

from helios.errors import DeadlineExceeded, IntegrityError, Unavailable

WAKE: Final = 256 << 10
"""While a body comes fast, its reader is woken for so many bytes at a time: not for every packet."""

FAST: Final = 10e6
"""It comes fast at so many bytes a second: then nobody sees the difference."""


MAX_LINE: Final = 16 << 20
"""Longest line of a streamed answer, in bytes."""


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


class Watch:
    """What a thread is doing on the network, for another thread to look at: bytes so far, and a way to end it.

    Handed to ``HttpClient.request``. Once ``cut``, the answers under way and all later requests fail with Unavailable.
    """

    def __init__(self) -> None:
        self.received = 0
        """Bytes of bodies that came; written by one thread at a time."""
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._cut = False

    def cut(self) -> None:
        """End what is under way: whoever waits for bytes stops waiting. Any thread, any number of times."""
        with self._lock:
            self._cut = True
            for sock in self._sockets:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def enter(self, sock: socket.socket) -> None:
        """The socket is in use for us. Raises Unavailable after ``cut``."""
        with self._lock:
            if self._cut:
                raise Unavailable("given up")
            self._sockets.add(sock)

    def leave(self, sock: socket.socket) -> None:
        """The socket may now be used for something else, or closed."""
        with self._lock:
            self._sockets.discard(sock)


class _Timely(io.RawIOBase):
    """A socket's bytes, none of them after the deadline: not even when a head or a chunk's length trickles in."""

    def __init__(self, sock: socket.socket, deadline: Deadline) -> None:
        self._sock, self._deadline = sock, deadline
        self._raw = sock.makefile("rb", buffering=0)
        self.waits = True
        """Whether a read waits for bytes; else there are none when none are here."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(self._deadline.left() if self.waits else 0)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class Answer(http.client.HTTPResponse):
    """Reads with a deadline."""

    def __init__(self, deadline: Deadline, sock: socket.socket, **options: Any) -> None:
        super().__init__(sock, **options)
        self.fp.close()
        self.timely = _Timely(sock, deadline)
        self.fp = io.BufferedReader(self.timely)


class Response:
    """An answer whose body is still to be read; leaving the context returns the connection to the pool."""

    def __init__(
        self,
        raw: Answer,
        deadline: Deadline,
        sock: socket.socket,
        watch: Watch,
        done: Callable[[bool], None],
    ):
        self._raw, self._deadline, self._sock, self._watch, self._done = raw, deadline, sock, watch, done
        self.status = raw.status
        self.headers = raw.headers
        self._wake = 1 if sock.family in (socket.AF_INET, socket.AF_INET6) else 0  # 0: it can't be set

    def __enter__(self) -> Response:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._done(kind is None and self._raw.isclosed() and not self._raw.will_close)

    def read_into(self, buffer: memoryview) -> None:
        """Fill the buffer from the body; a body that ends early raises IntegrityError."""
        filled = self._fill(buffer)
        if filled < len(buffer):
            raise IntegrityError(f"the answer ended after {filled} of {len(buffer)} bytes")

    def fileno(self) -> int:
        """The socket's descriptor, while the body is not at its end."""
        return self._sock.fileno()

    def wait(self, on: bool) -> None:
        """Whether ``read_ready`` waits for bytes."""
        self._raw.timely.waits = on

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
        """Lines of a streamed body as they come. Raises IntegrityError for one that is too long."""
        while True:
            line = self._guard(partial(self._raw.readline, MAX_LINE + 1))
            if len(line) > MAX_LINE:
                raise IntegrityError(f"a line of the answer has more than {MAX_LINE} bytes")
            if not line:
                return
            yield line.rstrip(b"\n")

    def _fill(self, view: memoryview) -> int:
        filled, before, fast = 0, time.monotonic(), False
        while filled < len(view):
            self._wake_for(min(WAKE, len(view) - filled) if fast else 1)
            count: int = self._guard(partial(self._read_once, view[filled:]))
            if not count:
                break
            filled += count
            self._watch.received += count
            now = time.monotonic()
            before, fast = now, count >= FAST * (now - before)
        self._wake_for(1)
        return filled

    def _wake_for(self, count: int) -> None:
        """Let ``recv`` wait until so many bytes are here, or the end."""
        if self._wake and count != self._wake and self._sock.fileno() >= 0:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)
            self._wake = count

    def _read_once(self, view: memoryview) -> int | None:
        """Like the response's ``readinto``, but one recv(2) at most where the length is known."""
        raw = self._raw
        if raw.chunked or raw.length is None or raw.isclosed():
            return raw.readinto(view)
        count: int | None = raw.fp.readinto1(view[: raw.length])
        if count is None:  # the socket does not block, and nothing is here
            return None
        raw.length -= count
        if not count or not raw.length:
            raw._close_conn()  # type: ignore[attr-defined]
        return count

    def read_ready(self, view: memoryview) -> int | None:
        """What is here now, at most the view; 0 at the end, None when nothing is here yet."""
        try:
            count: int | None = self._guard(partial(self._read_once, view))
        except ssl.SSLWantReadError:
            return None
        self._watch.received += count or 0
        return count

    def _guard(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except TimeoutError:
            raise DeadlineExceeded("the answer stalled") from None
        except ssl.SSLWantReadError:
            raise
        except (OSError, http.client.HTTPException) as error:
            raise Unavailable(f"the connection broke: {error!r}") from None


def read_together(parts: Sequence[tuple[Response, memoryview]], seconds: float) -> Iterator[int]:
    """Fill each buffer from its answer, taking from whichever has something: many connections, one thread.

    Yields, whenever it grows, how many bytes are here from the first buffer's start on without a gap; at last all.
    Raises Unavailable for an answer that ends early, DeadlineExceeded when not all is here after ``seconds``.
    """
    deadline = Deadline.after(seconds)
    left = [view for _, view in parts]
    numbers = {response.fileno(): number for number, (response, view) in enumerate(parts) if view}
    poller = select.poll()
    for fd, number in numbers.items():
        parts[number][0].wait(False)
        poller.register(fd, select.POLLIN)
    ready = list(numbers)  # what came with a head is in no socket any more
    told = front = before = 0
    while numbers:
        for fd in ready:
            number = numbers[fd]
            response, view = parts[number][0], left[number]
            count = response.read_ready(view)
            if count is None:
                continue
            if not count:
                raise Unavailable(f"an answer ended {len(view)} bytes early")
            left[number] = view[count:]
            if count == len(view):
                poller.unregister(fd)
                response.wait(True)
                del numbers[fd]
        while front < len(parts) and not left[front]:
            before += len(parts[front][1])
            front += 1
        here = before + (len(parts[front][1]) - len(left[front]) if front < len(parts) else 0)
        if here > told:
            told = here
            yield here
        ready = [fd for fd, _ in poller.poll(deadline.left() * 1000)] if numbers else []
