"""How the scripts here build the wheel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-qq"]


def build(source: Path, target: Path, **environ: str) -> Path:
    """Build the wheel of a source directory into ``target``, where none is yet; returns its path.

    ``environ`` goes on top of the environment. Raises CalledProcessError.
    """
    command = [*PIP, "wheel", "--no-deps", "--wheel-dir", str(target), str(source)]
    subprocess.run(command, env={**os.environ, **environ}, check=True)
    (wheel,) = target.glob("*.whl")
    return wheel
