"""The memory pool: what stays, to the byte, and that it is what was verified."""

from __future__ import annotations

import random
import threading
import tracemalloc
from collections.abc import Sequence

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from helios.errors import UsageError
from helios.metrics import MountMetrics
from heliosfs.store.chunking import cut_plain, grid
from heliosfs.store.recipe import MAX_CHUNK, Recipe
from heliosfs.tiers.memory import AHEAD, APART_S, GUARDED, HOT, Kind, MemoryPolicy
from heliosfs.tiers.pool import MAPPED, SMALL_BYTES, Pool, charge, owned

KIB, MIB = 1 << 10, 1 << 20
GUARDS = (Kind.SMALL, Kind.HEADER, Kind.RECIPE)


class Traffic(RuleBasedStateMachine):
    """Anything may come, be used and go, in any order; beside it, a plain table of what must be there."""

    @initialize(limit=st.integers(0, 200))
    def start(self, limit: int) -> None:
        self.policy = MemoryPolicy(limit)
        self.held: dict[bytes, tuple[int, Kind]] = {}
        self.now = 0.0

    @rule(key=st.integers(0, 30), cost=st.integers(1, 80), kind=st.sampled_from(Kind))
    def put(self, key: int, cost: int, kind: Kind) -> None:
        name, before = b"%d" % key, dict(self.held)
        gone = self.policy.put(name, cost, kind, self.now)
        if gone is None:
            if name not in self.policy:
                self.held.pop(name, None)
                chunks = self.policy.limit - self.guarded()
                room = {Kind.CHUNK: chunks, Kind.READAHEAD: int(chunks * AHEAD)}
                assert cost > room.get(kind, int(self.policy.limit * GUARDED)), "it had room and was refused"
            return
        self.held[name] = (cost, kind)
        for other in gone:
            old = self.held.pop(other)
            assert kind in GUARDS or old[1] not in GUARDS, "a chunk pushed out what is guarded"
            assert kind is not Kind.CHUNK or old[1] is Kind.CHUNK, "a chunk pushed out what is read ahead"
        if kind in GUARDS and before.get(name, (0, Kind.CHUNK))[1] in GUARDS:
            raise AssertionError("it was there")

    @rule(key=st.integers(0, 30))
    def use(self, key: int) -> None:
        held = self.held.get(b"%d" % key)
        assert self.policy.use(b"%d" % key, self.now) == (None if held is None else held[1])

    @rule(key=st.integers(0, 30))
    def drop(self, key: int) -> None:
        assert self.policy.drop(b"%d" % key) == (self.held.pop(b"%d" % key, None) is not None)

    @rule(seconds=st.floats(0, 3 * APART_S))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: hasattr(self, "policy"))
    @invariant()
    def agrees(self) -> None:
        assert {key for key in self.held if key in self.policy} == set(self.held)
        assert len(self.policy) == len(self.held)
        for kind in Kind:
            assert self.policy.bytes_of[kind] == sum(cost for cost, of in self.held.values() if of is kind)
        assert self.policy.used <= self.policy.limit
        assert self.guarded() <= self.policy.limit * GUARDED
        ahead = sum(cost for cost, of in self.held.values() if of is Kind.READAHEAD)
        assert ahead <= (self.policy.limit - self.guarded()) * AHEAD

    def guarded(self) -> int:
        return sum(cost for cost, kind in self.held.values() if kind in GUARDS)


TestTraffic = Traffic.TestCase


def test_weights_that_pass_push_out_neither_small_files_nor_what_is_hot() -> None:
    policy = MemoryPolicy(100)
    for name in (b"config", b"header"):
        assert policy.put(name, 10, Kind.SMALL, 0.0) == []
    for name in (b"hot-1", b"hot-2"):
        policy.put(name, 10, Kind.CHUNK, 0.0)
        policy.use(name, APART_S)
    for number in range(1000):
        now = 20.0 + number
        policy.put(b"%d" % number, 10, Kind.CHUNK, now)
        for _ in range(32):
            policy.use(b"%d" % number, now)  # one pass reads a chunk in pieces
    assert all(name in policy for name in (b"config", b"header", b"hot-1", b"hot-2", b"999"))
    assert policy.used == 100, "and the room is used"


def test_what_is_hot_leaves_room_for_what_comes() -> None:
    policy = MemoryPolicy(100)
    for number in range(10):
        policy.put(b"%d" % number, 10, Kind.CHUNK, 0.0)
    for number in range(10):
        policy.use(b"%d" % number, APART_S)
    policy.put(b"new", 10, Kind.CHUNK, APART_S)
    assert b"new" in policy
    assert sum(b"%d" % number in policy for number in range(10)) == 9 >= 10 * HOT


def test_what_is_guarded_takes_the_room_of_chunks_up_to_its_share() -> None:
    policy = MemoryPolicy(100)
    for number in range(10):
        policy.put(b"chunk-%d" % number, 10, Kind.CHUNK, 0.0)
    for number in range(10):
        policy.put(b"small-%d" % number, 10, Kind.SMALL, 0.0)
    assert policy.bytes_of[Kind.SMALL] == 70
    assert policy.bytes_of[Kind.CHUNK] == 30
    assert b"small-9" in policy
    assert b"small-0" not in policy, "the least recently used went"


def test_what_is_read_ahead_stays_until_it_is_dropped() -> None:
    policy = MemoryPolicy(100)
    policy.put(b"ahead", 10, Kind.READAHEAD, 0.0)
    for number in range(100):
        policy.put(b"%d" % number, 10, Kind.CHUNK, float(number))
    assert b"ahead" in policy
    assert policy.used == 100
    assert policy.drop(b"ahead")


def test_what_is_kept_for_its_use_is_not_let_go_as_read_ahead() -> None:
    parts = [b"a" * 100, b"b" * 100]
    recipe, pool = recipe_of(parts), pool_of(MIB)
    pool.offer("model.bin", recipe, 0, memoryview(parts[0]), stored=False, ahead=True)
    assert pool.report().bytes["small"], "a small file's chunk is guarded, whoever asked for it"
    large = recipe_of([b"c" * (SMALL_BYTES // 8)] * 9)
    pool = pool_of(64 * MIB)
    for index, ahead in ((0, False), (0, True)):
        pool.offer("model.bin", large, index, memoryview(b"c" * (SMALL_BYTES // 8)), stored=False, ahead=ahead)
    pool.let_go(large, 0)
    assert pool.has(large, 0)


def recipe_of(data: Sequence[bytes]) -> Recipe:
    return Recipe.build("0" * 64, [(blake3(part).digest(), len(part)) for part in data])


def pool_of(limit: int) -> Pool:
    return Pool(limit, MountMetrics(), lambda: 0.0)


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=12),
    offset=st.integers(0, 3000),
    count=st.integers(1, 3000),
    absent=st.sets(st.integers(0, 11)),
)
def test_a_read_gives_the_files_bytes_or_nothing(lengths: list[int], offset: int, count: int, absent: set[int]) -> None:
    parts = [bytes([number + 1]) * length for number, length in enumerate(lengths)]
    whole, recipe, pool = b"".join(parts), recipe_of(parts), pool_of(MIB)
    count = min(count, max(0, len(whole) - offset))
    for index, part in enumerate(parts):
        if index not in absent:
            pool.offer("config.json", recipe, index, memoryview(part), stored=False)
    found = pool.read(recipe, offset, count)
    if any(index in absent for index in recipe.covering(offset, count)):
        assert found is None
    else:
        assert found is not None
        assert b"".join(found) == whole[offset : offset + count]


def test_a_copy_does_not_change_with_the_buffer_it_came_in() -> None:
    for size in (100, MAPPED, MAX_CHUNK):
        buffer = bytearray(b"a" * size)
        recipe, pool = recipe_of([bytes(buffer)]), pool_of(64 * MIB)
        kept = pool.offer("a.json", recipe, 0, memoryview(buffer), stored=True)
        buffer[:] = b"b" * size
        assert kept == pool.get(recipe, 0) == b"a" * size
        assert kept is not None
        assert kept.readonly


def test_what_is_kept_depends_on_the_file() -> None:
    pool = pool_of(64 * MIB)

    def kept(path: str, size: int, index: int, *, stored: bool, edges: bool = False) -> bool:
        lengths = cut_plain(size) if edges else list(grid(0, size))
        recipe = Recipe.build("0" * 64, [(bytes([number]) + b"%31d" % size, n) for number, n in enumerate(lengths)])
        data = memoryview(bytes(lengths[index]))
        return pool.offer(path, recipe, index, data, stored=stored) is not None

    assert kept("tokenizer.json", 9 * MIB, 1, stored=True)
    assert kept("tiny.safetensors", 1000, 0, stored=True)
    assert kept("model.safetensors", 40 * MIB, 0, stored=True), "its header"
    assert kept("model.gguf", 44 * MIB, 0, stored=True)
    assert kept("finer.gguf", 48 * MIB, 0, stored=True, edges=True)
    assert kept("finer.gguf", 48 * MIB, 6, stored=True, edges=True), "its header's chunks are all those of the 4 MiB"
    assert not kept("finer.gguf", 48 * MIB, 7, stored=True, edges=True)
    assert not kept("model.safetensors", 40 * MIB, 1, stored=True), "the disk has it, and the page cache"
    assert kept("model.safetensors", 40 * MIB, 1, stored=False)
    assert not kept("data.txt", SMALL_BYTES + 1, 0, stored=True), "not small"
    assert {kind: size > 0 for kind, size in pool.report().bytes.items()} == {
        "small": True,
        "header": True,
        "recipe": False,
        "chunk": True,
        "readahead": False,
    }
    assert not kept("model.safetensors", 40 * MIB, 1, stored=True), "and the one that the disk has now is let go"
    assert pool.report().bytes["chunk"] == 0


def test_without_room_nothing_is_kept() -> None:
    pool, recipe = pool_of(0), recipe_of([b"x" * 100])
    assert pool.offer("config.json", recipe, 0, memoryview(b"x" * 100), stored=False) is None
    pool.offer_recipe("00" * 32, recipe.encode())
    assert pool.recipe("00" * 32, recipe.blob, 100) is None
    assert pool.read(recipe, 0, 10) is None
    assert pool.used == 0
    with pytest.raises(UsageError):
        pool_of(-1)


def test_recipes_are_found_by_their_digest() -> None:
    pool, recipe = pool_of(MIB), recipe_of([b"x" * 100])
    pool.offer_recipe(recipe.digest, recipe.encode())
    assert pool.recipe(recipe.digest, recipe.blob, 100) == recipe
    assert pool.recipe("00" * 32, recipe.blob, 100) is None
    assert pool.recipe(recipe.digest, recipe.blob, 101) is None
    assert pool.recipe(recipe.digest, "1" * 64, 100) is None


def test_the_bound_counts_the_tables_too() -> None:
    """Thousands of the smallest entries: what Python really takes for them is within what was charged."""
    parts = [b"%d" % number for number in range(4000)]
    recipe, pool = recipe_of(parts), pool_of(len(parts) * charge(4) * 4)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for index, part in enumerate(parts):
            pool.offer("config.json", recipe, index, memoryview(part), stored=False)
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert pool.report().entries == len(parts)
    assert taken <= pool.used


def test_threads_that_offer_and_read_at_once_get_right_bytes_within_the_bound() -> None:
    parts = [bytes([number]) * (1000 + number) for number in range(60)]
    recipe, pool = recipe_of(parts), pool_of(40 * KIB)
    wrong: list[int] = []
    found = 0

    def work(seed: int) -> None:
        nonlocal found
        draw = random.Random(seed)
        for _ in range(2000):
            index = draw.randrange(60)
            pool.offer("model.bin", recipe, index, memoryview(parts[index]), stored=draw.random() < 0.1)
            other = draw.randrange(59)
            start = recipe.span(other)[0]
            pieces = pool.read(recipe, start + 10, len(parts[other]))  # ends in the next chunk
            if pieces is not None:
                found += 1
                expected = parts[other][10:] + parts[other + 1][:10]
                wrong.extend([other] if b"".join(pieces) != expected else [])
            if pool.used > 40 * KIB:
                wrong.append(-1)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert found > 100
    assert len(pool._data) == len(pool._policy) == pool.report().entries


def test_memory_goes_back_when_chunks_go() -> None:
    """What was pushed out is no longer the process's, whatever malloc would have kept."""
    from helios.metrics import rss_bytes

    pool = pool_of(12 * MIB)
    recipe = Recipe.build("0" * 64, [(b"%32d" % number, MAX_CHUNK) for number in range(40)])
    data = memoryview(bytes(MAX_CHUNK))
    before = rss_bytes()
    for index in range(40):
        pool.offer("model.bin", recipe, index, data, stored=False)
        assert pool.used <= 12 * MIB
    assert rss_bytes() - before < 12 * MIB + 8 * MIB
    last = owned(data)
    del pool
    assert len(last) == MAX_CHUNK
