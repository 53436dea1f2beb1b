"""NIXL's connector leaves threads where they are bound if somebody has named their cores."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from helios.nixl_cores import PLATFORM, VARIABLE, cores_named, keep_cores_when_imported

CPU = """
class CpuPlatform:
    @classmethod
    def discover_numa_topology(cls):
        return [[0, 1]]

class ZenCpuPlatform(CpuPlatform):
    pass
"""
"""As vLLM 0.32 has it: the connector pins its thread to the highest of each list, if there is a list."""


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No finder and no module stays."""
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("platform_"):
            del sys.modules[name]


def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, source: str) -> str:
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("helios.nixl_cores.PLATFORM", name)
    return name


@pytest.mark.parametrize("first", [True, False])
def test_there_is_no_core_to_pin_to_whether_the_platform_is_imported_before_or_after(tmp_path, monkeypatch, first):
    name = module(tmp_path, monkeypatch, f"platform_{first}", CPU)
    if first:
        assert importlib.import_module(name).CpuPlatform.discover_numa_topology() == [[0, 1]]
    keep_cores_when_imported()
    platform = importlib.import_module(name)
    assert platform.CpuPlatform.discover_numa_topology() == []
    assert platform.ZenCpuPlatform().discover_numa_topology() == []


def test_a_platform_that_was_changed_is_left_alone_and_it_is_said(tmp_path, monkeypatch, caplog):
    name = module(tmp_path, monkeypatch, "platform_changed", "class CpuPlatform: ...")
    keep_cores_when_imported()
    with caplog.at_level(logging.WARNING, "vllm.helios"):
        platform = importlib.import_module(name)
    assert not hasattr(platform.CpuPlatform, "discover_numa_topology")
    assert f"another core than {VARIABLE} names" in caplog.text


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_real_vllm_has_what_is_changed_and_pins_only_to_what_it_names():
    """Read, not imported: that would take vLLM's seconds, and NIXL. tests/e2e/test_serve_apart.py sees it work."""
    found = find_spec("vllm")
    assert found is not None
    assert found.submodule_search_locations
    (root,) = found.submodule_search_locations
    platform = Path(root, *PLATFORM.split(".")[1:]).with_suffix(".py").read_text()
    assert "def discover_numa_topology(cls)" in platform
    users = [path for path in Path(root).rglob("*.py") if "discover_numa_topology" in path.read_text()]
    assert {path.name for path in users} == {"cpu.py", "base_worker.py"}, "nobody else asks for it"
    connector = next(path for path in users if path.name == "base_worker.py").read_text()
    asked = connector.index("discover_numa_topology")
    assert "if rsv_cores_for_kv:" in connector[asked : connector.index("sched_setaffinity(0", asked)]


@pytest.mark.parametrize(
    ("value", "named"), [(None, False), ("", False), ("auto", False), ("nobind", False), ("0", True), ("0-3|4-7", True)]
)
def test_cores_that_are_named(value, named):
    assert cores_named({} if value is None else {VARIABLE: value}) is named


def test_the_plugin_keeps_cores_only_where_they_are_named(monkeypatch):
    plugin = importlib.import_module("heliosfs.loader.plugin")
    kept = []
    monkeypatch.setattr(plugin, "keep_cores_when_imported", lambda: kept.append(True))
    monkeypatch.delenv(VARIABLE, raising=False)
    plugin.register()
    assert kept == []
    monkeypatch.setenv(VARIABLE, "1")
    plugin.register()
    assert kept == [True]
