"""The tier's policy on traces that were fixed before it was chosen, beside LRU, LFU and Belady, on held-out seeds."""

from __future__ import annotations

import pytest

from tests.support.replay import Belady, Cache, Kept, Lfu, Lru, Ratios, capacity, replay
from tests.support.traces import HELD_OUT, TRACES

NEAR = 0.95
"""Of the best online policy, on each trace."""


def mean(ratios: list[Ratios]) -> Ratios:
    return Ratios(sum(r.objects for r in ratios) / len(ratios), sum(r.bytes for r in ratios) / len(ratios))


@pytest.mark.parametrize("share", [0.1, 0.3])
@pytest.mark.parametrize("name", TRACES)
def test_hit_ratios_beside_lru_lfu_and_belady(name: str, share: float, record_property) -> None:
    found: dict[str, list[Ratios]] = {"kept": [], "lru": [], "lfu": [], "belady": []}
    for seed in HELD_OUT:
        trace = list(TRACES[name](seed))
        size = capacity(trace, share)
        caches: dict[str, Cache] = {
            "kept": Kept(size),
            "lru": Lru(size),
            "lfu": Lfu(size),
            "belady": Belady(size, trace),
        }
        for kind, cache in caches.items():
            found[kind].append(replay(trace, cache))
    kept, lru, lfu, belady = (mean(found[kind]) for kind in ("kept", "lru", "lfu", "belady"))
    for kind, ratios in (("kept", kept), ("lru", lru), ("lfu", lfu), ("belady", belady)):
        record_property(kind, f"{ratios.objects:.3f} of opens, {ratios.bytes:.3f} of bytes")
        print(f"{name:9} {share:.0%} {kind:7} {ratios.objects:.3f} {ratios.bytes:.3f}")
    assert kept.objects >= NEAR * max(lru.objects, lfu.objects)
    assert kept.bytes >= NEAR * max(lru.bytes, lfu.bytes)
    assert kept.bytes <= belady.bytes, "nobody knows the future"


def test_the_same_trace_gives_the_same_cache() -> None:
    trace = list(TRACES["scans"](HELD_OUT[0]))
    one, other = Kept(capacity(trace, 0.2)), Kept(capacity(trace, 0.2))
    assert replay(trace, one) == replay(trace, other)
    assert list(one.policy.entries) == list(other.policy.entries)
    assert one.policy.reserved == one.policy.leaving == 0
