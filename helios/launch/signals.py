"""SIGTERM, SIGHUP and Ctrl-C as exceptions in the main thread, so that contexts unwind and take everything down."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Final

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

    before = {sig: signal.signal(sig, stop) for sig in SIGNALS}
    try:
        yield
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)
