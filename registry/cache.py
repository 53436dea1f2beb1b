"""A bounded in-memory cache for what the registry looks up most."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Cache(Generic[K, V]):
    """At most ``size`` values, the least recently used one leaves first. Threads may share one.

    A value that was being loaded when ``clear`` was called is returned to its caller but not kept: it may have been
    read before the write that ``clear`` stands for.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._generation = 0
        self._values: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K, load: Callable[[], V]) -> V:
        """The value for the key, loaded if it isn't here; what ``load`` raises is passed on and not kept."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
            generation = self._generation
        value = load()
        with self._lock:
            if generation == self._generation:
                self._values[key] = value
                while len(self._values) > self._size:
                    self._values.popitem(last=False)
        return value

    def peek(self, key: K) -> V | None:
        """The value for the key if it is here; never waits."""
        with self._lock:
            value = self._values.get(key)
            if value is not None:
                self._values.move_to_end(key)
            return value

    def clear(self) -> None:
        """Forget everything: call it after a write that may have changed any value, before acknowledging it."""
        with self._lock:
            self._generation += 1
            self._values.clear()
