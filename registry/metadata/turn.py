"""A turn that is handed on in the order in which it was asked for.

``threading.Lock`` goes to whoever asks in the moment in which it is free, mostly to the thread that has just let go of
it: one that writes in many short steps would keep all others waiting until its last.
"""

from __future__ import annotations

import threading
from collections import deque


class Turn:
    """One thread has it at a time; the longest waiting gets it next."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = False
        self._waiting: deque[threading.Lock] = deque()

    def acquire(self, timeout_s: float) -> bool:
        """Wait for the turn; whether it came in time."""
        with self._lock:
            if not self._taken:
                self._taken = True
                return True
            gate = threading.Lock()
            gate.acquire()
            self._waiting.append(gate)
        if gate.acquire(timeout=timeout_s):
            return True
        with self._lock:
            if gate in self._waiting:
                self._waiting.remove(gate)
                return False
        return True  # it was handed over just now

    def release(self) -> None:
        """Hand the turn on."""
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False
