"""A process that lays a blob out with hf-xet: the blob comes on standard input, its layout goes to standard output.

    python -m registry.xet.cutter SHA256 SIZE      (in an empty directory of its own)

hf-xet cuts what it uploads into chunks and xorbs. So the blob is "uploaded", uncompressed, to a server in this very
process, on a unix socket: it throws the xorbs away and keeps the shards, which say what they were. Only documented
calls are used (draft-denis-xet-03: ``POST /v1/xorbs``, ``POST /v1/shards``); nothing but shards touches the disk. That
the shards say the truth is checked with the protocol's own hashes: a file's is the root of a tree over all its chunks.
"""

from __future__ import annotations

import os
import socketserver
import sys
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Final

from helios.errors import HeliosError, IntegrityError
from registry.xet.hashes import Chunk, file_hash, from_text, xorb_hash
from registry.xet.layout import Layout
from registry.xet.shard import Shards

SOCKET: Final = "cas.sock"
PIECE: Final = 1 << 20
NICE: Final = 19
SHARD_LIMIT: Final = 256 << 20
"""Longest shard taken, in bytes; hf-xet makes them up to 64 MiB."""

SETTINGS: Final = {
    "xorb.compression_policy": "none",
    "deduplication.global_dedup_query_enabled": False,
    "telemetry.enabled": False,
    "client.unix_socket_path": SOCKET,
    "client.shard_api_version": 1,
    "client.legacy_direct_xorb_upload": True,
    "client.ac_max_upload_concurrency": 2,
}
"""Of hf-xet. The last one bounds how many xorbs of up to 64 MiB it holds."""


class Sink(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """The server: xorbs are read and dropped, shards are kept."""

    daemon_threads = True

    def __init__(self, shards: Shards, handler: type[Upload]) -> None:
        self.shards = shards
        self.lock = threading.Lock()
        super().__init__(SOCKET, handler)

    def get_request(self) -> tuple[Any, Any]:
        request, _ = super().get_request()
        return request, ("hf-xet", 0)


class Upload(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Sink

    def do_POST(self) -> None:
        left = int(self.headers.get("content-length", "0"))
        if self.path.startswith("/v1/xorbs/"):
            self.take(self.path.rpartition("/")[2], left)
            self._answer(200, b'{"was_inserted": true}')
        elif self.path == "/v1/shards" and left <= SHARD_LIMIT:
            data = self.rfile.read(left)
            with self.server.lock:
                self.server.shards.add(data)
            self._answer(200, b'{"result": 1}')
        else:
            self.close_connection = True
            self._answer(404, b"{}")

    def take(self, xorb: str, left: int) -> None:
        """Read a xorb of so many bytes, and drop it."""
        buffer = memoryview(bytearray(1 << 20))
        while left:
            got = self.rfile.readinto(buffer[: min(left, len(buffer))])
            if not got:
                raise ConnectionError("hf-xet broke an upload off")
            left -= got

    def do_GET(self) -> None:
        self._answer(404, b"{}")

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def cut(source: int, size: int, handler: type[Upload] = Upload) -> tuple[bytes, Shards]:
    """Read ``size`` bytes from a descriptor; returns their hash as a file and the shards hf-xet made of them.

    Raises IntegrityError when there are fewer.
    """
    import hf_xet

    shards = Shards()
    with Sink(shards, handler) as sink:
        threading.Thread(target=sink.serve_forever, args=(0.05,), daemon=True).start()
        try:
            session = hf_xet.XetSession(hf_xet.XetConfig().with_config(SETTINGS))
            commit = session.new_upload_commit(endpoint="http://cutter")
            stream = commit.start_upload_stream(sha256=hf_xet.SKIP_SHA256)
            left = size
            while left:
                piece = os.read(source, min(left, PIECE))
                if not piece:
                    raise IntegrityError(f"the blob ended {left} bytes early")
                stream.write(piece)
                left -= len(piece)
            made = stream.finish()
            commit.wait_to_finish()
        finally:
            sink.shutdown()
    return from_text(made.xet_info.hash), shards


def lay_out(blob: str, size: int, file: bytes, shards: Shards) -> Layout:
    """The layout that the shards speak of. Raises IntegrityError when they contradict themselves."""
    terms = shards.files.get(file)
    if terms is None:
        raise IntegrityError(f"hf-xet's shards do not hold the file {file.hex()}")
    numbers: dict[bytes, int] = {}
    chunks: list[Chunk] = []
    for digest, first, stop in terms:
        if digest not in shards.xorbs:
            raise IntegrityError(f"hf-xet's shards do not hold the xorb {digest.hex()}")
        numbers.setdefault(digest, len(numbers))
        chunks += shards.xorbs[digest][first:stop]
    for digest in numbers:
        if xorb_hash(shards.xorbs[digest]) != digest:
            raise IntegrityError(f"the xorb {digest.hex()} has another hash than its chunks give")
    if file_hash(chunks) != file:
        raise IntegrityError(f"the file {file.hex()} has another hash than its chunks give")
    xorbs = [(digest, [length for _, length in shards.xorbs[digest]]) for digest in numbers]
    layout = Layout(blob, file, xorbs, [(numbers[digest], first, stop) for digest, first, stop in terms])
    if layout.size != size:
        raise IntegrityError(f"hf-xet has laid out {layout.size} of {size} bytes")
    return layout


def main(arguments: list[str]) -> int:
    blob, size = arguments[0], int(arguments[1])
    os.nice(NICE)
    try:
        record = lay_out(blob, size, *cut(sys.stdin.fileno(), size)).encode()
    except HeliosError as error:
        print(error.message, file=sys.stderr)
        return 1
    sys.stdout.buffer.write(record)
    sys.stdout.buffer.flush()
    Path(SOCKET).unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
