"""The prefix index: what it claims of a worker is what the worker has."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from router.kv.index import Bounds, KvIndex
from router.kv.wire import pack
from tests.support.kv_events import BLOCK, CLEARED, Cache, decode, encode, removed, stored


def feed(index: KvIndex, payload: bytes | None, worker: str = "w", rank: int = 0) -> None:
    """Take in a payload, to the end."""
    for event in decode(payload) if payload else ():
        if event is not None:
            for _ in event.act(index.rank(worker, rank)):
                pass


def tell(index: KvIndex, *events: dict[str, Any], worker: str = "w", rank: int = 0) -> None:
    feed(index, encode(events), worker, rank)


def score(index: KvIndex, tokens: Sequence[int], worker: str = "w", **more: Any) -> int:
    return index.score(pack(tokens), [worker], **more).get(worker, 0)


def swept(index: KvIndex) -> KvIndex:
    while index.sweep(1):
        pass
    return index


def nothing_held(index: KvIndex) -> bool:
    """Whether an index takes no memory for blocks any more."""
    return (index.held, index.forest.blocks, len(index.forest.nodes), index._trees) == (0, 0, 0, {})


PROMPT = list(range(100, 125))


def test_the_longest_prefix_of_each_worker_counts_and_never_the_last_token() -> None:
    index = KvIndex()
    tell(index, stored([1, 2, 3], None, PROMPT[:12]), worker="a")
    tell(index, stored([9], None, PROMPT[:4]), worker="b")
    workers = ["a", "b", "c"]
    assert index.score(pack(PROMPT), workers) == {"a": 12, "b": 4}
    assert index.score(pack(PROMPT[:12]), workers) == {"a": 8, "b": 4}
    assert index.score(pack(PROMPT[:13]), workers) == {"a": 12, "b": 4}
    assert index.score(pack(PROMPT[:7] + [0] * 9), workers) == {"a": 4, "b": 4}
    assert index.score(pack(PROMPT), ["b", "c"]) == {"b": 4}
    assert index.score(b"", workers) == {}
    assert index.score(pack([1] * 25), workers) == {}


def test_equal_names_of_two_workers_are_two_names() -> None:
    index = KvIndex()
    tell(index, stored([1], None, PROMPT[:4]), worker="a")
    tell(index, stored([1], None, PROMPT[4:8]), worker="b")
    assert index.score(pack(PROMPT), ["a", "b"]) == {"a": 4}
    assert index.score(pack(PROMPT[4:]), ["a", "b"]) == {"b": 4}


def test_what_was_removed_in_the_middle_comes_back_with_what_follows() -> None:
    index = KvIndex()
    tell(index, stored([1, 2, 3, 4], None, PROMPT[:16]), removed([2]))
    assert score(index, PROMPT) == 4
    tell(index, stored([2], 1, PROMPT[4:8]))
    assert score(index, PROMPT) == 16
    tell(index, removed([4, 3, 2, 1]))
    assert nothing_held(index)


def test_a_part_that_was_split_off_and_removed_takes_no_memory() -> None:
    index = KvIndex()
    tell(index, stored([1, 2], None, PROMPT[:8]), stored([3], 1, [0] * 4), removed([2, 3]))
    (left,) = index.forest.nodes.values()
    assert (left.children, left.rest, index.forest.blocks) == ({}, None, 1)


def test_a_block_of_two_copies_is_gone_with_the_second() -> None:
    index = KvIndex()
    tell(index, stored([1, 2], None, PROMPT[:8]), stored([2], 1, PROMPT[4:8]), removed([2]))
    assert score(index, PROMPT) == 8
    tell(index, removed([2]))
    assert score(index, PROMPT) == 4


def test_a_report_of_what_was_reused_is_no_second_copy() -> None:
    index = KvIndex()
    tell(index, stored([1, 2], None, PROMPT[:8]), stored([1, 2], None, PROMPT[:8]), removed([2, 1]))
    assert score(index, PROMPT) == 0


def test_adapters_and_salts_are_apart() -> None:
    index = KvIndex()
    tell(
        index,
        stored([1], None, PROMPT[:4]),
        stored([2, 3], None, PROMPT[:8], lora_id=1, lora_name="sql", extra_keys=[["sql"], ["sql"]]),
        stored([4, 5, 6], None, PROMPT[:12], extra_keys=[["pepper"], None, None]),
        stored([7], 6, PROMPT[12:16]),
    )
    assert score(index, PROMPT) == 4
    assert score(index, PROMPT, adapter="sql") == 8
    assert score(index, PROMPT, salt="pepper") == 16
    assert score(index, PROMPT, adapter="sql", salt="pepper") == 0
    assert score(index, PROMPT, adapter="other") == 0


def test_a_chain_ends_where_the_router_cannot_see_what_was_hashed() -> None:
    """The tokens of two images are the same; the blocks are not."""
    index = KvIndex()
    tell(index, stored([1, 2, 3], None, PROMPT[:12], extra_keys=[None, [["image-1", 2]], None]))
    tell(index, stored([4], 3, PROMPT[12:16]))
    assert score(index, PROMPT) == 4
    assert index.skipped == {"opaque": 1, "orphan": 1}


def test_a_rank_is_a_cache_of_its_own() -> None:
    index = KvIndex()
    tell(index, stored([1, 2], None, PROMPT[:8]), rank=0)
    tell(index, stored([1], None, PROMPT[:4]), rank=1)
    tell(index, CLEARED, rank=0)
    assert score(index, PROMPT) == 4
    tell(index, stored([1, 2], None, PROMPT[:8]), rank=0)
    assert score(index, PROMPT) == 8
    index.forget("w")
    assert score(index, PROMPT) == 0
    assert nothing_held(swept(index))


def test_a_block_in_cpu_memory_outlives_its_removal_from_the_gpu() -> None:
    index = KvIndex()
    cpu = stored([2], None, [], 0, medium="CPU")
    tell(index, stored([1, 2], None, PROMPT[:8]), cpu, removed([2]))
    assert score(index, PROMPT) == 8
    tell(index, removed([2], medium="CPU"))
    assert score(index, PROMPT) == 4
    tell(index, removed([1]), stored([1], None, PROMPT[:4], medium="CPU"), stored([1], None, PROMPT[:4]))
    tell(index, removed([1], medium="CPU"))
    assert score(index, PROMPT) == 4
    tell(index, removed([1]))
    assert nothing_held(index)


def test_what_is_not_followed_is_counted_and_claims_nothing() -> None:
    index = KvIndex()
    tell(
        index,
        stored([1], None, PROMPT[:4], kv_cache_spec_kind="sliding_window", group_idx=1),
        stored([2], None, PROMPT[:4], medium="STORAGE"),
        stored([3], None, PROMPT[:3]),
        stored([4], 99, PROMPT[:4]),
        stored([5], None, PROMPT[:4], 0),
        removed([1], medium="STORAGE"),
    )
    assert nothing_held(index)
    assert index.skipped == {"unsupported": 3, "malformed": 2, "orphan": 1}
    tell(index, stored([6], None, PROMPT[:4], group_idx=1), removed([6], group_idx=1))
    assert index.skipped["group"] == 2  # the first one followed was 0


def test_a_worker_of_another_block_size_is_found_too() -> None:
    index = KvIndex()
    tell(index, stored([1, 2], None, PROMPT[:16], 8), worker="a")
    tell(index, stored([1, 2, 3], None, PROMPT[:12]), stored([4], 2, PROMPT[8:16], 8), worker="b")
    assert index.score(pack(PROMPT), ["a", "b"]) == {"a": 16, "b": 12}
    assert index.skipped == {"orphan": 1}


def test_bounds_forget_the_ends_of_what_was_left_alone_longest() -> None:
    index = KvIndex(Bounds(per_rank=6))
    shared = PROMPT[:8]
    tell(index, stored([1, 2], None, shared), stored([3, 4], 2, [1] * 8), stored([5, 6], 2, [2] * 8))
    tell(index, stored([7], 2, [3] * 4))
    assert score(index, [*shared, *[1] * 9]) == 12
    tell(index, stored([8, 9], 7, [3] * 8))
    assert score(index, [*shared, *[1] * 9]) == 8
    assert score(index, [*shared, *[2] * 9]) == 12
    assert score(index, [*shared, *[3] * 13]) == 20
    assert (index.held, index.forgotten) == (6, 3)
    tell(index, removed([3, 4, 5, 6, 1, 2, 7, 8, 9]))  # the worker goes on as if nothing were forgotten
    assert nothing_held(index)


def test_the_bound_of_all_is_met_at_the_cost_of_the_largest() -> None:
    index = KvIndex(Bounds(per_rank=1000, total=600))
    rng = random.Random(1)
    small = PROMPT[:8]
    tell(index, stored([1, 2], None, small), worker="small")
    for number in range(50):
        names = [1000 + 100 * number + i for i in range(20)]
        tell(index, stored(names, None, [rng.randrange(1000) for _ in range(80)]), worker="large")
        assert index.held <= 600
        assert index.forest.blocks <= 600
    assert index.held > 300
    assert score(index, [*small, 0], "small") == 8


def test_blocks_that_are_kept_for_the_path_alone_are_bounded_too() -> None:
    """A worker that holds only the last block of each of many long prefixes."""
    index = KvIndex(Bounds(per_rank=100, total=400))
    for number in range(60):
        names = [1000 + 100 * number + i for i in range(20)]
        tell(index, stored(names, None, [number] * 80), removed(names[:-1]))
        assert index.forest.blocks <= 400


def test_a_long_prefix_is_stored_and_found_in_pieces() -> None:
    index = KvIndex()
    rng = random.Random(2)
    tokens = [rng.randrange(150_000) for _ in range(BLOCK * 3000 + 1)]
    tell(index, stored(range(3000), None, tokens[:-1]), worker="a")
    tell(index, stored(range(3000), None, tokens[:-1]), worker="b")
    tell(index, removed(range(2999, 1999, -1)), worker="b")
    assert index.score(pack(tokens), ["a", "b"]) == {"a": 12000, "b": 8000}
    other = tokens[:4000] + [0] * 4000
    tell(index, stored(range(5000, 6000), 999, other[4000:]), worker="a")
    assert index.score(pack([*other, 1]), ["a", "b"]) == {"a": 8000, "b": 4000}
    assert index.score(pack(tokens), ["a", "b"]) == {"a": 12000, "b": 8000}
    tell(index, removed([*range(3000), *range(5000, 6000)]), worker="a")
    tell(index, removed(range(2000)), worker="b")
    assert nothing_held(index)


@pytest.mark.parametrize("seed", range(5))
def test_a_worker_that_lies_breaks_nothing(seed: int) -> None:
    """Names used again for other blocks, twice in an event, removed before they were stored."""
    rng = random.Random(seed)
    index = KvIndex(Bounds(per_rank=60, total=90))
    honest = Cache()
    honest.compute(PROMPT)
    feed(index, honest.flush(), "honest")
    for _ in range(300):
        count = rng.randrange(1, 6)
        names = [rng.randrange(12) for _ in range(count)]
        tokens = [rng.randrange(2) for _ in range(count * BLOCK)]
        parent = rng.choice([None, rng.randrange(12)])
        event = rng.choice([stored(names, parent, tokens), removed(names), stored(names, None, [], 0, medium="CPU")])
        tell(index, event, worker="liar", rank=rng.randrange(2))
        assert score(index, PROMPT, "honest") == 24
        if rng.random() < 0.05:
            index.forget("liar", rng.randrange(2))
    index.forget("liar")
    index.forget("honest")
    assert nothing_held(swept(index))


TOKENS = st.lists(st.integers(0, 1), min_size=BLOCK, max_size=BLOCK * 5)
ADAPTER = st.sampled_from([None, None, "sql"])
SALT = st.sampled_from([None, None, "pepper"])
WORKER = st.integers(0, 2)


class IndexModel(RuleBasedStateMachine):
    """Three workers' caches change in any way; the index claims of each exactly what it has."""

    @initialize(arrays=st.booleans())
    def start(self, arrays: bool) -> None:
        self.arrays = arrays
        self.index = KvIndex()
        self.caches = [Cache(seed) for seed in range(3)]
        self.asked: list[tuple[list[int], str | None, str | None]] = []

    def flush(self, worker: int) -> None:
        feed(self.index, self.caches[worker].flush(arrays=self.arrays), str(worker))

    @rule(worker=WORKER, tokens=TOKENS, adapter=ADAPTER, salt=SALT)
    def request(self, worker: int, tokens: list[int], adapter: str | None, salt: str | None) -> None:
        self.asked.append((tokens, adapter, salt))
        self.caches[worker].compute(tokens, adapter, salt)
        self.flush(worker)

    @rule(worker=WORKER, tokens=TOKENS)
    def two_at_once(self, worker: int, tokens: list[int]) -> None:
        """The second stores copies, unless it would be all of a known chain, which might be a report."""
        cache = self.caches[worker]
        cache.compute(tokens)
        if len(tokens) >= 2 * BLOCK and (known := cache.prefixes(tokens)[0]) in cache.copies:
            new = cache.prefixes(tokens)[1:]
            for prefix in new:
                cache.copies[prefix] = cache.copies.get(prefix, 0) + 1
            names = [cache.name(prefix) for prefix in new]
            end = (1 + len(new)) * BLOCK
            cache.events.append(stored(names, cache.name(known), tokens[BLOCK:end]))
        self.flush(worker)

    @precondition(lambda self: any(cache.copies for cache in self.caches))
    @rule(data=st.data())
    def evict(self, data: Any) -> None:
        worker = data.draw(st.sampled_from([n for n, cache in enumerate(self.caches) if cache.copies]))
        cache = self.caches[worker]
        cache.remove(data.draw(st.sampled_from(sorted(cache.copies, key=repr))))
        self.flush(worker)

    @precondition(lambda self: any(cache.copies for cache in self.caches))
    @rule(data=st.data())
    def offload(self, data: Any) -> None:
        worker = data.draw(st.sampled_from([n for n, cache in enumerate(self.caches) if cache.copies]))
        cache = self.caches[worker]
        cache.offload(data.draw(st.sampled_from(sorted(cache.copies, key=repr))))
        self.flush(worker)

    @precondition(lambda self: any(cache.on_cpu for cache in self.caches))
    @rule(data=st.data())
    def unload(self, data: Any) -> None:
        worker = data.draw(st.sampled_from([n for n, cache in enumerate(self.caches) if cache.on_cpu]))
        cache = self.caches[worker]
        cache.unload(data.draw(st.sampled_from(sorted(cache.on_cpu, key=repr))))
        self.flush(worker)

    @rule(worker=WORKER)
    def clear(self, worker: int) -> None:
        self.caches[worker].clear()
        self.flush(worker)

    @rule(worker=WORKER)
    def restart(self, worker: int) -> None:
        self.caches[worker] = Cache(worker + 10)
        self.index.forget(str(worker))

    @rule()
    def sweep(self) -> None:
        self.index.sweep(1)

    @invariant()
    def claims_are_true(self) -> None:
        for tokens, adapter, salt in self.asked[-8:]:
            prompt = [*tokens, 0]
            claims = self.index.score(pack(prompt), ["0", "1", "2"], adapter, salt)
            truth = {str(n): cache.longest(prompt, adapter, salt) for n, cache in enumerate(self.caches)}
            assert claims == {worker: count for worker, count in truth.items() if count}

    @invariant()
    def memory_is_for_what_is_held(self) -> None:
        if not any(cache.copies or cache.on_cpu for cache in self.caches):
            assert nothing_held(swept(self.index))

    def teardown(self) -> None:
        for worker in range(3):
            self.index.forget(str(worker))
        assert nothing_held(swept(self.index))


TestIndex = IndexModel.TestCase
TestIndex.settings = settings(max_examples=60, stateful_step_count=40, suppress_health_check=[HealthCheck.too_slow])
