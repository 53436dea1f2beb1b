"""Something done right after another's import, once, and nothing where it is never imported."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helios.after_import import after_import


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module that can be imported and was not yet; no finder of ours stays."""
    (tmp_path / "waited_for.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield "waited_for"
    sys.modules.pop("waited_for", None)


def test_it_is_done_once_the_module_is_there(module):
    seen: list[int] = []
    after_import(module, lambda found: seen.append(found.value))
    assert (seen, module in sys.modules) == ([], False)
    found = importlib.import_module(module)
    importlib.import_module(module)
    assert seen == [1]
    assert type(found.__spec__.loader).__module__ == "_frozen_importlib_external"  # as without us
    assert found.__loader__ is found.__spec__.loader


def test_it_is_done_at_once_for_a_module_that_is_there(module):
    importlib.import_module(module)
    seen: list[int] = []
    after_import(module, lambda found: seen.append(found.value))
    assert seen == [1]


def test_several_are_all_done(module):
    seen: list[str] = []
    after_import(module, lambda _: seen.append("first"))
    after_import(module, lambda _: seen.append("second"))
    importlib.import_module(module)
    assert sorted(seen) == ["first", "second"]


def test_an_error_is_the_imports_and_the_next_import_is_an_ordinary_one(module):
    def fail(_: object) -> None:
        raise ValueError("no")

    after_import(module, fail)
    with pytest.raises(ValueError, match="no"):
        importlib.import_module(module)
    assert importlib.import_module(module).value == 1


def test_looking_for_the_module_does_not_count_as_importing_it(module):
    """vLLM asks find_spec whether a package is there before it decides to import it."""
    seen: list[int] = []
    after_import(module, lambda found: seen.append(found.value))
    assert importlib.util.find_spec(module) is not None
    assert seen == []
    importlib.import_module(module)
    assert seen == [1]
