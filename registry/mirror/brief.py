"""What is believed for a short while."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Brief(Generic[K, V]):
    """At most ``size`` values, each for as long as it was put for. Threads may share one."""

    def __init__(self, size: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._size, self._clock = size, clock
        self._lock = threading.Lock()
        self._values: OrderedDict[K, tuple[float, V]] = OrderedDict()
        self._generation = 0

    def load(self, key: K, load: Callable[[], V], seconds: float) -> V:
        """The value, loaded if it isn't here. One that was being loaded when something was dropped is not kept: it may
        have been read before the write that is dropped for."""
        with self._lock:
            found = self._values.get(key)
            if found is not None and found[0] > self._clock():
                return found[1]
            generation = self._generation
        value = load()
        with self._lock:
            if generation == self._generation:
                self._put(key, value, seconds)
        return value

    def get(self, key: K) -> V | None:
        """The value, or None when there is none or its time is over."""
        with self._lock:
            found = self._values.get(key)
            if found is not None and found[0] > self._clock():
                return found[1]
            self._values.pop(key, None)
            return None

    def put(self, key: K, value: V, seconds: float) -> None:
        with self._lock:
            self._put(key, value, seconds)

    def _put(self, key: K, value: V, seconds: float) -> None:
        self._values[key] = self._clock() + seconds, value
        self._values.move_to_end(key)
        if len(self._values) > self._size:
            self._values.popitem(last=False)

    def clear(self) -> None:
        with self._lock:
            self._generation += 1
            self._values.clear()

    def drop(self, key: K) -> None:
        with self._lock:
            self._generation += 1
            self._values.pop(key, None)
