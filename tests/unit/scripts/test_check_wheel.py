"""The wheel check finds what it is there for."""

import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def check(script):
    return script("check_wheel")


def wheel(path, *names):
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, "")
    return path


GOOD = ("helios/__init__.py", "helios/py.typed", "helios_llm-1.dist-info/licenses/LICENSE")


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (GOOD, None),
        ((*GOOD, "tests/test_x.py"), "tests does not belong"),
        ((*GOOD, "benchmarks/x.py"), "benchmarks does not belong"),
        ((*GOOD, "helios/test_x.py"), "is a test"),
        (GOOD[:1] + GOOD[2:], "py.typed is missing"),
        (GOOD[:2], "licence file is missing"),
    ],
)
def test_content(check, tmp_path, names, problem):
    problems = check.check_content(wheel(tmp_path / "x.whl", *names), ["helios"])
    assert (problem is None and not problems) or problem in problems[0]


def test_a_source_that_the_wheel_lacks(check, tmp_path):
    (tmp_path / "helios" / "migrations").mkdir(parents=True)
    for name in ("__init__.py", "migrations/first.py"):
        (tmp_path / "helios" / name).touch()
    built = wheel(tmp_path / "x.whl", "helios/__init__.py")
    assert check.check_whole(built, ["helios"], tmp_path) == ["helios/migrations/first.py is missing"]


def test_a_module_that_the_build_did_not_make(check, tmp_path):
    (tmp_path / "csi").mkdir()
    (tmp_path / "csi/csi.proto").touch()
    built = wheel(tmp_path / "x.whl", "csi/csi.proto")
    assert check.check_whole(built, ["csi"], tmp_path) == ["csi/csi_pb2.py is missing"]


def distribution(directory, name, *files):
    info = directory / f"{name}-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))


def test_a_name_of_two_distributions(check, tmp_path, monkeypatch):
    target, others = tmp_path / "target", tmp_path / "others"
    distribution(target, "helios-llm", "helios/__init__.py", "router/__init__.py")
    distribution(others, "vllm", "vllm/__init__.py")
    monkeypatch.setattr(sys, "path", [str(others)])
    assert check.check_names(target, ["helios", "router"], "helios-llm") == []
    distribution(others, "other-router", "router.py")
    assert check.check_names(target, ["helios", "router"], "helios-llm") == [
        "the import name router also belongs to other-router"
    ]
