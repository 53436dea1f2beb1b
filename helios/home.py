"""Where Helios keeps state on one machine: the layout under HELIOS_HOME."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from helios.errors import Unavailable

SOCKET_PATH_MAX = 100
"""Longest path used for a unix socket: the kernel allows 107 bytes, and a suffix must fit."""


@dataclass(frozen=True, slots=True)
class Home:
    """Paths under one HELIOS_HOME."""

    root: Path

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Home:
        text = environ.get("HELIOS_HOME") or "~/.local/share/helios"
        return cls(Path(os.path.abspath(os.path.expanduser(text))))

    @property
    def run(self) -> Path:
        """Pids, sockets and locks of running parts."""
        return self.root / "run"

    @property
    def store(self) -> Path:
        """Objects of the embedded registry's directory store."""
        return self.root / "store"

    @property
    def registry(self) -> Path:
        """The embedded registry's metadata."""
        return self.root / "registry"

    @property
    def cache(self) -> Path:
        """The filesystem's local tier (L1)."""
        return self.root / "cache"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    def ensure_run(self) -> Path:
        """Make the run directory, readable by its owner only, and return it; raises Unavailable."""
        return _ensure(self.run, 0o700)

    def ensure_logs(self) -> Path:
        """Make the directory of logs and return it; raises Unavailable."""
        return _ensure(self.logs, 0o755)

    def socket(self, name: str) -> Path:
        """A path for a unix socket, short enough for the kernel even when HELIOS_HOME is deep."""
        path = self.ensure_run() / f"{name}.sock"
        if len(os.fsencode(path)) <= SOCKET_PATH_MAX:
            return path
        digest = f"{hash_text(str(self.root)):016x}"
        short = Path(tempfile.gettempdir()) / f"helios-{os.getuid()}-{digest}"
        short.mkdir(mode=0o700, exist_ok=True)
        if short.stat().st_uid != os.getuid() or short.stat().st_mode & 0o077:
            raise PermissionError(f"{short} belongs to somebody else; choose a shorter HELIOS_HOME")
        return short / f"{name}.sock"


def _ensure(path: Path, mode: int) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True, mode=mode)
    except OSError as error:
        raise Unavailable(
            f"{path} can't be made: {error.strerror}", hint="Set HELIOS_HOME to a directory that you may write to."
        ) from None
    return path


def hash_text(text: str) -> int:
    """A stable 64-bit number for a text."""
    import hashlib

    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
