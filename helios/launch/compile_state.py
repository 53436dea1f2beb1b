"""What starts of engines found of compiled kernels, and what became of it: for notes, and for ``helios status``.

``$HELIOS_HOME/vllm/compiled/open/<pid>-<n>.json`` for each engine, under flock as long as its owner lives.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from helios.decoding import from_json
from helios.launch.compile_made import HERE
from helios.lockfile import LockFile, held


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """One start of an engine on ``model`` at ``commit``.

    ``artifact``: the commit of the compiled kernels that it found, of so many files and bytes; None: it found none, and
    ``why`` says why. ``how`` it got them: ``here``, what this home has compiled is all there is, if ``earlier`` starts
    have. ``looked_s``: how long its start took to look for them, in seconds. ``published``: the commit of what it has
    compiled itself.
    """

    model: str
    commit: str
    key: str
    artifact: str | None
    files: int = 0
    bytes: int = 0
    how: Literal["overlayfs", "copied", "here"]
    earlier: bool = False
    why: str = ""
    looked_s: float
    published: str | None = None

    @property
    def had(self) -> str:
        """What it had, as ``compile_made.Bad`` names it; empty where that was nothing."""
        return self.artifact or (HERE if self.earlier else "")

    @property
    def found(self) -> str:
        """What it found, for people."""
        if self.artifact is None:
            so = "what this home has compiled before is there" if self.earlier else "the engine compiles"
            return f"{so}, because {self.why}"
        how = f"{self.how}, because {self.why}" if self.why else self.how
        return f"{self.files} files, {self.bytes / 1e6:.1f} MB, after {self.looked_s:.1f} s ({how})"


class Shown:
    """A start that ``helios status`` shows until ``close``."""

    def __init__(self, start: Start, lock: LockFile | None) -> None:
        self.start, self._lock = start, lock

    @classmethod
    def open(cls, base: Path, name: str, start: Start) -> Shown:
        """Raises OSError."""
        directory = base / "open"
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        shown = cls(start, LockFile.acquire(directory / f"{name}.json"))
        shown._write()
        return shown

    def published(self, commit: str) -> None:
        """What it compiled is an artifact now. Raises OSError."""
        self.start = msgspec.structs.replace(self.start, published=commit)
        self._write()

    def close(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()

    def _write(self) -> None:
        if self._lock is not None:
            self._lock.write(msgspec.json.encode(self.start))


def starts(base: Path) -> list[Start]:
    """Those of engines whose owners live."""
    found = []
    for path in sorted((base / "open").glob("*.json")):
        if held(path):
            try:
                found.append(from_json(path.read_bytes(), Start))
            except (FileNotFoundError, msgspec.DecodeError):
                continue  # its engine has just ended, or it is being written
    return found


def forget_dead(base: Path) -> None:
    """Remove the records of owners that are gone. Raises OSError."""
    for path in (base / "open").glob("*.json"):
        if not held(path) and (lock := LockFile.acquire(path)) is not None:
            lock.release()
