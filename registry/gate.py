"""A lock that many may share or one may hold alone, with deadlines."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Final

from helios.errors import DeadlineExceeded

WAIT_S: Final = 300.0
"""Longest wait for a cleaning to end, in seconds; it deletes files, so it takes a second or two."""


class Gate:
    """Many may be inside together, or one alone. Whoever wants to be alone never makes the others wait."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._inside = 0
        self._alone = False

    @contextlib.contextmanager
    def shared(self, timeout_s: float = WAIT_S) -> Iterator[None]:
        with self._condition:
            if not self._condition.wait_for(lambda: not self._alone, timeout_s):
                raise DeadlineExceeded(f"the store was being cleaned up for {timeout_s:.0f} s")
            self._inside += 1
        try:
            yield
        finally:
            with self._condition:
                self._inside -= 1
                self._condition.notify_all()

    @contextlib.contextmanager
    def alone(self, timeout_s: float) -> Iterator[bool]:
        """Yields whether it worked: False when somebody was inside all the time."""
        with self._condition:
            entered = self._condition.wait_for(lambda: not self._alone and not self._inside, timeout_s)
            self._alone = self._alone or entered
        try:
            yield entered
        finally:
            if entered:
                with self._condition:
                    self._alone = False
                    self._condition.notify_all()
