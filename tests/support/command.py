"""``helios`` on one home, for a registry that outlives a test."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


class Command:
    """Runs the installed command; ``env`` may be changed between runs."""

    def __init__(self, home: Path, **env: str) -> None:
        self.home = home
        self.env = {**os.environ, "HELIOS_HOME": str(home), **env}

    def start(
        self, *args: str, env: Mapping[str, str] | None = None, stderr: int = subprocess.PIPE
    ) -> subprocess.Popen[str]:
        path, environ = Path(sys.executable).parent / "helios", {**self.env, **(env or {})}
        return subprocess.Popen([path, *args], env=environ, stdout=subprocess.PIPE, stderr=stderr, text=True)

    def both(self, *args: str, code: int = 0) -> tuple[str, str]:
        """Standard output and error of a command that ends with this exit code."""
        with self.start(*args) as process:
            out, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        return out, err

    def __call__(self, *args: str) -> str:
        """What a command that succeeds prints, without white space around it."""
        return self.both(*args)[0].strip()
