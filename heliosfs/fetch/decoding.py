"""Encoded chunks as they come from a source: decoded, a few at a time, before they are delivered."""

from __future__ import annotations

import threading
from typing import Final

from helios.errors import DeadlineExceeded, IntegrityError
from heliosfs.fetch.source import CorruptChunk, Deliver
from heliosfs.store.chunks import opened
from heliosfs.store.placement import PlacedBlob, Segment

DECODERS: Final = 4
"""Chunks that are decoded and delivered at a time: each takes 8 MiB beside the buffer that it came in."""


class Decoding:
    """Of one source, which is called ``name``. Threads share it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._turns = threading.BoundedSemaphore(DECODERS)

    def taking(self, placed: PlacedBlob, segment: Segment, deliver: Deliver, timeout_s: float) -> Deliver:
        """What takes the chunks of a segment as they are stored, and delivers them.

        It raises CorruptChunk for one that can't be decoded, DeadlineExceeded after ``timeout_s`` without a turn.
        """
        if segment.plain:
            return deliver

        def take(index: int, data: memoryview) -> None:
            if not self._turns.acquire(timeout=timeout_s):
                raise DeadlineExceeded(f"chunk {index} of {placed.recipe.blob} waited {timeout_s:g} s to be decoded")
            try:
                deliver(index, self._opened(placed, index, data))
            finally:
                self._turns.release()

        return take

    def _opened(self, placed: PlacedBlob, index: int, data: memoryview) -> memoryview:
        try:
            return opened(placed.locate(index), data)
        except IntegrityError as error:
            raise CorruptChunk(index, f"chunk {index} from {self._name}: {error.message}") from error
