#!/usr/bin/env python3
"""Builds the wheel and checks what a user would get: run with .venv/bin/python.

- It holds the packages whole (also what is found by its path, as migrations are), py.typed and the licence, and no
  tests, benchmarks or scripts.
- Installed beside vLLM and all else in .venv/, none of its top-level import names belongs to another distribution.
- Its console script works from there.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections import defaultdict
from pathlib import Path

from build_wheel import PIP, build

ROOT = Path(__file__).resolve().parent.parent


def check_content(wheel: Path, packages: list[str]) -> list[str]:
    """What is wrong with the wheel's list of files."""
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    problems = [f"{name} does not belong in the wheel" for name in sorted(top)
                if name not in packages and not name.endswith(".dist-info")]  # fmt: skip
    problems += [f"{package}/py.typed is missing" for package in packages if f"{package}/py.typed" not in names]
    if not any(".dist-info/licenses/LICENSE" in name for name in names):
        problems.append("the licence file is missing")
    problems += [f"{name} is a test" for name in names if "/tests/" in name or name.split("/")[-1].startswith("test_")]
    return problems


MADE = ("csi/csi_pb2.py", "orchestrator/signals/externalscaler_pb2.py", "router/picker/ext_proc_pb2.py")
"""Modules that the build makes: they are in no checkout that nobody has built."""


def check_whole(wheel: Path, packages: list[str], root: Path = ROOT) -> list[str]:
    """Sources of the packages, and modules that are made of others, that the wheel lacks."""
    sources = {path.relative_to(root).as_posix() for package in packages for path in (root / package).rglob("*.py")}
    sources |= {name for name in MADE if name.split("/")[0] in packages}
    return [f"{name} is missing" for name in sorted(sources - set(zipfile.ZipFile(wheel).namelist()))]


def check_names(target: Path, packages: list[str], distribution: str) -> list[str]:
    """Top-level names that, with the wheel installed in ``target``, belong to two distributions."""
    owners: dict[str, set[str]] = defaultdict(set)
    others = 0
    for found in importlib.metadata.distributions(path=[str(target), *sys.path]):
        name = found.metadata["Name"]
        others += name != distribution
        for file in found.files or []:
            owners[file.parts[0].removesuffix(".py")].add(name)
    print(f"wheel: {', '.join(packages)} beside {others} other distributions")
    return [f"the import name {package} also belongs to {', '.join(sorted(owners[package] - {distribution}))}"
            for package in packages if owners[package] - {distribution}]  # fmt: skip


def check_script(target: Path) -> list[str]:
    """Whether the installed console script runs on the installed files, not on the checkout."""
    env = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run(
        [target / "bin" / "helios", "--version"], env=env, cwd=target, capture_output=True, text=True, check=False
    )
    code = "import helios, heliosfs; print(helios.__file__); print(heliosfs.__file__)"
    files = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=target, capture_output=True, text=True, check=True
    ).stdout
    problems = [] if done.returncode == 0 and "helios" in done.stdout else [f"helios --version: {done.stderr}"]
    return problems + [f"{file} is not the wheel's" for file in files.splitlines() if not file.startswith(str(target))]


def main() -> int:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    with tempfile.TemporaryDirectory(prefix="helios-wheel-") as work:
        wheel = build(ROOT, Path(work))
        target = Path(work) / "installed"
        subprocess.run([*PIP, "install", "--no-deps", "--target", str(target), str(wheel)], check=True)
        problems = check_content(wheel, packages) + check_whole(wheel, packages)
        problems += check_names(target, packages, project["project"]["name"])
        problems += check_script(target)
    for problem in problems:
        print(f"wheel: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
