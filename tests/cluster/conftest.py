"""A real control plane for the tests of this directory, which nothing else collects: `make test-cluster`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.control_plane import ControlPlane


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    root: Path = tmp_path_factory.mktemp("control-plane")
    plane = ControlPlane(root)
    try:
        plane.start()
        yield plane
    finally:
        plane.close()
