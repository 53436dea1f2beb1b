#!/usr/bin/env python3
"""Runs the tests of the router's relay, wire, admission and administration again, with routers whose hot path is
compiled: of one process, and of two with one queue.

A part of `make test`; run with .venv/bin/python. The tests themselves and their fakes stay interpreted: what differs
is what the processes import that they start (scripts/compiled.py). Arguments go to pytest.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMPILED = ROOT / "build" / "compiled"
PARTS = ("relay", "wire", "admission", "owner", "admin")
TESTS = [f"tests/integration/test_router_{name}.py" for name in PARTS]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadscope"]


def main() -> int:
    built = subprocess.run([sys.executable, "scripts/compiled.py", str(COMPILED)], cwd=ROOT, check=False).returncode
    if built:
        return built
    # pytest itself has the working tree in front of it; a test looks that the routers have not.
    env = {**os.environ, "PYTHONPATH": str(COMPILED), "HELIOS_TEST_HOT_PATH": "compiled"}
    return subprocess.run([*PYTEST, *(sys.argv[1:] or TESTS)], cwd=ROOT, env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
