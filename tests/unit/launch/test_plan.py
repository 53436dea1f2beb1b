"""Planning: whatever the machine, model and wish, nothing is given twice, all of it fits, or the reason has figures."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.errors import Unavailable, UsageError
from helios.launch.model_info import ModelInfo
from helios.launch.plan import (
    GPU_MARGIN,
    GPU_PROCESS,
    GPU_SHARE,
    KV_LEAST,
    PROCESS,
    Gpu,
    Machine,
    Model,
    Placement,
    Wish,
    cpu_cache,
    plan,
)

GB = 10**9
LLAMA = ModelInfo("LlamaForCausalLM", "chat", 131072, 131072, 32)
SMALL = Model("org/small", 2 * GB, LLAMA)
CORES = [(0, 8), (1, 9), (2, 10), (3, 11)]

infos = st.builds(
    ModelInfo,
    st.just("LlamaForCausalLM"),
    st.sampled_from(["chat", "completion"]),
    st.integers(1, 200_000),
    st.integers(0, 2_000_000),
    st.sampled_from([0, 6, 8, 32, 40]),
)
models = st.builds(Model, st.just("org/name"), st.integers(0, 200 * GB), infos)
wishes = st.one_of(
    st.builds(Wish, positions=st.sampled_from([0, 1, 3000])),
    st.builds(Wish, st.integers(1, 4), st.integers(1, 4), positions=st.sampled_from([0, 500])),
)


@st.composite
def cpu_machines(draw: st.DrawFn) -> Machine:
    threads = draw(st.integers(1, 2))
    cores = draw(st.integers(1, 20))
    return Machine([tuple(c + cores * t for t in range(threads)) for c in range(cores)], draw(st.integers(0, 900 * GB)))


@st.composite
def gpu_machines(draw: st.DrawFn) -> Machine:
    gpus = []
    for index in range(draw(st.integers(1, 9))):
        total = draw(st.sampled_from([16 * GB, 80 * GB, 140 * GB]))
        gpus.append(Gpu(index, draw(st.integers(0, total)), total))
    return Machine(CORES, 900 * GB, gpus)


def planned(machine: Machine, model: Model, wish: Wish) -> tuple[Placement, ...] | None:
    """None where it is refused, with figures."""
    try:
        return plan(machine, model, wish)
    except Unavailable as error:
        refused = error
    assert model.name in refused.message or "GPU" in refused.message
    assert re.search(r"\d", refused.message)
    assert refused.hint
    return None


@given(cpu_machines(), models, wishes)
def test_on_a_cpu_all_fits_and_no_core_is_given_twice(machine: Machine, model: Model, wish: Wish) -> None:
    found = planned(machine, model, wish)
    if found is None:
        return
    roles = [one.role for one in found]
    assert roles == (["prefill"] * wish.prefill + ["decode"] * wish.decode or ["both"])
    assert len({one.name for one in found}) == len(found)
    assert sum(PROCESS + model.weights + one.kv for one in found) <= machine.memory
    cpus = [cpu for one in found for cpu in one.cores]
    assert len(set(cpus)) == len(cpus)
    assert set(cpus) <= {cpu for core in machine.cores for cpu in core}
    for one in found:
        assert bool(one.cores) == (len(found) > 1), "one alone is left to vLLM"
        assert one.kv >= KV_LEAST
        longest = wish.positions or one.positions or model.info.positions
        assert one.kv >= longest * model.info.kv_bytes, "a sequence of the longest kind fits"
        assert one.positions <= model.info.positions
        assert len({(other.kv, other.positions) for other in found}) == 1, "both ends of a transfer are alike"


@given(cpu_machines(), models, wishes, st.integers(0, 100 * GB))
def test_what_fits_also_fits_with_more_memory(machine: Machine, model: Model, wish: Wish, more: int) -> None:
    if planned(machine, model, wish) is not None:
        assert planned(replace(machine, memory=machine.memory + more), model, wish) is not None


@given(gpu_machines(), models, wishes, st.integers(0, 3))
def test_on_gpus_all_fits_and_none_is_given_twice(machine: Machine, model: Model, wish: Wish, each: int) -> None:
    wish = replace(wish, each=each)
    found = planned(machine, model, wish)
    if found is None:
        return
    gpus = {gpu.index: gpu for gpu in machine.gpus}
    given_away = [index for one in found for index in one.gpus]
    assert len(set(given_away)) == len(given_away)
    for one in found:
        size = len(one.gpus)
        assert size == (each or size) > 0
        assert each or model.info.heads % size == 0
        assert one.kv >= min(model.info.positions, 1024) * model.info.kv_bytes
        for index in one.gpus:
            promised = one.share * gpus[index].total
            assert promised <= min(GPU_SHARE * gpus[index].total + 1, gpus[index].free - GPU_MARGIN)
            assert model.weights / size + one.kv / size + GPU_PROCESS <= promised + size


@given(gpu_machines(), models, wishes)
def test_listed_gpus_are_all_used_and_no_other(machine: Machine, model: Model, wish: Wish) -> None:
    listed = tuple(gpu.index for gpu in machine.gpus if gpu.index % 2)
    if not listed:
        return
    found = planned(machine, model, replace(wish, gpus=listed))
    if found is not None:
        assert [index for one in found for index in one.gpus] == list(listed)


def test_two_processes_share_the_cores_and_leave_some_to_their_schedulers():
    prefill, decode = plan(Machine(CORES, 64 * GB), SMALL, Wish(1, 1))
    assert (prefill.role, prefill.name, prefill.cores) == ("prefill", "vllm-prefill-1", (8, 9))
    assert (decode.role, decode.name, decode.cores) == ("decode", "vllm-decode-1", (10, 11))
    many = Machine([(n,) for n in range(13)], 64 * GB)
    assert [one.cores for one in plan(many, SMALL, Wish(1, 1))] == [(0, 1, 2, 3, 4), (7, 8, 9, 10)]
    assert [one.cores for one in plan(Machine([(0, 1)], 64 * GB), SMALL, Wish(1, 1))] == [(0,), (1,)]


def test_too_little_memory_is_said_with_the_figures():
    with pytest.raises(Unavailable, match=r"org/small needs 7\.7 GB of memory for 2 vLLM processes") as caught:
        plan(Machine(CORES, 7 * GB), SMALL, Wish(1, 1))
    assert "1.7 GB of its own, 2.0 GB of weights, 134.2 MB of KV cache" in caught.value.message
    assert "7.0 GB are available" in caught.value.message
    assert plan(Machine(CORES, 7 * GB), SMALL, Wish())[0].kv == 7 * GB // 4


def test_too_few_cores_and_gpus_are_said():
    with pytest.raises(Unavailable, match="a core for each of 3 vLLM processes, 2 may be used here"):
        plan(Machine([(0, 1)], 64 * GB), SMALL, Wish(2, 1))
    one = Machine(CORES, 64 * GB, [Gpu(0, 70 * GB, 80 * GB)])
    with pytest.raises(Unavailable, match="needs 2 GPUs for 2 vLLM processes of 1, 1 may be used here"):
        plan(one, SMALL, Wish(1, 1))
    with pytest.raises(Unavailable, match="no GPU 3 that may be used here: there are 0"):
        plan(one, SMALL, Wish(gpus=(3,)))
    with pytest.raises(Unavailable, match="no GPU that could be used"):
        plan(Machine(CORES, 64 * GB), SMALL, Wish(gpus=(0,)))
    large = replace(SMALL, weights=90 * GB)
    with pytest.raises(Unavailable, match=r"needs 93\.1 GB on each GPU .* 90\.0 GB of weights .* 69\.6 GB on GPU 0"):
        plan(one, large, Wish())


def test_gpus_are_taken_as_few_as_suffice_the_freest_first():
    four = [Gpu(0, 20 * GB, 80 * GB), Gpu(1, 79 * GB, 80 * GB), Gpu(2, 78 * GB, 80 * GB), Gpu(3, 79 * GB, 80 * GB)]
    machine = Machine(CORES, 64 * GB, four)
    (alone,) = plan(machine, SMALL, Wish())
    assert (alone.gpus, alone.share) == ((1,), 0.9)
    (wide,) = plan(machine, replace(SMALL, weights=100 * GB), Wish())
    assert wide.gpus == (1, 3)
    assert [one.gpus for one in plan(machine, SMALL, Wish(1, 1))] == [(1,), (3,)]
    assert [one.gpus for one in plan(machine, SMALL, Wish(1, 1, gpus=(3, 2, 1, 0)))] == [(3, 2), (1, 0)]
    assert plan(machine, SMALL, Wish(gpus=(0,)))[0].share == 0.24, "others use the rest"
    with pytest.raises(Unavailable, match="3 GPUs can't be shared out evenly among 2 vLLM processes"):
        plan(machine, SMALL, Wish(1, 1, gpus=(1, 2, 3)))
    with pytest.raises(Unavailable, match="32 attention heads, which 3 GPUs"):
        plan(machine, SMALL, Wish(gpus=(1, 2, 3)))


def test_a_length_that_is_asked_for_has_to_fit():
    machine = Machine(CORES, 20 * GB)
    (one,) = plan(machine, SMALL, Wish(positions=100_000))
    assert (one.kv, one.positions) == (100_000 * LLAMA.kv_bytes, 0)
    with pytest.raises(Unavailable, match=r"17\.2 GB of KV cache"):
        plan(machine, SMALL, Wish(positions=131_072))


@pytest.mark.parametrize("wish", [{"prefill": 1}, {"decode": 2}, {"gpus": (1, 1)}])
def test_wishes_that_no_machine_can_fulfil(wish):
    with pytest.raises(UsageError):
        Wish(**wish)


def test_a_model_for_embeddings_decodes_nothing():
    bert = Model("org/bert", GB, ModelInfo("BertModel", "embedding", 512, 36864, 12))
    with pytest.raises(UsageError, match=r"org/bert \(BertModel\) makes embeddings"):
        plan(Machine(CORES, 64 * GB), bert, Wish(1, 1))
    (one,) = plan(Machine(CORES, 64 * GB), bert, Wish())
    assert one.kv == cpu_cache(bert.info, 16 * GB).kv


def test_one_process_may_have_its_counterparts_elsewhere():
    (one,) = plan(Machine(CORES, 64 * GB), SMALL, Wish(alone="decode"))
    assert (one.role, one.name, one.cores, one.side_channel) == ("decode", "vllm", (), True)
    embedding = Model("a/b", GB, ModelInfo("BertModel", "embedding", 512, 0, 12))
    with pytest.raises(UsageError, match="nothing to decode"):
        plan(Machine(CORES, 64 * GB), embedding, Wish(alone="prefill"))
