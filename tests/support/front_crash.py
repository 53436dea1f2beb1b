"""A process with a front store that dies at a chosen step: before or after a line, a file or a request."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from heliosfs.store.directory import DirectoryStore
from heliosfs.store.front.disk import Memory
from heliosfs.store.front.lines import Lines
from heliosfs.store.front.missed import Missed
from tests.support.front_store import Front

STEPS = (
    (Lines, "begin"),
    (Lines, "append"),
    (Missed, "clear"),
    (Memory, "_write"),
    (DirectoryStore, "_link"),
    (DirectoryStore, "delete"),
)
"""What changes something that lasts; the cloud is a ``DirectoryStore``, too."""


class Killed(BaseException):
    """The process is no more; only its memory and its threads are, since they can't be helped."""


class Crash:
    """A context: this thread is killed at the given step, counted from 0 by what it does itself."""

    def __init__(self, front: Front, step: int) -> None:
        self._front, self._left = front, step
        self._thread = threading.current_thread()
        self._patch = pytest.MonkeyPatch()
        self._dead = False

    def __enter__(self) -> Crash:
        for owner, name in STEPS:
            self._patch.setattr(owner, name, self._watched(getattr(owner, name)))
        return self

    def __exit__(self, *exc: object) -> None:
        self._patch.undo()

    def kills(self, act: Callable[[], None]) -> bool:
        """Whether the process dies of what it does; it is buried in either case."""
        killed = False
        try:
            act()
        except BaseException:  # what has to be tidied up on the way may have failed, too
            killed = self._dead
            if not killed:
                raise
        finally:
            self._dead = self._front.cloud.dead = True
            self._front.store.close()
        return killed

    def _watched(self, act: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **more: Any) -> Any:
            self._pass()
            done = act(*args, **more)
            self._pass()
            return done

        return step

    def _pass(self) -> None:
        if self._dead:
            raise OSError("the process is dead")
        if threading.current_thread() is not self._thread:
            return
        if self._left == 0:
            self._dead = self._front.cloud.dead = True
            raise Killed
        self._left -= 1
