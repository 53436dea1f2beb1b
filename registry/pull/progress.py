"""What a pull has done so far: state, not a queue, so that a slow reader never makes it grow.

Workers report from their threads; any number of readers ask for what changed since they last asked and get each file's
latest figures. Log lines are kept up to a bound.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

MAX_LOGS: Final = 500
"""Log lines kept for readers that join late."""

Event = dict[str, Any]


@dataclass(slots=True)
class _File:
    size: int
    done: int
    added: int
    changed: int


class Progress:
    """Shared by the threads of one pull and by everybody who watches it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._turn = 0
        self._files: OrderedDict[str, _File] = OrderedDict()  # most recently changed last
        self._logs: deque[tuple[int, str]] = deque(maxlen=MAX_LOGS)
        self._listeners: set[Callable[[], None]] = set()

    def file(self, path: str, size: int) -> None:
        """A file of this many bytes belongs to the pull."""
        with self._lock:
            self._turn += 1
            self._files[path] = _File(size, 0, self._turn, self._turn)
        self._notify()

    def done(self, path: str, done: int) -> None:
        """So many bytes of the file are here."""
        with self._lock:
            self._turn += 1
            file = self._files[path]
            file.done, file.changed = done, self._turn
            self._files.move_to_end(path)
        self._notify()

    def log(self, message: str) -> None:
        with self._lock:
            self._turn += 1
            self._logs.append((self._turn, message))
        self._notify()

    def mirror(self, other: Progress) -> Callable[[], None]:
        """Show what another pull does as one's own from here on; returns what ends that."""
        turn = 0
        lock = threading.Lock()

        def copy() -> None:
            nonlocal turn
            with lock:
                events, turn = other.since(turn)
                for event in events:
                    match event["event"]:
                        case "log":
                            self.log(event["message"])
                        case "file":
                            self.file(event["path"], event["size"])
                        case "progress":
                            self.done(event["path"], event["done"])

        stop = other.listen(copy)
        copy()
        return stop

    def changed(self) -> None:
        """Wake whoever listens although nothing here has changed."""
        self._notify()

    def since(self, turn: int) -> tuple[list[Event], int]:
        """Events that bring a reader from ``turn`` (0: the start) to now, and the turn that is now."""
        with self._lock:
            events: list[tuple[int, Event]] = [
                (at, {"event": "log", "message": message}) for at, message in self._logs if at > turn
            ]
            for path, file in reversed(self._files.items()):
                if file.changed <= turn:
                    break
                if file.added > turn:
                    events.append((file.added, {"event": "file", "path": path, "size": file.size}))
                if file.changed > file.added:
                    progress = {"event": "progress", "path": path, "done": file.done, "total": file.size}
                    events.append((file.changed, progress))
            return [event for _, event in sorted(events, key=lambda item: item[0])], self._turn

    def totals(self) -> tuple[int, int, int]:
        """Bytes that are here, bytes in all, and files, as far as they are known."""
        with self._lock:
            files = self._files.values()
            return sum(file.done for file in files), sum(file.size for file in files), len(files)

    def unfinished(self) -> Event | None:
        """The figures of a file that is under way, for a sign of life."""
        with self._lock:
            for path, file in reversed(self._files.items()):
                if file.done < file.size:
                    return {"event": "progress", "path": path, "done": file.done, "total": file.size}
        return None

    def listen(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call ``listener`` from a worker's thread after every change; returns what ends that."""
        with self._lock:
            self._listeners.add(listener)

        def stop() -> None:
            with self._lock:
                self._listeners.discard(listener)

        return stop

    def _notify(self) -> None:
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            listener()
