"""What the models of a machine may take together, and what one of them takes: awake, and asleep. No I/O.

Figures are those of ``plan``. A vLLM that sleeps (its sleep mode, on GPUs) keeps ``GPU_ASLEEP`` of each GPU and what
its processes take of main memory; at level 1 its weights lie there, too, and the memory that they lay in stays the
process' own after it woke (github.com/vllm-project/vllm/issues/16663).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from helios.cli.common import size_text
from helios.errors import Unavailable
from helios.launch.plan import (
    GPU_MARGIN,
    GPU_PROCESS,
    GPU_SHARE,
    KV_SHARE,
    PROCESS,
    Gpu,
    Machine,
    Model,
    Placement,
    Wish,
    kv_needed,
    part,
    plan,
    sizes,
)
from helios.launch.pools import MAIN, Pools, gpu_pool

GPU_ASLEEP: Final = 1_500_000_000
"""What a vLLM that sleeps keeps of each GPU, in bytes: CUDA's context and what was not made by vLLM's own allocator.
1.14 GB were seen on each of four GPUs (github.com/vllm-project/vllm/issues/32714)."""
LEVELS: Final = (1, 2)
"""vLLM's levels of sleep: weights go to main memory, or nowhere."""
HUNDREDTHS: Final = 100


@dataclass(frozen=True, slots=True)
class Need:
    """What a model takes at one place of the machine. ``asleep``: at each of ``LEVELS``; empty: it can't sleep."""

    placement: Placement
    awake: Pools
    asleep: tuple[Pools, ...] = ()


@dataclass(frozen=True, slots=True)
class Budget:
    """What all models together may take. ``pools`` in bytes; ``machine`` has no more than that."""

    machine: Machine
    pools: Pools

    @classmethod
    def of(cls, machine: Machine, memory: int = 0, gpu_memory: int = 0) -> Budget:
        """``memory`` and ``gpu_memory`` (of each GPU) are what somebody allows, in bytes; 0: all that is available, and
        of a GPU what vLLM may take of it. Raises Unavailable where there is less than is allowed."""
        if memory > machine.memory:
            raise Unavailable(
                f"{size_text(memory)} of memory are allowed, {size_text(machine.memory)} are available",
                hint="Say less with --memory, leave it out, or stop what else runs on this machine.",
            )
        if gpu_memory and not machine.gpus:
            raise Unavailable("this machine has no GPU that could be used", hint="Leave --gpu-memory out.")
        gpus = []
        for gpu in machine.gpus:
            most = max(0, min(int(GPU_SHARE * gpu.total), gpu.free - GPU_MARGIN))
            if gpu_memory > most:
                raise Unavailable(
                    f"{size_text(gpu_memory)} of each GPU are allowed, {size_text(most)} are available on GPU "
                    f"{gpu.index}",
                    hint="Say less with --gpu-memory, leave it out, or stop what else uses the GPU.",
                )
            gpus.append(Gpu(gpu.index, gpu_memory or most, gpu.total))
        allowed = Machine(machine.cores, memory or machine.memory, gpus)
        return cls(allowed, {MAIN: allowed.memory} | {gpu_pool(gpu.index): gpu.free for gpu in gpus})


def needs(budget: Budget, model: Model, wish: Wish, *, sleeps: bool) -> tuple[Need, ...]:
    """Where one process that serves the model may be, each place as good as the others, and what it takes there.

    ``sleeps``: whether an engine on GPUs is told that it may. Raises Unavailable, with figures, for a model that
    would not fit if it were alone.
    """
    if budget.machine.gpus:
        return _on_gpus(budget, model, wish, sleeps)
    (placement,) = plan(budget.machine, model, wish)
    return (Need(placement, {MAIN: PROCESS + model.weights + placement.kv}),)


def _on_gpus(budget: Budget, model: Model, wish: Wish, sleeps: bool) -> tuple[Need, ...]:
    gpus = sorted(budget.machine.gpus, key=lambda gpu: gpu.index)
    least = kv_needed(model.info, wish.positions)
    each = 0
    for size in sizes(model, wish, 1, len(gpus)):
        each = GPU_PROCESS + part(model.weights, size) + part(least, size)
        groups = [gpus[at : at + size] for at in range(0, len(gpus) - size + 1, size)]
        if fits := [group for group in groups if all(each <= gpu.free for gpu in group)]:
            return tuple(_group(model, group, part(least, size), sleeps) for group in fits)
    free = ", ".join(f"{size_text(gpu.free)} on GPU {gpu.index}" for gpu in gpus)
    raise Unavailable(
        f"{model.name} needs {size_text(each)} on each GPU ({size_text(GPU_PROCESS)} of vLLM's own, its part of "
        f"{size_text(model.weights)} of weights and of {size_text(least)} of KV cache), models may take {free}",
        hint="Serve a smaller model, or allow more with --gpu-memory.",
    )


def _group(model: Model, group: Sequence[Gpu], least: int, sleeps: bool) -> Need:
    """A model leaves room for others: on each GPU its KV cache takes a quarter of what may be taken, if not ``least``.

    The share is what vLLM makes sure to find free (it looks when it has taken some of its own) before it loads weights;
    its cache has to be told to it in bytes."""
    free = min(gpu.free for gpu in group)
    fixed = GPU_PROCESS + part(model.weights, len(group))
    cache = min(max(least, int(KV_SHARE * free)), free - fixed)
    share = max(1, min((fixed + cache - GPU_PROCESS) * HUNDREDTHS // gpu.total for gpu in group)) / HUNDREDTHS
    main = len(group) * PROCESS
    awake = {MAIN: main} | {gpu_pool(gpu.index): fixed + cache for gpu in group}
    rest = {gpu_pool(gpu.index): GPU_ASLEEP for gpu in group}
    asleep = ({MAIN: main + model.weights} | rest, {MAIN: main} | rest) if sleeps else ()
    indexes = tuple(gpu.index for gpu in group)
    return Need(Placement("both", "vllm", gpus=indexes, kv=cache * len(group), share=share), awake, asleep)
