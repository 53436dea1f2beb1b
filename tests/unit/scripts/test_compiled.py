"""scripts/compiled.py: built anew when something changed that is in the wheel, from what git tracks, and looked at."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]
PYPROJECT = """
[tool.hatch.build.targets.wheel]
packages = ["one", "two"]
[tool.hatch.build.targets.wheel.hooks.mypyc]
include = ["one/fast.py", "one/deep/faster.py"]
"""


@pytest.fixture(scope="module")
def compiled(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("compiled")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    for name in (
        "one/__init__.py",
        "one/fast.py",
        "one/deep/__init__.py",
        "one/deep/faster.py",
        "two/x.py",
        "tests/t.py",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("")
    (root / "pyproject.toml").write_text(PYPROJECT)
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    subprocess.run(["git", "add", "."], cwd=root, check=True)
    return root


def test_it_is_built_anew_exactly_when_what_is_in_the_wheel_changed(
    compiled: ModuleType, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[set[str]] = []

    def build(source: Path, target: Path, **_environ: str) -> Path:
        built.append({path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()})
        target.mkdir()
        subprocess.run([sys.executable, "-m", "zipfile", "-c", target / "x.whl", source / "one"], check=True)
        return target / "x.whl"

    monkeypatch.setattr(compiled, "build", build)
    target = tmp_path / "built"
    compiled.make(checkout, target)
    (checkout / "one" / "not_tracked.py").write_text("x")
    (checkout / "tests" / "t.py").write_text("changed")
    compiled.make(checkout, target)
    assert len(built) == 1
    assert built[0] == set(compiled.tracked(checkout))
    assert "one/not_tracked.py" not in built[0]
    (target / "left.over").write_text("")
    for number, (name, text) in enumerate(
        [("two/x.py", "pass"), ("pyproject.toml", PYPROJECT + "\n"), ("two/x.py", "pass ")], start=2
    ):
        (checkout / name).write_text(text)
        compiled.make(checkout, target)
        compiled.make(checkout, target)
        assert len(built) == number
    assert not (target / "left.over").exists()


def test_a_module_that_is_not_compiled_is_named(compiled: ModuleType, checkout: Path, tmp_path: Path) -> None:
    packages, modules = compiled.settings(checkout)
    assert (packages, modules) == (["one", "two"], ["one.fast", "one.deep.faster"])
    assert compiled.interpreted(checkout, modules) == modules
    assert compiled.interpreted(tmp_path, ["math", "json"]) == ["math", "json"], "compiled or not, they are elsewhere"


def test_every_file_that_is_to_be_compiled_is_there(compiled: ModuleType) -> None:
    """A file that was renamed would be left out without a word."""
    _, modules = compiled.settings(ROOT)
    assert len(modules) == len(set(modules))
    assert [name for name in modules if not (ROOT / f"{name.replace('.', '/')}.py").is_file()] == []
