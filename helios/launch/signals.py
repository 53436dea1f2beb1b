"""SIGTERM, SIGHUP and Ctrl-C as exceptions in the main thread, so that contexts unwind and take everything down."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, Final

SIGNALS: Final = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class Stopped(SystemExit):
    """A signal asks the process to end; its exit code is 128 + the signal's number."""

    def __init__(self, sig: signal.Signals) -> None:
        super().__init__(128 + sig)
        self.signal = sig


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raise Stopped at the first signal; later ones are ignored, as what the first one began has its own deadlines."""

    def stop(number: int, frame: FrameType | None) -> None:
        for sig in SIGNALS:
            signal.signal(sig, signal.SIG_IGN)
        raise Stopped(signal.Signals(number))

    with _handled(stop):
        yield


@contextlib.contextmanager
def signals_ignored() -> Iterator[None]:
    """Let nothing but SIGKILL interrupt the context. Signals reach the main thread only: elsewhere it does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with _handled(signal.SIG_IGN):
        yield


@contextlib.contextmanager
def _handled(handler: Any) -> Iterator[None]:
    before = {sig: signal.signal(sig, handler) for sig in SIGNALS}
    try:
        yield
    finally:
        for sig, old in before.items():
            signal.signal(sig, old)
