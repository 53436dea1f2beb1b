"""Bytes of memory by pool: main memory, and that of each GPU. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from helios.cli.common import size_text

Pools = Mapping[str, int]
"""Bytes by the name of the pool; one that is not there has none."""
MAIN: Final = "memory"
NOTHING: Final[Pools] = {}


def gpu_pool(index: int) -> str:
    """The name of a GPU's pool; ``index`` as the driver counts."""
    return f"GPU {index}"


def plus(*parts: Pools) -> dict[str, int]:
    """All of them together."""
    found: dict[str, int] = {}
    for part in parts:
        for pool, size in part.items():
            found[pool] = found.get(pool, 0) + size
    return found


def minus(whole: Pools, part: Pools) -> dict[str, int]:
    """What is left; negative where the part is larger."""
    return {pool: whole.get(pool, 0) - part.get(pool, 0) for pool in {**whole, **part}}


def larger(one: Pools, other: Pools) -> dict[str, int]:
    """Of each pool the larger of both."""
    return {pool: max(one.get(pool, 0), other.get(pool, 0)) for pool in {**one, **other}}


def lacks(need: Pools, free: Pools) -> list[str]:
    """The pools that have less than is needed; a need of nothing is met whatever there is."""
    return [pool for pool, size in need.items() if size > 0 and size > free.get(pool, 0)]


def text(size: Pools, among: Iterable[str] | None = None) -> str:
    """For people; ``among``: these pools alone."""
    names = [pool for pool in sorted(size) if size[pool] > 0] if among is None else sorted(among)
    parts = [size_text(max(0, size.get(name, 0))) + _where(name) for name in names]
    return ", ".join(parts) or "nothing"


def _where(pool: str) -> str:
    return " of memory" if pool == MAIN else f" on {pool}"
