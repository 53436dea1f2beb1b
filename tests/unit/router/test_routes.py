"""The allow-list says what it must and nothing else."""

from __future__ import annotations

from router.routes import ROUTES
from tests.fakes.vllm.verify import ADMINISTRATION


def test_no_administrative_path_is_on_it() -> None:
    paths = [route.path for route in ROUTES]
    assert len(paths) == len(set(paths))
    assert not set(paths) & set(ADMINISTRATION)
    for path in paths:
        assert path.startswith("/")
        assert path == path.lower()
        assert not any(mark in path for mark in ("%", "//", "..", "{", "?", ";"))
