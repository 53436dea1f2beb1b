"""The workers' logs as they grow, each line behind the worker's name, ``vllm-prefill-1 | ...``, or as a JSON record.

Workers write to files, and threads read those: however slowly somebody takes the lines, no worker waits for it. A
thread ends when its worker has and all that it wrote is told.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import BinaryIO, Final, TextIO

from helios.launch.processes import Child

LINE: Final = 4096
"""Longest line that is shown whole, in characters."""
KEPT: Final = 4 * LINE
"""Bytes of them: four are the longest character."""
CUT: Final = " […]"
PIECE: Final = 1 << 16
"""Most bytes of a log that are read at a time."""
LOOK_S: Final = 0.2
END_S: Final = 10.0
"""Longest wait at the end for whoever takes the lines, in seconds."""

_LEVEL: Final = re.compile(r"(?:\([^()]*\) )?(DEBUG|INFO|WARNING|ERROR|CRITICAL)\b")


class Lines:
    """Cuts what comes in pieces into lines for people; what a progress bar's carriage return ends is one, too.

    A line that is longer than ``LINE`` is cut there and marked; no more than that of one that has not ended is kept."""

    def __init__(self) -> None:
        self._rest = b""
        self._cut = False

    def feed(self, piece: bytes) -> list[str]:
        """The lines that end in it."""
        # a carriage return at the end may be half of one line's end
        *whole, rest = re.split(rb"\r\n|\n|\r(?!\Z)", self._rest + piece)
        lines = []
        for self._rest in whole:
            lines += self.end()
        self._rest, self._cut = rest[:KEPT], self._cut or len(rest) > KEPT
        return lines

    def end(self) -> list[str]:
        """What is left: a last line that nothing ends."""
        text = self._rest.rstrip(b"\r").decode(errors="replace")
        cut, self._rest, self._cut = self._cut or len(text) > LINE, b"", False
        return [text[:LINE] + CUT * cut] if text.strip() else []


def prefixed(name: str, line: str) -> str:
    """The line behind the worker's name."""
    return f"{name} | {line}"


def recorded(name: str, line: str) -> str:
    """The line as a record of our own JSON logs (``helios.logs``), with the level that vLLM gives it; one that is a
    JSON object already stays as it is."""
    if line.startswith("{"):
        with contextlib.suppress(ValueError):
            if isinstance(json.loads(line), dict):
                return line
    found = _LEVEL.match(line)
    now = time.time()
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
    record = {
        "time": f"{stamp}.{int(now % 1 * 1000):03d}Z",
        "level": found[1].lower() if found else "info",
        "logger": name,
        "message": line,
    }
    return json.dumps(record)


class Followers:
    """Shows logs on ``stream``; leaving the context waits until all is shown of workers that have ended."""

    def __init__(self, stream: TextIO, form: Callable[[str, str], str] = prefixed) -> None:
        """``form`` makes what is shown of a worker's name and a line."""
        self._stream, self._form = stream, form
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Followers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._ending.set()
        until = time.monotonic() + END_S
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def follow(self, child: Child) -> None:
        """Show what the child writes, from the beginning of its log on."""
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        log = child.log.open("rb")  # here: the next start moves it
        thread = threading.Thread(target=self._run, args=(child, log), name=f"log of {child.name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run(self, child: Child, log: BinaryIO) -> None:
        lines = Lines()
        with log:
            while True:
                ended = child.poll() is not None or self._ending.is_set()  # before the last look at its log
                while piece := log.read(PIECE):
                    self._show(child.name, lines.feed(piece))
                if ended:
                    break
                self._ending.wait(LOOK_S)
        self._show(child.name, lines.end())

    def _show(self, name: str, lines: list[str]) -> None:
        if lines:
            with self._lock:
                self._stream.write("".join(f"{self._form(name, line)}\n" for line in lines))
                self._stream.flush()
