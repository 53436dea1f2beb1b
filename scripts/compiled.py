#!/usr/bin/env python3
"""Builds a wheel in which the router's hot path is compiled by mypyc, and unpacks it: run with .venv/bin/python.

    .venv/bin/python scripts/compiled.py [DIRECTORY]     # default: build/compiled
    PYTHONPATH=build/compiled .venv/bin/helios router …

Which files are compiled says pyproject.toml. They are the same files, and anything else stays as it is; without the
wheel everything is interpreted. It is built from a copy of the tracked files, because the build leaves its modules
beside the sources, where they would win over what is edited later. Needs a C compiler; takes some minutes of one core.
What was built from the same sources is left as it is. Exits 1 where a module that should be compiled is not.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from build_wheel import build

ROOT = Path(__file__).resolve().parent.parent
STAMP = "SOURCES"
"""The file, in the directory, that says what it was built from."""
LOOK = """
import importlib, sys
for name in sys.argv[1:]:
    print(importlib.import_module(name).__file__)
"""


def tracked(root: Path) -> Iterator[str]:
    """What git tracks and is there, by its path below ``root``, in order."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=True).stdout
    for name in sorted(listed.decode().split("\0")):
        if name and (root / name).is_file():
            yield name


def copy_tracked(root: Path, target: Path) -> None:
    """Copy what git tracks, as it is in the working tree."""
    for name in tracked(root):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / name, target / name)


def settings(root: Path) -> tuple[list[str], list[str]]:
    """The wheel's packages, and the modules in it that are compiled."""
    wheel = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    modules = [name.removesuffix(".py").replace("/", ".") for name in wheel["hooks"]["mypyc"]["include"]]
    return wheel["packages"], modules


def digest(root: Path) -> str:
    """What the wheel depends on: its files, how it is built, and for which interpreter."""
    packages, _ = settings(root)
    found = hashlib.sha256(f"{sys.version} {sysconfig.get_platform()}".encode())
    for name in tracked(root):
        if name == "pyproject.toml" or name.split("/")[0] in packages:
            content = (root / name).read_bytes()
            found.update(b"%b\0%d\0%b" % (name.encode(), len(content), content))
    return found.hexdigest()


def interpreted(target: Path, modules: Sequence[str]) -> list[str]:
    """Those of the modules that a process with ``target`` in front of its path takes as Python, or from elsewhere."""
    env = {**os.environ, "PYTHONPATH": str(target)}
    command = [sys.executable, "-P", "-c", LOOK, *modules]
    files = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.splitlines()
    return [
        name for name, file in zip(modules, files, strict=True)
        if not Path(file).is_relative_to(target) or not file.endswith((".so", ".pyd"))
    ]  # fmt: skip


def make(root: Path, target: Path) -> None:
    """Have the compiled wheel in ``target``, and itself beside it."""
    stamp, sources = target / STAMP, digest(root)
    if stamp.is_file() and stamp.read_text() == sources:
        print(f"{target}: built from these sources already")
        return
    with tempfile.TemporaryDirectory(prefix="helios-compiled-") as work:
        source = Path(work, "source")
        copy_tracked(root, source)
        wheel = build(source, Path(work, "wheel"), HATCH_BUILD_HOOK_ENABLE_MYPYC="1")
        shutil.rmtree(target, ignore_errors=True)
        with zipfile.ZipFile(wheel) as content:
            content.extractall(target)
        shutil.copy(wheel, target.parent)
    stamp.write_text(sources)
    print(f"{target.parent / wheel.name}: unpacked in {target}")


def main() -> int:
    target = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT / "build" / "compiled"
    make(ROOT, target)
    _, modules = settings(ROOT)
    plain = interpreted(target, modules)
    if plain:
        print(f"not compiled: {', '.join(plain)}; remove {target} and look at the output of a new build")
        return 1
    print(f"{len(modules)} compiled modules")
    return 0


if __name__ == "__main__":
    sys.exit(main())
