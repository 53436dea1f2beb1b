"""The hot cache: bounded, and never keeping what a write has made stale."""

from __future__ import annotations

import pytest

from registry.cache import Cache


def test_loads_once_and_forgets_the_least_recently_used() -> None:
    loads: list[str] = []

    def load(key: str) -> str:
        loads.append(key)
        return key.upper()

    cache: Cache[str, str] = Cache(2)
    for key in ("a", "b", "a", "c", "a", "b"):
        assert cache.get(key, lambda key=key: load(key)) == key.upper()
    assert loads == ["a", "b", "c", "b"]


def test_a_value_read_before_a_write_is_not_kept() -> None:
    cache: Cache[str, int] = Cache(4)
    value = 1

    def load_while_somebody_writes() -> int:
        nonlocal value
        read = value
        value = 2
        cache.clear()
        return read

    assert cache.get("ref", load_while_somebody_writes) == 1
    assert cache.get("ref", lambda: value) == 2


def test_errors_are_not_kept() -> None:
    cache: Cache[str, int] = Cache(4)
    with pytest.raises(ZeroDivisionError):
        cache.get("x", lambda: 1 // 0)
    assert cache.get("x", lambda: 5) == 5
