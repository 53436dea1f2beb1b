"""What models take together: whatever the machine and the model, a place that is offered fits, and the rest is said."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.errors import Unavailable
from helios.launch import launcher, sleep
from helios.launch.model_info import ModelInfo
from helios.launch.needs import GPU_ASLEEP, Budget, Need, needs
from helios.launch.plan import GPU_PROCESS, KV_LEAST, PROCESS, Gpu, Machine, Model, Wish
from helios.launch.pools import MAIN, gpu_pool, lacks, larger, minus, plus, text

GB = 10**9
CORES = [(0,), (1,)]
LLAMA = ModelInfo("LlamaForCausalLM", "chat", 131072, 131072, 32)
H200 = Gpu(0, 140 * GB, 143 * GB)

machines = st.one_of(
    st.builds(lambda memory: Machine(CORES, memory), st.integers(0, 100 * GB)),
    st.builds(
        lambda memory, free: Machine(CORES, memory, [Gpu(n, size, 80 * GB) for n, size in enumerate(free)]),
        st.integers(0, 900 * GB),
        st.lists(st.integers(0, 80 * GB), min_size=1, max_size=8),
    ),
)
models = st.builds(
    Model,
    st.just("org/name"),
    st.integers(0, 200 * GB),
    st.builds(
        ModelInfo, st.just("LlamaForCausalLM"), st.sampled_from(["chat", "embedding"]), st.integers(1, 200_000),
        st.integers(0, 2_000_000), st.sampled_from([0, 8, 40]),
    ),
)  # fmt: skip
wishes = st.builds(Wish, each=st.sampled_from([0, 0, 1, 2, 3]), positions=st.sampled_from([0, 5000]))


def planned(budget: Budget, model: Model, wish: Wish, sleeps: bool) -> tuple[Need, ...] | None:
    """None where it is refused, with figures."""
    try:
        return needs(budget, model, wish, sleeps=sleeps)
    except Unavailable as error:
        refused = error
    assert model.name in refused.message
    assert re.search(r"\d", refused.message)
    return None


@given(machines, models, wishes, st.booleans())
def test_what_is_offered_fits_and_what_is_refused_has_figures(
    machine: Machine, model: Model, wish: Wish, sleeps: bool
) -> None:
    budget = Budget.of(machine)
    found = planned(budget, model, wish, sleeps)
    if found is None:
        return
    used: set[int] = set()
    for need in found:
        gpu_pools = {pool: size for pool, size in need.awake.items() if pool != MAIN}
        assert not lacks(gpu_pools, budget.pools)
        assert set(gpu_pools) == {gpu_pool(index) for index in need.placement.gpus}
        assert not used & set(need.placement.gpus), "places don't overlap"
        used |= set(need.placement.gpus)
        assert need.awake[MAIN] >= PROCESS
        for asleep in need.asleep:
            assert all(asleep[pool] < need.awake[pool] for pool in gpu_pools), "sleep frees something of each GPU"
        size = max(1, len(need.placement.gpus))
        total = sum(gpu_pools.values()) if gpu_pools else need.awake[MAIN]
        process = size * GPU_PROCESS if gpu_pools else PROCESS
        assert total >= process + model.weights + need.placement.kv - size
        assert need.placement.kv >= KV_LEAST - size
    assert bool(found[0].asleep) == (sleeps and bool(machine.gpus))
    if not machine.gpus:
        assert not lacks(found[0].awake, budget.pools)


def test_two_models_share_one_large_gpu_and_a_third_one_lacks_memory() -> None:
    budget = Budget.of(Machine(CORES, 100 * GB, [H200]))
    model = Model("org/8b", 16 * GB, LLAMA)
    (need,) = needs(budget, model, Wish(), sleeps=True)
    assert need.awake["GPU 0"] == GPU_PROCESS + 16 * GB + budget.pools["GPU 0"] // 4
    two = plus(need.awake, need.awake)
    assert not lacks(two, budget.pools)
    assert lacks(plus(two, need.awake), budget.pools) == ["GPU 0"]
    assert need.asleep == ({MAIN: PROCESS + 16 * GB, "GPU 0": GPU_ASLEEP}, {MAIN: PROCESS, "GPU 0": GPU_ASLEEP})
    assert need.placement.share < 0.5


def test_a_budget_is_what_is_allowed_of_what_is_there() -> None:
    machine = Machine(CORES, 100 * GB, [H200, Gpu(1, 50 * GB, 143 * GB)])
    assert Budget.of(machine).pools == {MAIN: 100 * GB, "GPU 0": 1287 * GB // 10, "GPU 1": 49_700_000_000}
    allowed = Budget.of(machine, 10 * GB, 40 * GB)
    assert allowed.pools == {MAIN: 10 * GB, "GPU 0": 40 * GB, "GPU 1": 40 * GB}
    with pytest.raises(Unavailable, match=r"101\.0 GB of memory are allowed, 100\.0 GB are available"):
        Budget.of(machine, 101 * GB)
    with pytest.raises(Unavailable, match=r"60\.0 GB of each GPU are allowed, 49\.7 GB are available on GPU 1"):
        Budget.of(machine, 0, 60 * GB)
    with pytest.raises(Unavailable, match="no GPU"):
        Budget.of(Machine(CORES, GB), 0, GB)


@pytest.mark.parametrize(
    ("device", "arguments", "expected"),
    [
        ("cuda", [], True),
        ("cpu", [], False),
        ("cuda", ["--no-enable-sleep-mode"], False),
        ("cuda", ["--no_enable_sleep_mode", "--dtype", "auto", "--enable-sleep-mode"], True),
    ],
)
def test_sleep_is_used_on_gpus_unless_somebody_says_otherwise(device, arguments, expected) -> None:
    assert sleep.may_sleep(device, arguments) is expected


def test_one_that_may_sleep_listens_on_loopback_whatever_users_say() -> None:
    assert sleep.arguments(["--host", "0.0.0.0"])[-2:] == ["--host", "127.0.0.1"]
    (need,) = needs(Budget.of(Machine(CORES, 100 * GB, [H200])), Model("org/8b", 16 * GB, LLAMA), Wish(), sleeps=True)
    told = launcher.told(need.placement, "cuda", LLAMA, 1234, [], sleeps=True)
    assert told.env["VLLM_SERVER_DEV_MODE"] == "1"
    assert "--enable-sleep-mode" in told.arguments
    assert told.arguments[told.arguments.index("--kv-cache-memory-bytes") + 1] == str(need.placement.kv)
    assert told.env["CUDA_VISIBLE_DEVICES"] == "0"
    awake = launcher.told(need.placement, "cuda", LLAMA, 1234, [], sleeps=False)
    assert "VLLM_SERVER_DEV_MODE" not in awake.env
    assert "--enable-sleep-mode" not in awake.arguments


def test_on_a_cpu_it_is_told_the_cache_that_was_planned() -> None:
    (need,) = needs(Budget.of(Machine(CORES, 30 * GB)), Model("org/1b", 2 * GB, LLAMA), Wish(), sleeps=False)
    told = launcher.told(need.placement, "cpu", LLAMA, 1234, [], sleeps=False)
    cache = int(told.arguments[told.arguments.index("--kv-cache-memory-bytes") + 1])
    assert need.awake == {MAIN: PROCESS + 2 * GB + cache}


def test_pools_are_added_and_taken_from_each_other_by_name() -> None:
    assert plus({"a": 1}, {"a": 2, "b": 3}) == {"a": 3, "b": 3}
    assert minus({"a": 1}, {"b": 3}) == {"a": 1, "b": -3}
    assert larger({"a": 1, "b": 5}, {"a": 2}) == {"a": 2, "b": 5}
    assert lacks({"a": 1, "b": 0}, {"b": -7}) == ["a"]
    assert text({MAIN: 5 * GB, "GPU 0": 10**6}) == "1.0 MB on GPU 0, 5.0 GB of memory"
    assert text({}) == "nothing"
