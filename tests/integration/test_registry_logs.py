"""What a registry logs of errors fails the test that has started it, unless that expects it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.command import Command
from tests.support.hub_site import Site, write
from tests.support.registry import log_problems, running_registry

NOBODY_CAUGHT = """Traceback (most recent call last):
  File "x.py", line 1, in <module>
ValueError: no"""
CRASHED = "Fatal Python error: Segmentation fault\n\nThread 0x1 (most recent call first):"


def ask_for_what_is_gone(root: Path, errors: str | None = None, later: str | None = None) -> None:
    """A file whose record was taken from the store; the registry's log has an error of it."""
    helios = Command(root / "home")
    with running_registry(helios, errors=errors) as registry:
        helios("push", str(write(root / "m", {"config.json": b"{}"})), "org/m")
        for path in (root / "home" / "store" / "public" / "recipes").rglob("*"):
            if path.is_file():
                path.unlink()
        if later is not None:
            registry.expect_errors(later)
        site = Site(registry, {}, "", "", root, helios)
        assert site.ask("GET", "/org/m/resolve/main/config.json")[0] == 502


def test_an_error_in_the_log_fails_the_test(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="the store has a gap"):
        ask_for_what_is_gone(tmp_path / "none-expected")
    with pytest.raises(pytest.fail.Exception, match="the store has a gap"):
        ask_for_what_is_gone(tmp_path / "another-expected", "a chunk in the store is damaged", "a copy is damaged")
    ask_for_what_is_gone(tmp_path / "expected", errors="the store has a gap")
    ask_for_what_is_gone(tmp_path / "expected-later", later="the store has a gap")


def test_what_is_an_error_in_a_log(tmp_path: Path) -> None:
    """Each start has a log of its own; a traceback inside of a record belongs to that."""
    quiet = json.dumps({"level": "warning", "message": "odd", "error": NOBODY_CAUGHT})
    error = json.dumps({"level": "error", "message": "a request broke the registry", "error": NOBODY_CAUGHT})
    log = tmp_path / "log"
    log.write_text("\n".join(["a line of a library", quiet, NOBODY_CAUGHT, quiet, error, CRASHED]))
    assert log_problems(log) == [error, NOBODY_CAUGHT, CRASHED]
    log.write_text(f"{quiet}\n")
    assert log_problems(log) == []
