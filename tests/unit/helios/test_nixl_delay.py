"""NIXL's progress thread gets a pause when NIXL is imported, by whichever package; where that can't be, it says so."""

from __future__ import annotations

import importlib
import logging
import sys
import textwrap
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from helios.errors import UsageError
from helios.nixl_delay import APIS, VARIABLE, delay_from, delay_when_imported

API = """
from types import SimpleNamespace
made = []

class Config:
    pthrDelay = None

def agent(name, config):
    made.append((name, config.pthrDelay))
    return name

nixlBind = SimpleNamespace(nixlAgentConfig={config}, nixlAgent=agent, DRAM_SEG=7)
bindings = nixlBind

class nixl_agent:
    def __init__(self, name):
        config = nixlBind.nixlAgentConfig()
        config.pthrDelay = 0
        self.agent = nixlBind.nixlAgent(name, config)
        self.segment = nixlBind.DRAM_SEG
"""
"""As NIXL 1.5 makes its agents."""


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No finder and no module stays."""
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("nixl"):
            del sys.modules[name]


def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, source: str) -> str:
    """A package of NIXL's with this API module; returns the module's name."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / name / "_api.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("helios.nixl_delay.APIS", (*APIS, f"{name}._api"))
    return f"{name}._api"


@pytest.mark.parametrize("first", [True, False])
def test_agents_pause_whether_nixl_is_imported_before_or_after(tmp_path, monkeypatch, first):
    name = package(tmp_path, monkeypatch, "nixl_made_up", API.replace("{config}", "Config"))
    if first:
        importlib.import_module(name)
    delay_when_imported(750)
    api = importlib.import_module(name)
    agent = api.nixl_agent("one")
    assert api.made == [("one", 750)]
    assert (agent.agent, agent.segment) == ("one", 7)  # the rest of the bindings is as it was
    assert api.bindings.nixlAgent is api.agent  # and so are the bindings themselves


def test_a_nixl_that_was_changed_is_left_alone_and_it_is_said(tmp_path, monkeypatch, caplog):
    name = package(tmp_path, monkeypatch, "nixl_changed", API.replace("{config}", "lambda: SimpleNamespace()"))
    delay_when_imported(750)
    with caplog.at_level(logging.WARNING, "vllm.helios"):
        api = importlib.import_module(name)
    assert api.nixlBind is api.bindings
    assert f"{VARIABLE} is ignored" in caplog.text


def test_without_nixl_nothing_happens_and_a_failed_import_is_its_own(tmp_path, monkeypatch):
    name = package(tmp_path, monkeypatch, "nixl_broken", "raise ValueError('broken')")
    delay_when_imported(750)
    with pytest.raises(ModuleNotFoundError, match="nixl_nowhere"):
        importlib.import_module("nixl_nowhere._api")
    with pytest.raises(ValueError, match="broken"):
        importlib.import_module(name)


@pytest.mark.skipif(find_spec("nixl_cu12") is None, reason="NIXL is not installed")
def test_the_real_bindings_have_what_is_set(monkeypatch):
    """The real NIXL, without an agent, which would need its transports: what it is asked for instead is seen."""
    delay_when_imported(1500)
    api = importlib.import_module("nixl_cu12._api")
    config = api.nixlBind.nixlAgentConfig()
    config.pthrDelay = 0
    seen = []
    monkeypatch.setattr(api.nixlBind._bindings, "nixlAgent", lambda name, config: seen.append(config.pthrDelay))
    api.nixlBind.nixlAgent("one", config)
    assert seen == [1500]


@pytest.mark.parametrize(("text", "delay_us"), [(None, None), ("", None), ("0", 0), ("1000", 1000)])
def test_the_variable(text, delay_us):
    assert delay_from({} if text is None else {VARIABLE: text}) == delay_us


@pytest.mark.parametrize("text", ["1ms", "-1", "1.5", "٣", "1000001"])
def test_a_wrong_variable_is_an_error(text):
    with pytest.raises(UsageError, match=VARIABLE):
        delay_from({VARIABLE: text})
