"""A command whose standard error is a terminal: what a person sees of it."""

from __future__ import annotations

import errno
import os
import pty
import select
import subprocess
import time
from pathlib import Path

from tests.conftest import HELIOS, Helios, Result


def on_a_terminal(helios: Helios, *args: str | Path, timeout_s: float = 60.0) -> Result:
    """Run ``helios …`` to its end, whatever its exit code; ``err`` is what the terminal got, control characters too."""
    primary, secondary = pty.openpty()
    try:
        with subprocess.Popen(
            [str(HELIOS), *map(str, args)],
            env={**os.environ, **helios.environ, "TERM": "xterm", "COLUMNS": "100"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=secondary,
            text=True,
        ) as process:
            os.close(secondary)
            try:
                shown = _everything(primary, time.monotonic() + timeout_s)
                out, _ = process.communicate(timeout=timeout_s)
            except BaseException:
                process.kill()
                raise
        return Result(process.returncode, out, shown)
    finally:
        os.close(primary)


def _everything(primary: int, end: float) -> str:
    """What is written until nobody has the terminal open any more."""
    found = bytearray()
    while select.select([primary], [], [], max(0.0, end - time.monotonic()))[0]:
        try:
            data = os.read(primary, 65536)
        except OSError as error:
            if error.errno == errno.EIO:
                return found.decode(errors="replace")
            raise
        found += data
    raise AssertionError(f"the terminal is still open; so far it got {bytes(found)!r}")
