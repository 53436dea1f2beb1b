#!/usr/bin/env python3
"""What `make test` runs after the set-up: lint, types, the wheels, then every test. Exits 0 only when all are clean.

pytest comes last, so that its summary ("N passed, …") is the last line. Where /dev/fuse, vLLM and what runs containers
are there, a skipped test is a failure (HELIOS_REQUIRE_ALL=1; tests/conftest.py). Arguments go to pytest.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tests.support.containers import why_no_containers  # noqa: E402 - it is beside us

BIN = ROOT / ".venv" / "bin"
PYTHON = str(BIN / "python")
CHECKS = {
    "compiled": [PYTHON, "scripts/compiled_tests.py"],
    "lint": [str(BIN / "ruff"), "check", "."],
    "format": [str(BIN / "ruff"), "format", "--check", "."],
    "types": [str(BIN / "mypy")],
    "wheel": [PYTHON, "scripts/check_wheel.py"],
    "Hub clients": [PYTHON, "scripts/hub_venvs.py"],
}
"""Two at a time: the first takes as long as all the others."""
WORKERS = "4"
"""On two cores, too: most tests wait for something most of the time. Several of them start vLLM, so no more."""
TESTS = [PYTHON, "-m", "pytest", "-n", WORKERS, "--dist", "loadscope", "--no-loadscope-reorder", "--durations", "20"]
SECOND_TRY = "--reruns=1 --reruns-delay=2 --max-suite-reruns=5 --rerun-exclude-path=tests/unit --rerun-show-tracebacks"
"""A test that starts real servers may run once more, a few of them a worker: a shared machine stalls for seconds. The
summary counts and shows each first failure. One that needs it on a quiet machine is a defect of test or product."""


def why_not_all() -> str | None:
    """Why some tests can't run on this machine, or None."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "/dev/fuse is missing or not ours to open"
    return why_no_containers() if importlib.util.find_spec("vllm") else "vLLM is not installed"


def check(name: str, env: dict[str, str]) -> bool:
    """Whether it is clean; what it printed is shown when it has ended."""
    start, command = time.monotonic(), CHECKS[name]
    done = subprocess.run(
        command, cwd=ROOT, env=env, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    told = f"[{name}] {' '.join(command[1:])}\n{done.stdout}"
    result = "FAILED" if done.returncode else "clean"
    print(f"{told}[{name}] {result} in {time.monotonic() - start:.1f} s", flush=True)
    return not done.returncode


def main() -> int:
    second_try = " ".join(filter(None, [os.environ.get("PYTEST_ADDOPTS"), SECOND_TRY]))
    env = {**os.environ, "PYTEST_ADDOPTS": second_try}
    with ThreadPoolExecutor(2) as pool:
        clean = list(pool.map(lambda name: check(name, env), CHECKS))
    failed = [name for name, good in zip(CHECKS, clean, strict=True) if not good]
    reason = why_not_all()
    print(
        f"[tests] {f'some will be skipped: {reason}' if reason else 'all can run here, so none may be skipped'}",
        flush=True,
    )
    env["HELIOS_REQUIRE_ALL"] = "0" if reason else "1"
    if failed:
        print(f"[tests] these checks failed already: {', '.join(failed)}", flush=True)
    tests = subprocess.run([*TESTS, *sys.argv[1:]], cwd=ROOT, env=env, check=False).returncode
    return 1 if failed or tests else 0


if __name__ == "__main__":
    sys.exit(main())
