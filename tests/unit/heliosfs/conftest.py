"""Origins for the filesystem's tests: real servers on loopback that can be told to fail."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.origin import Origin


@pytest.fixture
def origin() -> Iterator[Origin]:
    with Origin() as origin:
        yield origin


@pytest.fixture
def other() -> Iterator[Origin]:
    """A second source."""
    with Origin() as origin:
        yield origin
