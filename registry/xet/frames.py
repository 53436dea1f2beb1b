"""The bytes of a xorb, made from verified parts of a blob's objects while they are sent.

Chunks are some 64 KiB, so one call of sendfile for each, and one for each head, would cost more than copying. Instead a
piece of the xorb is put together in a buffer of the sending thread: heads are written, the data between them comes
with one ``preadv``. What the socket does not take at once is put together again later, unless the thread has done
nothing else meanwhile: so a slow client holds no memory.
"""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import BinaryIO, Final

from helios.http.sendfile import FileEnded
from heliosfs.store.placement import PlacedBlob
from registry.hub.verified import VerifiedReader, Wanted
from registry.xet.layout import HEAD, Xorb

PIECE: Final = 256 << 10
"""Bytes put together at a time."""
IOV_MAX: Final = 1024
"""Most buffers of one ``preadv``."""


@dataclass(frozen=True, slots=True)
class Frames:
    """Bytes ``start`` to ``start + count`` of a xorb as it is served; data byte n lies at ``base + n`` of the file."""

    xorb: Xorb
    start: int
    count: int
    file: BinaryIO
    base: int

    def move(self, sock: int, position: int, most: int) -> int:
        """Send to a socket: see ``helios.http.sendfile.Move``."""
        return os.write(sock, self._piece(position, most))

    def read(self, position: int, most: int) -> bytes:
        """At most ``most`` bytes from ``position`` on."""
        return bytes(self._piece(position, most))

    def _piece(self, position: int, most: int) -> memoryview:
        """Bytes from ``position`` on, in this thread's buffer: what is left of the last piece there, or a new one."""
        thread = _thread
        if thread.made is self and thread.start <= position < thread.stop:
            return thread.buffer[position - thread.start : min(position + most, thread.stop) - thread.start]
        thread.made = None
        view = self._make(position, thread.buffer[: min(most, self.count - position)])
        thread.made, thread.start, thread.stop = self, position, position + len(view)
        return view

    def _make(self, position: int, view: memoryview) -> memoryview:
        """Put a piece together in the buffer; returns how much of it was filled. Raises FileEnded."""
        low, done, data = self.start + position, 0, 0
        xorb = self.xorb
        chunk, origin = xorb.chunk_at(low), 0
        gaps: list[memoryview] = []
        while done < len(view) and len(gaps) < IOV_MAX:
            inside = low + done - xorb.position(chunk)
            if inside < HEAD:
                head = xorb.head(chunk)[inside : inside + len(view) - done]
                view[done : done + len(head)] = head
                done += len(head)
                inside += len(head)
            count = min(xorb.position(chunk + 1) - xorb.position(chunk) - inside, len(view) - done)
            if count and inside >= HEAD:
                if not gaps:
                    origin = xorb.before(chunk) + inside - HEAD
                gaps.append(view[done : done + count])
                done += count
                data += count
            chunk += 1
        if data and (got := os.preadv(self.file.fileno(), gaps, self.base + origin)) < data:
            raise FileEnded(f"the object is {data - got} bytes shorter than was announced")
        return view[:done]


class _Thread(threading.local):
    """A sending thread's buffer, and what is in it: the piece of ``made`` from ``start`` to ``stop``."""

    made: Frames | None = None
    start = 0
    stop = 0

    def __init__(self) -> None:
        self.buffer = memoryview(bytearray(PIECE))


_thread = _Thread()


async def frames(
    reader: VerifiedReader, blob: PlacedBlob, xorb: Xorb, start: int, stop: int, wanted: Wanted
) -> AsyncGenerator[Frames, None]:
    """Bytes ``start`` to ``stop`` of a xorb of the blob; every chunk of the blob that they come from has passed.

    Raises IntegrityError ahead of a part with a damaged one.
    """
    for span in xorb.spans(start, stop):
        at, data, end = span.start, span.data, span.data + span.count
        # A range of a head alone takes a byte of the blob all the same: there has to be a part.
        count = max(span.count, 1)
        async with aclosing(reader.parts(blob, span.offset, span.offset + count, wanted)) as parts:
            async for part in parts:
                base = part.offset - data
                data = min(data + part.count, end)
                upto = span.stop if data == end else xorb.locate(data)
                yield Frames(xorb, at, upto - at, part.file, base)
                at = upto
