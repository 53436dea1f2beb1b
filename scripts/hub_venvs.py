#!/usr/bin/env python3
"""Makes .venvs/hub-<version>/ with each huggingface_hub the tests drive. A virtual environment that stands is kept."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("0.36.2", "1.33.0", "2.4.0")
"""The last release of each major."""


def main() -> int:
    for version in VERSIONS:
        target = ROOT / ".venvs" / f"hub-{version}"
        mark = target / "complete"
        if mark.exists() and (target / "bin" / "python").exists():
            continue
        print(f"[setup] huggingface_hub {version} in {target.relative_to(ROOT)}/", flush=True)
        shutil.rmtree(target, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(target)], check=True)
        pip = [str(target / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "-qq"]
        subprocess.run([*pip, f"huggingface_hub=={version}"], check=True)
        mark.touch()
    return 0


if __name__ == "__main__":
    sys.exit(main())
