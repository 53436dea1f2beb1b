"""One at a time for each key, without a lock for every key there is."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class Turns:
    """Threads that want the same key take turns; those with different keys never wait for each other."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken: dict[str, tuple[threading.Lock, int]] = {}

    @contextlib.contextmanager
    def __call__(self, key: str) -> Iterator[None]:
        with self._lock:
            turn, users = self._taken.get(key, (threading.Lock(), 0))
            self._taken[key] = turn, users + 1
        try:
            with turn:
                yield
        finally:
            with self._lock:
                turn, users = self._taken[key]
                if users == 1:
                    del self._taken[key]
                else:
                    self._taken[key] = turn, users - 1
