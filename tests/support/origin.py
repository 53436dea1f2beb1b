"""A registry's native API for chosen blobs, over real sockets, with a throttle and faults on demand.

It stands beside the real registry (tests/integration/test_fill_registry.py uses that one): here a test decides where
chunks lie, how fast the link is and what goes wrong. One token bucket is shared by all connections, as a link is.
``requests`` logs what was asked and how many body bytes left.

``python -m tests.support.origin --size N --rate R`` serves one made-up blob from a process of its own, for benchmarks:
it prints a line of JSON that says where and what.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import json
import os
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol
from urllib.parse import parse_qs, urlsplit

from blake3 import blake3

from helios.names import RepoId
from heliosfs.fetch.source import BlobRef
from heliosfs.store import codec
from heliosfs.store.chunking import grid
from heliosfs.store.recipe import MAX_CHUNK, Recipe

REPO = RepoId.parse("test/model")
COMMIT = "c" * 40
SLICE = 64 << 10
"""Bytes between two looks at the throttle."""


class Content(Protocol):
    """A blob's bytes."""

    size: int

    def read(self, offset: int, count: int) -> bytes | memoryview: ...


class Bytes:
    """Content in memory."""

    def __init__(self, data: bytes) -> None:
        self._view = memoryview(data)
        self.size = len(data)

    def read(self, offset: int, count: int) -> memoryview:
        return self._view[offset : offset + count]


class File:
    """Content in a file, sent with sendfile where nothing interferes."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self.fd).st_size

    def read(self, offset: int, count: int) -> bytes:
        return os.pread(self.fd, count, offset)


class Made:
    """Content of any size in 4 MiB of memory: one random block over and over, each copy marked with its number."""

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size = size
        self._block = random.Random(seed).randbytes(MAX_CHUNK)

    def read(self, offset: int, count: int) -> bytes:
        out = bytearray()
        while len(out) < count:
            number, start = divmod(offset + len(out), MAX_CHUNK)
            block = self._block
            if start < 8:
                block = number.to_bytes(8, "little") + self._block[8:]
            out += memoryview(block)[start : start + count - len(out)]
        return bytes(out)


class Throttle:
    """At most ``rate`` bytes a second over all users; None: no limit. First come, first served in small slices."""

    def __init__(self, rate: float | None) -> None:
        self.rate = rate
        self._lock = threading.Lock()
        self._next = 0.0

    def wait(self, count: int) -> None:
        if self.rate is None:
            return
        with self._lock:
            self._next = max(self._next, time.monotonic()) + count / self.rate
            until = self._next
        time.sleep(max(0.0, until - time.monotonic()))


@dataclass
class Request:
    """What was asked. ``sent`` counts body bytes; ``span`` is the range as (first, last); ``ended`` is when all was
    sent."""

    path: str
    query: dict[str, str]
    span: tuple[int, int] | None
    at: float
    sent: int = 0
    status: int = 0
    ended: float = float("inf")


Kind = Literal["status", "truncate", "reset", "corrupt", "stall"]


@dataclass
class Fault:
    """Something to go wrong with requests that ``match``, ``times`` times (None: always).

    ``status``: answer with ``status``. The others after ``after`` body bytes: ``truncate`` closes, ``reset`` resets the
    connection, ``corrupt`` flips a bit, ``stall`` sends nothing more until the origin ends.
    """

    kind: Kind
    match: Callable[[Request], bool]
    times: int | None = 1
    after: int = 0
    status: int = 503
    hits: int = 0


@dataclass
class _Object:
    """Bytes of the blob, or of ``content``, from ``start``, behind ``lead`` bytes of something else."""

    start: int
    count: int
    lead: int
    content: Content | None = None


@dataclass
class _Blob:
    content: Content
    recipe: Recipe
    runs: list[tuple[int, int, str]]  # first chunk, count, object
    objects: dict[str, _Object] = field(default_factory=dict)
    version: int = 1
    encoded: dict[str, tuple[str, list[int]]] = field(default_factory=dict)  # object -> codec, encoded lengths


class Origin:
    """The server; a context manager. ``rate`` in bytes a second for all connections together.

    ``delay_s``: how long each answer takes to begin, as over a long link.
    """

    def __init__(self, rate: float | None = None, lease_s: float = 300.0) -> None:
        self.throttle, self.lease_s, self.delay_s = Throttle(rate), lease_s, 0.0
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.old = False
        """Answer as a registry that does not know the call for a whole commit."""
        self._blobs: dict[str, _Blob] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._listener: socket.socket | None = None
        self._connections: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self.url = ""

    # --- content ---

    def add(
        self,
        content: Content | bytes,
        path: str = "model.safetensors",
        *,
        cuts: Sequence[int] | None = None,
        spread: int = 0,
        named: str | None = None,
    ) -> BlobRef:
        """Serve a blob. ``cuts`` are its chunks' lengths (a 4 MiB grid by default); a liar's is ``named`` by another's
        sha256.

        With ``spread`` its chunks lie in packs of that many, each in an object of its own behind other bytes; else it
        is one object.
        """
        content = Bytes(content) if isinstance(content, bytes) else content
        sha256 = hashlib.sha256()
        chunks = []
        offset = 0
        for length in grid(0, content.size) if cuts is None else cuts:
            data = content.read(offset, length)
            sha256.update(data)
            chunks.append((blake3(data).digest(), length))
            offset += length
        assert offset == content.size
        recipe = Recipe.build(named or sha256.hexdigest(), chunks)
        blob = _Blob(content, recipe, [])
        step = spread or max(1, len(recipe))
        for first in range(0, len(recipe), step):
            count = min(step, len(recipe) - first)
            name = f"public/packs/{len(self._blobs)}-{first}" if spread else f"public/blobs/{recipe.blob}"
            start, end = recipe.span(first)[0], recipe.span(first + count - 1)[1]
            blob.runs.append((first, count, name))
            blob.objects[name] = _Object(start, end - start, 1000 + first if spread else 0)
        with self._lock:
            self._blobs[recipe.blob] = blob
        return BlobRef(REPO, COMMIT, path, recipe.blob, recipe.size, recipe.digest)

    def recipe(self, want: BlobRef) -> Recipe:
        return self._blobs[want.sha256].recipe

    def data(self, want: BlobRef, offset: int, count: int) -> bytes:
        """What a reader must get."""
        content = self._blobs[want.sha256].content
        return bytes(content.read(offset, max(0, min(count, content.size - offset))))

    def encode(
        self, want: BlobRef, name: str, change: Callable[[int, bytes], bytes] = lambda _index, data: data
    ) -> None:
        """Have the blob's chunks lie in an object, in the codec ``name``. ``change`` makes of a chunk's number and its
        encoded bytes what is served in their place: for a hostile registry."""
        with self._lock:
            blob = self._blobs[want.sha256]
        parts = []
        for index in range(len(blob.recipe)):
            start, end = blob.recipe.span(index)
            data = codec.encode(name, bytes(blob.content.read(start, end - start)))
            assert data is not None, "a chunk that can't be encoded"
            parts.append(change(index, data))
        stored, key = Bytes(b"".join(parts)), f"public/packs/{name}-{want.sha256}"
        with self._lock:
            blob.version += 1
            blob.runs, blob.objects = [(0, len(parts), key)], {key: _Object(0, stored.size, 32, stored)}
            blob.encoded = {key: (name, list(map(len, parts)))}

    def move(self, want: BlobRef) -> None:
        """Rename the blob's objects: the old ones are gone, the placement says where the new ones are."""
        with self._lock:
            blob = self._blobs[want.sha256]
            blob.version += 1
            blob.runs = [(first, count, f"{name}-v{blob.version}") for first, count, name in blob.runs]
            blob.objects = {f"{name}-v{blob.version}": where for name, where in blob.objects.items()}

    def shuffle(self, want: BlobRef) -> None:
        """Put other bytes under the blob's objects: an old placement now reads the wrong ones."""
        with self._lock:
            blob = self._blobs[want.sha256]
            blob.version += 1
            objects = {}
            for name, where in blob.objects.items():
                objects[f"{name}-v{blob.version}"] = where
                objects[name] = _Object(where.start, where.count + 1, where.lead + 1)
            blob.runs = [(first, count, f"{name}-v{blob.version}") for first, count, name in blob.runs]
            blob.objects = objects

    # --- faults and what was seen ---

    def fault(
        self,
        kind: Kind,
        match: Callable[[Request], bool] | str = "/objects/",
        *,
        times: int | None = 1,
        after: int = 0,
        status: int = 503,
    ) -> Fault:
        """Let something go wrong; a text matches requests whose path holds it."""
        part = match
        wanted = (lambda request: part in request.path) if isinstance(part, str) else part
        fault = Fault(kind, wanted, times, after, status)
        with self._lock:
            self.faults.append(fault)
        return fault

    def spans(self, since: int = 0) -> list[tuple[int, int]]:
        """Ranges of objects asked for, in order: (offset, length)."""
        with self._lock:
            asked = self.requests[since:]
        return [(r.span[0], r.span[1] - r.span[0] + 1) for r in asked if r.span is not None]

    def sent(self) -> int:
        """Object bytes that left."""
        with self._lock:
            return sum(r.sent for r in self.requests if "/objects/" in r.path)

    def settled(self) -> int:
        """Object bytes that left, once nothing more is leaving: given-up reads end with their chunk."""
        while True:
            sent = self.sent()
            time.sleep(0.3)
            if self.sent() == sent:
                return sent

    def count(self, part: str) -> int:
        """Requests whose path holds the text."""
        with self._lock:
            return sum(part in r.path for r in self.requests)

    # --- the server ---

    def __enter__(self) -> Origin:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        thread = threading.Thread(target=self._accept, args=(self._listener,), daemon=True)
        self._threads.append(thread)
        thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        assert self._listener is not None
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    def _accept(self, listener: socket.socket) -> None:
        while not self._stop.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._connections.add(connection)
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            buffer = b""
            while not self._stop.is_set():
                while b"\r\n\r\n" not in buffer:
                    data = connection.recv(SLICE)
                    if not data:
                        return
                    buffer += data
                head, _, buffer = buffer.partition(b"\r\n\r\n")
                if not self._answer(connection, head.decode("latin-1")):
                    return
        except OSError:
            return  # the client left
        finally:
            with self._lock:
                self._connections.discard(connection)
            connection.close()

    def _answer(self, connection: socket.socket, head: str) -> bool:
        """Answer one request; returns whether the connection stays."""
        lines = head.split("\r\n")
        target = urlsplit(lines[0].split(" ")[1])
        ranged = re.search(r"(?im)^range: bytes=(\d+)-(\d+)$", "\n".join(lines[1:]))
        span = (int(ranged[1]), int(ranged[2])) if ranged else None
        query = {key: values[0] for key, values in parse_qs(target.query).items()}
        request = Request(target.path, query, span, time.monotonic())
        with self._lock:
            self.requests.append(request)
            fault = next((f for f in self.faults if (f.times is None or f.hits < f.times) and f.match(request)), None)
            if fault is not None:
                fault.hits += 1
        self._stop.wait(self.delay_s)
        if fault is not None and fault.kind == "status":
            return self._small(
                connection, request, fault.status, b'{"error": {"code": "Unavailable", "message": "no"}}'
            )
        if target.path.startswith("/api/v1/objects/"):
            stays = self._object(connection, request, target.path.removeprefix("/api/v1/objects/"), fault)
            request.ended = time.monotonic()
            return stays
        whole = target.path == "/api/v1/content" and not self.old
        with self._lock:
            blob = next(iter(self._blobs.values()), None) if whole else self._blobs.get(query.get("blob", ""))
        if blob is None or query.get("repo") != str(REPO):
            error = {"error": {"code": "EntryNotFound", "message": "no such blob"}}
            return self._small(connection, request, 404, json.dumps(error).encode())
        body = blob.recipe.encode() if target.path == "/api/v1/recipe" else self._placement(blob)
        body = self._content() if whole else body
        if fault is not None:
            return self._body(connection, request, 200, iter([body]), len(body), fault)
        return self._small(connection, request, 200, body)

    def _content(self) -> bytes:
        with self._lock:
            blobs = list(self._blobs.values())
        told = [
            {"recipe": base64.b64encode(b.recipe.encode()).decode(), "placement": json.loads(self._placement(b))}
            for b in blobs
        ]
        return json.dumps({"format": 1, "blobs": told}).encode()

    def _placement(self, blob: _Blob) -> bytes:
        with self._lock:
            names = [name for _, _, name in blob.runs]
            objects = [
                {
                    "key": name,
                    "url": f"/api/v1/objects/{name}",
                    "size": blob.objects[name].lead + blob.objects[name].count,
                }
                for name in names
            ]
            runs: list[dict[str, object]] = []
            for number, (first, count, name) in enumerate(blob.runs):
                how, lengths = blob.encoded.get(name, ("none", None))
                where = {"first": first, "count": count, "object": number, "offset": blob.objects[name].lead}
                runs.append({**where, "codec": how, "encoded": lengths})
            placement = {"blob": blob.recipe.blob, "version": blob.version, "lease_s": self.lease_s}
            return json.dumps({**placement, "objects": objects, "runs": runs}).encode()

    def _object(self, connection: socket.socket, request: Request, key: str, fault: Fault | None) -> bool:
        with self._lock:
            found = next(((b, b.objects[key]) for b in self._blobs.values() if key in b.objects), None)
        if found is None:
            error = {"error": {"code": "NotFound", "message": f"no object {key}"}}
            return self._small(connection, request, 404, json.dumps(error).encode())
        assert request.span is not None, "objects are asked for in ranges"
        blob, where = found
        first, last = request.span
        if last >= where.lead + where.count:
            return self._small(connection, request, 416, b"")
        offset, count = where.start + first - where.lead, last - first + 1
        if where.content is not None:
            return self._body(connection, request, 206, _slices(where.content, offset, count), count, fault)
        if isinstance(blob.content, File) and self.throttle.rate is None and fault is None:
            return self._sendfile(connection, request, blob.content.fd, offset, count)
        return self._body(connection, request, 206, _slices(blob.content, offset, count), count, fault)

    def _small(self, connection: socket.socket, request: Request, status: int, body: bytes) -> bool:
        request.status = status
        self.throttle.wait(len(body))
        connection.sendall(_head(status, len(body)) + body)
        return True

    def _sendfile(self, connection: socket.socket, request: Request, fd: int, offset: int, count: int) -> bool:
        request.status = 206
        connection.sendall(_head(206, count))
        while request.sent < count:
            request.sent += os.sendfile(connection.fileno(), fd, offset + request.sent, count - request.sent)
        return True

    def _body(
        self,
        connection: socket.socket,
        request: Request,
        status: int,
        slices: Iterator[bytes | memoryview],
        count: int,
        fault: Fault | None,
    ) -> bool:
        request.status = status
        connection.sendall(_head(status, count))
        for data in slices:
            piece = data
            if fault is not None and request.sent + len(piece) > fault.after:
                if fault.kind == "corrupt":
                    at = max(0, fault.after - request.sent)
                    piece = bytes(piece[:at]) + bytes([piece[at] ^ 1]) + bytes(piece[at + 1 :])
                    fault = None
                else:
                    piece = piece[: fault.after - request.sent]
            self.throttle.wait(len(piece))
            connection.sendall(piece)
            request.sent += len(piece)
            if fault is not None and request.sent >= fault.after and fault.kind != "corrupt":
                if fault.kind == "stall":
                    self._stop.wait(600)
                if fault.kind == "reset":
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return False
        return True


def _slices(content: Content, offset: int, count: int) -> Iterator[bytes | memoryview]:
    for at in range(offset, offset + count, SLICE):
        yield content.read(at, min(SLICE, offset + count - at))


def _head(status: int, count: int) -> bytes:
    return f"HTTP/1.1 {status} X\r\ncontent-length: {count}\r\n\r\n".encode()


def main() -> None:
    """Serve one blob until stdin is closed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=0, help="bytes of made-up content")
    parser.add_argument("--file", type=Path, help="serve this file instead")
    parser.add_argument("--rate", type=float, help="bytes a second, all connections together")
    args = parser.parse_args()
    with Origin(args.rate) as origin:
        want = origin.add(File(args.file) if args.file else Made(args.size))
        fields = {name: getattr(want, name) for name in ("commit", "path", "sha256", "size", "recipe_digest")}
        print(json.dumps({"url": origin.url, "repo": REPO.id, **fields}), flush=True)
        os.read(0, 1)


if __name__ == "__main__":
    main()
