"""A ring of staging buffers: host memory through which tensors go to a device while others are being read.

Whoever reads a part takes the buffer that was used longest ago, waits until the copy out of it has ended, fills it,
starts the next copy out of it and puts it back with that copy's event. So reading and copying overlap, nobody waits
for a copy right after having started it, and no buffer is written while a device still reads it.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol

from helios.errors import DeadlineExceeded

POLL_S: Final = 0.0002
"""How often an event that has not happened is looked at, in seconds; a copy of 16 MiB takes about twice this."""


class Event(Protocol):
    """A point in a device's work, such as the end of a copy."""

    def query(self) -> bool:
        """Whether it has been passed. Raises RuntimeError where the device has failed."""


class Device(Protocol):
    """What a GPU does for a loader. Threads use it at the same time."""

    def staging(self, nbytes: int) -> Any:
        """Pinned host memory: a tensor of ``uint8``."""

    def view(self, staging: Any) -> memoryview:
        """The same memory, to be written."""

    def memory(self, nbytes: int) -> Any | None:
        """Memory of the device: a tensor of ``uint8``. None where it has not that much."""

    def upload(self, staging: Any, memory: Any, at: int, nbytes: int) -> Event:
        """Start copying the first bytes of the staging buffer to ``memory`` from byte ``at``; the event is its end."""

    def hand_over(self, memory: Any, events: Sequence[Event]) -> None:
        """Have whatever the calling thread does with the memory from now on happen after the events, and keep the
        memory until that is done, even if it is dropped before."""


@dataclass(slots=True)
class Buffer:
    """One staging buffer; ``busy`` is the end of the last copy out of it."""

    staging: Any
    view: memoryview
    busy: Event | None = None


class Ring:
    """``count`` buffers of ``nbytes`` each; threads share it.

    ``stall_s``: how long one may wait for a buffer, or for a copy to end, in seconds.
    """

    def __init__(
        self,
        device: Device,
        count: int,
        nbytes: int,
        stall_s: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.nbytes = nbytes
        self._stall_s, self._clock, self._sleep = stall_s, clock, sleep
        self._free: queue.Queue[Buffer] = queue.Queue()
        for _ in range(count):
            staging = device.staging(nbytes)
            self._free.put(Buffer(staging, device.view(staging)))

    @contextmanager
    def buffer(self) -> Iterator[Buffer]:
        """The buffer that was used longest ago, nobody else's for the block. Raises DeadlineExceeded."""
        try:
            buffer = self._free.get(timeout=self._stall_s)
        except queue.Empty:
            raise DeadlineExceeded(f"no staging buffer came back for {self._stall_s:g} s") from None
        try:
            self._settle(buffer)
            yield buffer
        finally:
            self._free.put(buffer)

    def drain(self) -> None:
        """The end: wait until no copy is under way, and let go of the buffers, but for those that a hung reader has.

        Raises DeadlineExceeded.
        """
        while True:
            try:
                buffer = self._free.get_nowait()
            except queue.Empty:
                return
            self._settle(buffer)

    def _settle(self, buffer: Buffer) -> None:
        until = self._clock() + self._stall_s
        while buffer.busy is not None and not buffer.busy.query():
            if self._clock() > until:
                raise DeadlineExceeded(
                    f"a copy to the device took more than {self._stall_s:g} s", hint="Look at the GPU (nvidia-smi)."
                )
            self._sleep(POLL_S)
        buffer.busy = None
