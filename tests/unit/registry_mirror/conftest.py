"""A registry's parts with an upstream that is a table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mirrored import Elsewhere
from tests.unit.registry.conftest import Registry, engine_url

__all__ = ["engine_url", "parts", "upstream"]


@pytest.fixture
def parts(tmp_path: Path, engine_url: str | None) -> Iterator[Registry]:
    opened = Registry.open(tmp_path, engine_url)
    yield opened
    opened.close()


@pytest.fixture
def upstream() -> Elsewhere:
    return Elsewhere()
