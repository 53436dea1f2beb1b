#!/usr/bin/env python3
"""Makes .venvs/hub-<version>/ with each huggingface_hub the tests drive, .venvs/transformers-<version>/ with the last
transformers that used the oldest of them, and .venvs/transformers-hub-<version>/ where the newest one finds the one
before the newest. A virtual environment that stands is kept."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("0.36.2", "1.33.0", "2.4.0")
"""The last release of each major."""
TRANSFORMERS = ("transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.2")
"""The last transformers before huggingface_hub 1. The newest one is in .venv, beside the newest huggingface_hub."""


def make(target: Path, *packages: str, rest: str | None = None) -> None:
    """Make a virtual environment, unless it stands. With ``rest`` it has these packages alone, and finds what they
    need in that directory: torch is large."""
    mark = target / "complete"
    if mark.exists() and (target / "bin" / "python").exists():
        return
    print(f"[setup] {', '.join(packages)} in {target.relative_to(ROOT)}/", flush=True)
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(target)], check=True)
    pip = [str(target / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "-qq"]
    subprocess.run([*pip, *(() if rest is None else ("--no-deps",)), *packages], check=True)
    if rest is not None:
        inside = sysconfig.get_path("purelib", "venv", {"base": str(target), "platbase": str(target)})
        (Path(inside) / "rest.pth").write_text(f"{rest}\n")
    mark.touch()


def main() -> int:
    for version in VERSIONS:
        make(ROOT / ".venvs" / f"hub-{version}", f"huggingface_hub=={version}")
    old = TRANSFORMERS[0].replace("==", "-")
    make(ROOT / ".venvs" / old, *TRANSFORMERS, rest=sysconfig.get_path("purelib"))
    before = VERSIONS[1]
    make(
        ROOT / ".venvs" / f"transformers-hub-{before}",
        f"huggingface_hub=={before}",
        rest=sysconfig.get_path("purelib"),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
