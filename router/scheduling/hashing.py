"""Rendezvous hashing with bounded loads: which worker owns a key, while none gets much more than its share.

Highest random weight (Thaler and Ravishankar, 1998): each worker draws a number for the key, the highest owns it. A
worker that comes or goes moves only its own keys, and there is no ring to keep for each model. With shares the draw is
``-share / ln(u)`` (Schindelhauer and Schomaker, 2005). Bounded loads (Mirrokni, Thorup and Zadimoghaddam, 2016): a
worker that already has ``factor`` times its share of all requests is passed over, so a popular key spreads over the
workers that come next for it, which are others for each key.

A draw is ``key * seed`` modulo a prime, multiply-shift's older sister (Carter and Wegman, 1979): the draws of two
workers for one key have nothing to do with each other. (CPython's tuple hash would not do: its rounds keep differences
between seeds as they are, so the draws lie on a ring with one place a worker, and some own ten times as much as
others.) Every process of a router, and every router, finds the same owner.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from router.worker import Worker

PRIME: Final = (1 << 61) - 1
_LOWEST: Final = -1
"""No draw is as low."""


def draw(key: int, seed: int) -> int:
    """A worker's draw for a key (both of ``key_of``), from 0 to ``PRIME`` - 1."""
    return key * seed % PRIME


def owner(key: int, candidates: Sequence[Worker], factor: float, floor: int) -> int:
    """Index of the candidate that owns ``key`` (of ``key_of``) among those that may take one more request.

    ``factor`` > 1: how much more than its share a worker may have; ``floor``: so many requests are never too many. One
    candidate always may: all shares together are more than all requests.
    """
    loads = [worker.load.requests for worker in candidates]
    shares = [worker.share for worker in candidates]
    allowed = factor * (sum(loads) + 1)
    if shares.count(shares[0]) == len(shares):
        bound = max(math.ceil(allowed / len(loads)), floor)
        draws = [key * worker.seed % PRIME for worker in candidates]
        while loads[found := draws.index(max(draws))] >= bound:  # seldom twice: most have less than the bound
            draws[found] = _LOWEST
        return found
    each = allowed / sum(shares)
    highest, found = -1.0, 0
    for index, load in enumerate(loads):
        share = shares[index]
        if load < max(math.ceil(each * share), floor):
            drawn_u = (draw(key, candidates[index].seed) + 0.5) / PRIME  # the half keeps it off 0 and 1
            if (rank := -share / math.log(min(drawn_u, 1 - 2**-53))) > highest:
                highest, found = rank, index
    return found
