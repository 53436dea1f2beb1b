"""A front on loopback before a real registry, which lets answers go wrong as a plan says, request by request.

``Origin`` (origin.py) serves made-up blobs; this one stands before the real thing, so that names, recipes, placements
and objects all pass through. A plan is asked for each request and may say what goes wrong with its answer.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import Final, Literal
from urllib.parse import urlsplit

from tests.support.origin import SLICE

Kind = Literal[
    "status",  # an error answer
    "silent",  # no answer at all
    "stall",  # a part of the answer, then nothing
    "truncate",  # the connection is closed in the middle of the body
    "reset",  # or reset
    "corrupt",  # a bit is flipped, and then one in every page
    "late",  # the answer comes, after a while
    "trickle",  # the head, and from some byte on the body, comes byte by byte
    "shifted",  # other bytes than those that were asked for, said to be the right ones
    "elsewhere",  # the right bytes, said to be others
    "shorter",  # fewer bytes, said so
    "longer",  # more bytes, said so
    "endless",  # a body without a length that never ends
    "chunked",  # the right bytes in a coding without a length
    "redirect",  # to itself
    "unranged",  # status 200, as if no range had been asked for
    "changed",  # what ``change`` makes of the body
    "instead",  # what ``change`` makes of nothing, whatever the true answer would have been
]


REPORTS: Final = "/api/v1/usage/reads"
NEW: Final = b'{"new": true}'


@dataclass(frozen=True)
class Strike:
    """What goes wrong with one answer; ``after`` so many bytes of the body, where that matters."""

    kind: Kind
    after: int = 0
    status: int = 503
    wait_s: float = 0.5
    change: Callable[[bytes], bytes] = bytes


@dataclass(frozen=True)
class Asked:
    """A request: its number, path with query, and headers in lower case."""

    number: int
    path: str
    headers: Mapping[str, str]


Plan = Callable[[Asked], Strike | None]


def nothing(asked: Asked) -> Strike | None:
    """The plan under which nothing goes wrong."""
    return None


class Front:
    """Serves what ``target`` (an http URL) serves; a context manager. ``plan`` may be changed at any time."""

    def __init__(self, target: str, plan: Plan = nothing) -> None:
        parts = urlsplit(target)
        self._target = (parts.hostname or "", parts.port or 80)
        self.plan = plan
        self.struck: Counter[str] = Counter()
        self.asked: list[Asked] = []
        self.url = ""
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Front:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._start(self._accept)
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        with self._lock:
            sockets = [self._listener, *self._sockets]
        for each in sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(15)
            assert not thread.is_alive()

    def _start(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._sockets.add(client)
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        upstream = HTTPConnection(*self._target, timeout=30)
        buffer = b""
        try:
            while not self._over.is_set():
                while b"\r\n\r\n" not in buffer:
                    data = client.recv(SLICE)
                    if not data:
                        return
                    buffer += data
                head, _, buffer = buffer.partition(b"\r\n\r\n")
                lines = head.decode("latin-1").split("\r\n")
                method, path, _ = lines[0].split(" ")
                headers = {key.lower(): value.strip() for key, _, value in (line.partition(":") for line in lines[1:])}
                if (method, path) == ("POST", REPORTS):  # what was read is told when the reading is over
                    while len(buffer) < int(headers["content-length"]):
                        buffer += client.recv(SLICE)
                    buffer = buffer[int(headers["content-length"]) :]
                    client.sendall(_head(200, {}, len(NEW)) + NEW)
                    continue
                assert method == "GET", "what fetches only reads"
                with self._lock:
                    asked = Asked(len(self.asked), path, headers)
                    self.asked.append(asked)
                strike = self.plan(asked)
                if strike is not None:
                    with self._lock:
                        self.struck[strike.kind] += 1
                if not self._answer(client, upstream, asked, strike):
                    return
        except OSError:
            return  # the client left
        finally:
            upstream.close()
            with self._lock:
                self._sockets.discard(client)
            client.close()

    def _answer(self, client: socket.socket, upstream: HTTPConnection, asked: Asked, strike: Strike | None) -> bool:
        """Returns whether the connection stays."""
        kind = strike.kind if strike is not None else None
        if strike is None or kind is None:
            status, headers, body = self._fetch(upstream, asked)
            client.sendall(_head(status, headers, len(body)) + body)
            return True
        match kind:
            case "status":
                error = {"error": {"code": "Unavailable", "message": "this is a test"}}
                body = json.dumps(error).encode()
                client.sendall(_head(strike.status, {}, len(body)) + body)
                return True
            case "silent":
                return self._hold(client)
            case "late":
                self._over.wait(strike.wait_s)
            case "redirect":
                client.sendall(_head(302, {"location": asked.path}, 0))
                return True
            case "endless":
                return self._endless(client)
            case "instead":
                body = strike.change(b"")
                client.sendall(_head(200, {}, len(body)) + body)
                return True
        status, headers, body = self._fetch(upstream, asked, 7 if kind == "shifted" else 0)
        return self._send(client, strike, status, headers, body)

    def _send(self, client: socket.socket, strike: Strike, status: int, headers: dict[str, str], body: bytes) -> bool:
        after = strike.after % max(1, len(body))
        match strike.kind:
            case "stall":
                client.sendall(_head(status, headers, len(body)) + body[:after])
                return self._hold(client)
            case "truncate" | "reset":
                client.sendall(_head(status, headers, len(body)) + body[:after])
                if strike.kind == "reset":
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return False
            case "corrupt" if body:
                wrong = bytearray(body)
                wrong[after::4096] = bytes(byte ^ 0x10 for byte in wrong[after::4096])
                body = bytes(wrong)
            case "elsewhere" if "content-range" in headers:
                first, last, size = re.findall(r"\d+", headers["content-range"])
                headers["content-range"] = f"bytes {int(first) + 1}-{int(last) + 1}/{size}"
            case "shorter":
                body = body[: len(body) // 2]
            case "changed":
                body = strike.change(body)
            case "longer":
                body += b"x"
            case "unranged":
                status = 200
            case "chunked":
                client.sendall(_head(status, {**headers, "transfer-encoding": "chunked"}, None))
                client.sendall(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n")
                return True
            case "trickle":
                return self._trickle(client, _head(status, headers, len(body)), body, after)
        client.sendall(_head(status, headers, len(body)) + body)
        return True

    def _fetch(self, upstream: HTTPConnection, asked: Asked, shift: int = 0) -> tuple[int, dict[str, str], bytes]:
        """The true answer; with ``shift`` that of a range so many bytes further on, where there are any."""
        headers = {key: value for key, value in asked.headers.items() if key in ("range", "accept")}
        if shift and (span := re.fullmatch(r"bytes=(\d+)-(\d+)", headers.get("range", ""))):
            headers["range"] = f"bytes={int(span[1]) + shift}-{int(span[2]) + shift}"
        for again in (True, False):
            try:
                upstream.request("GET", asked.path, headers=headers)
                response = upstream.getresponse()
                body = response.read()
                break
            except OSError:
                upstream.close()  # a kept connection that the registry had closed
                if not again:
                    raise
        names = ("content-type", "content-range", "accept-ranges")
        return response.status, {name: response.headers[name] for name in names if name in response.headers}, body

    def _hold(self, client: socket.socket) -> bool:
        """Say nothing until the client leaves, or the front ends."""
        while not self._over.is_set():
            client.settimeout(0.2)
            with contextlib.suppress(TimeoutError):
                if not client.recv(1):
                    break
        return False

    def _trickle(self, client: socket.socket, head: bytes, body: bytes, after: int) -> bool:
        client.sendall(head[:20])
        for byte in head[20:]:
            if self._over.wait(0.05):
                return False
            client.sendall(bytes([byte]))
        client.sendall(body[:after])
        for byte in body[after:]:
            if self._over.wait(0.05):
                return False
            client.sendall(bytes([byte]))
        return True

    def _endless(self, client: socket.socket) -> bool:
        client.sendall(_head(200, {"transfer-encoding": "chunked"}, None))
        while not self._over.wait(0.001):
            client.sendall(b"10000\r\n" + bytes(0x10000) + b"\r\n")
        return False


FAULTS: Final[tuple[Kind, ...]] = ("status", "silent", "stall", "truncate", "reset", "corrupt", "late", "trickle")
LIES: Final[tuple[Kind, ...]] = (
    "shifted", "elsewhere", "shorter", "longer", "endless", "chunked", "redirect", "unranged",
)  # fmt: skip


def seeded(seed: int, share: float, kinds: tuple[Kind, ...] = FAULTS, until: float = float("inf")) -> Plan:
    """A plan that lets so large a share of the answers go wrong, each as the seed and its number say."""

    def plan(asked: Asked) -> Strike | None:
        dice = random.Random(f"{seed}:{asked.number}")
        if dice.random() >= share or time.monotonic() >= until:
            return None
        return Strike(
            dice.choice(kinds),
            after=dice.choice((0, 1, 4096, dice.randrange(8 << 20))),
            status=dice.choice((429, 500, 502, 503, 504)),
        )

    return plan


def _head(status: int, headers: Mapping[str, str], length: int | None) -> bytes:
    lines = [f"HTTP/1.1 {status} X", *(f"{key}: {value}" for key, value in headers.items())]
    if length is not None:
        lines.append(f"content-length: {length}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
