"""Who gets what when models together want more than there is, or than may be paid for.

A pool is what a ceiling is set on: GPUs of a class, replicas of a tenant, everything. In it, in this order:

1. ``min_replicas`` of each,
2. one replica for each that needs one, so that nobody sleeps because others have much,
3. what each needs beyond,
4. what waits for a window to end, or is there for what is expected.

Within a step a higher ``priority`` goes first. Among equals the next replica goes to who has least of what it wants, by
part; then to who comes first by name. What comes out depends on what is asked and on nothing else, so while that stays
nothing moves. Max-min fairness: Bertsekas and Gallager, Data Networks, 6.5.2.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import msgspec


class Want(msgspec.Struct, frozen=True, kw_only=True):
    """What one model or role wants: the numbers of a ``Decision``."""

    name: str
    replicas: int
    needed: int
    min_replicas: int = 0
    priority: int = 0
    """Higher is more important."""
    pool: str = ""
    units: int = 1
    """What one replica takes of its pool: GPUs."""


def share(wants: Sequence[Want], ceilings: Mapping[str, int]) -> dict[str, int]:
    """Replicas of each by name, at most what it wants. ``ceilings``: units of each pool; one that isn't named has none.
    Raises ValueError for a name that is there twice."""
    granted = {want.name: 0 for want in wants}
    if len(granted) != len(wants):
        raise ValueError("a name is there twice")
    pools: dict[str, list[Want]] = {}
    for want in wants:
        pools.setdefault(want.pool, []).append(want)
    for pool, members in pools.items():
        left = ceilings.get(pool)
        if left is None or sum(want.replicas * want.units for want in members) <= left:
            granted.update((want.name, want.replicas) for want in members)
            continue
        for step in _STEPS:
            for priority in sorted({want.priority for want in members}, reverse=True):
                left = _fill([want for want in members if want.priority == priority], step, granted, left)
    return granted


_STEPS: Final[tuple[Callable[[Want], int], ...]] = (
    lambda want: min(want.replicas, want.min_replicas),
    lambda want: min(want.replicas, max(want.min_replicas, min(1, want.needed))),
    lambda want: min(want.replicas, max(want.min_replicas, want.needed)),
    lambda want: want.replicas,
)
"""How far each step goes."""


def _fill(members: Sequence[Want], step: Callable[[Want], int], granted: dict[str, int], left: int) -> int:
    """Give out replicas one by one, as far as a step goes and while there is room; what is left, in units."""
    line = [(granted[want.name] / most, want.name, most, want) for want in members if (most := step(want))]
    heapq.heapify(line)
    while line:
        part, name, most, want = heapq.heappop(line)
        if part >= 1 or want.units > left:  # somebody smaller may still fit
            continue
        granted[name] += 1
        left -= want.units
        heapq.heappush(line, (granted[name] / most, name, most, want))
    return left
