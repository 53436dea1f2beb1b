"""What a person sees while a long command runs: on a terminal a spinner a stage, elsewhere plain lines. On stderr."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Protocol, TextIO

QUIET_S: Final = 15.0
"""Off a terminal, a stage that has said nothing for this long says again what it is doing."""
FIGURES_S: Final = 5.0
"""Off a terminal, figures that change all the time are printed this often."""


class Display(Protocol):
    """Shows one stage. ``tick`` comes every second from another thread."""

    def show(self, text: str, *, figure: bool = False) -> None: ...
    def tick(self) -> None: ...
    def end(self, result: str, seconds: float) -> None: ...


@dataclass(slots=True)
class Stage:
    """One step: ``seconds`` once it is over; ``parts`` are the (what, seconds) inside it that ``doing`` was told."""

    title: str
    display: Display = field(repr=False)
    clock: Callable[[], float] = field(repr=False)
    result: str = "done"
    seconds: float = 0.0
    parts: list[tuple[str, float]] = field(default_factory=list)
    _doing: tuple[str, float] | None = None

    def doing(self, text: str) -> None:
        """Say what is going on now."""
        self.close()
        self._doing = text, self.clock()
        self.display.show(text)

    def figure(self, text: str) -> None:
        """Show a figure that changes often, such as bytes done."""
        self.display.show(text, figure=True)

    def done(self, result: str) -> None:
        """Say how it ended; shown with the title."""
        self.result = result

    def close(self) -> None:
        """End the part that ``doing`` began."""
        if self._doing is not None:
            text, since = self._doing
            self.parts.append((text, self.clock() - since))
            self._doing = None


class Progress:
    """Shows stages one after another and keeps them, with their times, in ``stages``."""

    def __init__(
        self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic, *, plain: bool = False
    ) -> None:
        """``plain``: lines on a terminal, too, where others write there meanwhile."""
        self.stream = stream or sys.stderr
        self._terminal = self.stream.isatty() and not plain
        self.stages: list[Stage] = []
        self._clock = clock

    @contextlib.contextmanager
    def stage(self, title: str, *, shown: bool = True) -> Iterator[Stage]:
        """A stage; with ``shown`` false it is only timed, because it prints by itself."""
        started = self._clock()
        kind = Nothing if not shown else Spinner if self._terminal else Lines
        display: Display = kind(self.stream, title, self._clock)
        stage = Stage(title, display, self._clock)
        self.stages.append(stage)
        try:
            with _Ticking(1.0, display.tick):
                yield stage
        except BaseException:
            display.end("stopped", self._clock() - started)
            raise
        finally:
            stage.close()
            stage.seconds = self._clock() - started
        display.end(stage.result, stage.seconds)

    def note(self, text: str) -> None:
        """One line between stages."""
        print(text, file=self.stream, flush=True)


class Nothing:
    """Shows nothing."""

    def __init__(self, stream: TextIO, title: str, clock: Callable[[], float]) -> None: ...
    def show(self, text: str, *, figure: bool = False) -> None: ...
    def tick(self) -> None: ...
    def end(self, result: str, seconds: float) -> None: ...


class Lines:
    """``title: what`` a line, for logs and pipes."""

    def __init__(self, stream: TextIO, title: str, clock: Callable[[], float]) -> None:
        self._stream, self._title, self._clock = stream, title, clock
        self._lock = threading.Lock()
        self._started = self._printed = clock()
        self._text = ""

    def show(self, text: str, *, figure: bool = False) -> None:
        with self._lock:
            self._text = text
            if not figure or self._clock() - self._printed >= FIGURES_S:
                self._print(text)

    def tick(self) -> None:
        with self._lock:
            if self._text and self._clock() - self._printed >= QUIET_S:
                self._print(f"{self._text} (still, after {self._clock() - self._started:.0f} s)")

    def end(self, result: str, seconds: float) -> None:
        with self._lock:
            self._print(f"{result} ({seconds:.1f} s)")

    def _print(self, text: str) -> None:
        self._printed = self._clock()
        print(f"{self._title}: {text}", file=self._stream, flush=True)


class Spinner:
    """A spinner, what is being done and the seconds; a tick mark when it is over."""

    def __init__(self, stream: TextIO, title: str, clock: Callable[[], float]) -> None:
        from rich.console import Console

        self._title, self._clock, self._started = title, clock, clock()
        self._console = Console(file=stream, highlight=False)
        self._text = ""
        self._status = self._console.status(self._line())
        self._status.start()

    def show(self, text: str, *, figure: bool = False) -> None:
        self._text = text
        self.tick()

    def tick(self) -> None:
        self._status.update(self._line())

    def end(self, result: str, seconds: float) -> None:
        self._status.stop()
        mark, style = ("✗", "red") if result == "stopped" else ("✓", "green")
        self._console.print(
            _styled((f"{mark} ", style), (self._title, "bold"), f"  {result}", (f"  {seconds:.1f} s", "dim"))
        )

    def _line(self) -> Any:
        seconds = self._clock() - self._started
        return _styled((self._title, "bold"), f"  {self._text}", (f"  {seconds:.0f} s", "dim"))


def _styled(*parts: str | tuple[str, str]) -> Any:
    from rich.text import Text

    return Text.assemble(*parts)


class _Ticking:
    """Calls something every so often from a thread that ends with the context."""

    def __init__(self, every_s: float, call: Callable[[], None]) -> None:
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._loop, args=(every_s, call), name="progress", daemon=True)

    def _loop(self, every_s: float, call: Callable[[], None]) -> None:
        while not self._end.wait(every_s):
            call()

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._end.set()
        self._thread.join()
