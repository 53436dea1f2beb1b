"""Which processes serve a model on a machine and what each of them gets, or why the machine does not suffice.

No I/O: ``helios.launch.machine`` looks at the machine, ``helios.launch.model_info`` at the model. Figures of memory are
estimates that err on the large side: weights count as they lie on disk, and the memory of a process beside them is what
vLLM took where it was measured (``PROCESS``, on a CPU) or usually takes (``GPU_PROCESS``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from helios.cli.common import size_text
from helios.errors import Unavailable, UsageError
from helios.launch.model_info import ModelInfo

Role = Literal["both", "prefill", "decode"]

PROCESS: Final = 1_700_000_000
"""Main memory of one vLLM beside weights and KV cache, in bytes: its three processes on a CPU, measured with 0.32."""
SEQUENCES: Final = 8
"""Requests at a time for which a CPU's KV cache is made."""
POSITIONS: Final = 4096
"""Longest sequence on a CPU, in tokens, where nobody says otherwise."""
POSITIONS_LEAST: Final = 1024
"""A model that could not hold a sequence of so many tokens (or its longest) is not worth a start."""
KV_LEAST: Final = 64 << 20
KV_SHARE: Final = 0.25
"""Most of the available memory that all KV caches may take on a CPU."""
BOUND_LEAST: Final = 2
RESERVED: Final = 2
"""Cores of a process that are left to its scheduler and its transfers, as vLLM itself does, where it has more than
``BOUND_LEAST``."""
GPU_PROCESS: Final = 3_000_000_000
"""Memory of a GPU that vLLM takes beside weights and KV cache, in bytes: CUDA's context, activations, graphs."""
GPU_SHARE: Final = 0.9
"""Most of a GPU's memory that is given to vLLM, its own default."""
GPU_MARGIN: Final = 300_000_000
"""What stays free of a GPU's free memory, in bytes: vLLM refuses to start where it finds less than it was promised."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU: its number, as the driver counts, and its memory in bytes."""

    index: int
    free: int
    total: int


@dataclass(frozen=True, slots=True)
class Machine:
    """``cores``: the logical CPUs of each core that may be used, near ones side by side; ``memory``: what is available
    of main memory, in bytes; ``gpus``: empty where the model runs on the CPU."""

    cores: Sequence[tuple[int, ...]]
    memory: int
    gpus: Sequence[Gpu] = ()


@dataclass(frozen=True, slots=True)
class Model:
    """``weights`` in bytes."""

    name: str
    weights: int
    info: ModelInfo


@dataclass(frozen=True, slots=True)
class Wish:
    """How many processes of each role; none of both: one process that does both. ``gpus``: those to use, empty: any.
    ``each``: GPUs of one process, 0: as many as it needs, or its part of ``gpus``. ``positions``: the longest sequence
    that has to fit, in tokens, 0: nobody says. ``alone``: the role of the one process, whose counterparts are on other
    machines."""

    prefill: int = 0
    decode: int = 0
    gpus: tuple[int, ...] = ()
    each: int = 0
    positions: int = 0
    alone: Role = "both"

    def __post_init__(self) -> None:
        """Raises UsageError for a wish that no machine can fulfil."""
        if bool(self.prefill) != bool(self.decode):
            raise UsageError(
                "prefill and decode workers need each other, and there are none of one kind",
                hint="Write --prefill N --decode M with both at least 1, or neither for one worker that does both.",
            )
        if len(set(self.gpus)) < len(self.gpus):
            raise UsageError(f"a GPU is listed twice: {','.join(map(str, self.gpus))}")

    @property
    def apart(self) -> bool:
        """Whether prompts are computed by other processes than answers."""
        return bool(self.prefill)

    @property
    def roles(self) -> list[tuple[Role, str]]:
        """Each process' role and its name."""
        if not self.apart:
            return [(self.alone, "vllm")]
        wanted: list[tuple[Role, int]] = [("prefill", self.prefill), ("decode", self.decode)]
        return [(role, f"vllm-{role}-{n}") for role, count in wanted for n in range(1, count + 1)]


@dataclass(frozen=True, slots=True)
class Placement:
    """What one process gets. ``cores``: logical CPUs that its threads are bound to, empty: vLLM chooses; ``kv``: its KV
    cache in bytes; ``positions``: the longest sequence in tokens, 0: the model's; ``share``: the part of each GPU's
    memory that it may take, 0: vLLM's default."""

    role: Role
    name: str
    cores: tuple[int, ...] = ()
    gpus: tuple[int, ...] = ()
    kv: int = 0
    positions: int = 0
    share: float = 0.0

    @property
    def side_channel(self) -> bool:
        """Whether it hands KV blocks over or takes them, for which it needs ports of its own."""
        return self.role != "both"


class Cache(NamedTuple):
    """A KV cache on a CPU in bytes, and the longest sequence in tokens; 0: the model's own."""

    kv: int
    positions: int


def cpu_cache(info: ModelInfo, most: int) -> Cache:
    """The KV cache on a CPU that takes ``most`` bytes at most (``KV_LEAST`` at least): sequences are shortened until
    one fits. Models for embeddings are not shortened."""
    most = max(KV_LEAST, most)
    positions = min(info.positions, POSITIONS)
    if info.kv_bytes and info.task != "embedding":
        positions = max(1, min(positions, most // info.kv_bytes))
    kv = min(most, max(KV_LEAST, SEQUENCES * positions * info.kv_bytes))
    # Only to shorten: vLLM may know a lower limit than config.json and refuses to start above it.
    return Cache(kv, 0 if positions == info.positions or info.task == "embedding" else positions)


def check_role(name: str, info: ModelInfo, wish: Wish) -> None:
    """Raises UsageError for a model that has nothing to decode where prompts are to be computed apart."""
    if (wish.apart or wish.alone != "both") and info.task == "embedding":
        raise UsageError(
            f"{name} ({info.architecture}) makes embeddings: it has nothing to decode",
            hint="Leave --prefill and --decode out, or the role.",
        )


def plan(machine: Machine, model: Model, wish: Wish) -> tuple[Placement, ...]:
    """A placement for each process that is wished for; raises Unavailable where the machine does not suffice, with
    what is needed and what there is, UsageError for a model that has nothing to decode."""
    check_role(model.name, model.info, wish)
    if machine.gpus:
        return _on_gpus(machine, model, wish)
    if wish.gpus:
        raise Unavailable("this machine has no GPU that could be used", hint="Leave --gpu out to serve on the CPU.")
    return _on_cpu(machine, model, wish)


def kv_needed(info: ModelInfo, positions: int) -> int:
    """The smallest KV cache with which the model is of use, in bytes; ``positions`` is the wish's."""
    if info.task == "embedding":
        return KV_LEAST
    return max(KV_LEAST, (positions or min(info.positions, POSITIONS_LEAST)) * info.kv_bytes)


def _on_cpu(machine: Machine, model: Model, wish: Wish) -> tuple[Placement, ...]:
    roles = wish.roles
    kv = kv_needed(model.info, wish.positions)
    _memory_suffices(machine, model, len(roles), kv)
    shares: list[tuple[int, ...]] = [()] if len(roles) == 1 else _cores(machine, model, len(roles))
    spare = machine.memory - len(roles) * (PROCESS + model.weights)
    most = max(kv, min(int(machine.memory * KV_SHARE), spare) // len(roles))
    cache = cpu_cache(model.info, most)
    positions = 0 if wish.positions else cache.positions  # who says it says it to vLLM
    return tuple(
        Placement(role, name, cores, kv=max(kv, cache.kv), positions=positions)
        for (role, name), cores in zip(roles, shares, strict=True)
    )


def _memory_suffices(machine: Machine, model: Model, count: int, kv: int) -> None:
    needed = count * (PROCESS + model.weights + kv)
    if needed > machine.memory:
        each = f"{size_text(PROCESS)} of its own, {size_text(model.weights)} of weights, {size_text(kv)} of KV cache"
        fewer = "" if count == 1 else "ask for fewer processes, "
        raise Unavailable(
            f"{model.name} needs {size_text(needed)} of memory for {_processes(count)} ({each}), "
            f"{size_text(machine.memory)} are available",
            hint=f"Stop what else runs on this machine, {fewer}or serve a smaller model.",
        )


def _cores(machine: Machine, model: Model, count: int) -> list[tuple[int, ...]]:
    """The logical CPUs that the threads of each of ``count`` processes are bound to.

    Cores are shared out whole, as vLLM itself uses one logical CPU of each, unless there are fewer than processes.
    """
    cpus = [core[-1] for core in machine.cores]
    if len(cpus) < count:
        cpus = [cpu for core in machine.cores for cpu in core]
    if len(cpus) < count:
        raise Unavailable(
            f"{model.name} needs a core for each of {count} vLLM processes, {len(cpus)} may be used here",
            hint="Ask for fewer processes with --prefill and --decode.",
        )
    size, more = divmod(len(cpus), count)
    found, at = [], 0
    for n in range(count):
        mine = cpus[at : at + size + (n < more)]
        at += len(mine)
        found.append(tuple(mine[: max(BOUND_LEAST, len(mine) - RESERVED)]))
    return found


def _on_gpus(machine: Machine, model: Model, wish: Wish) -> tuple[Placement, ...]:
    roles = wish.roles
    gpus = _usable(machine, wish)
    found = sizes(model, wish, len(roles), len(gpus))
    needed = kv_needed(model.info, wish.positions)
    for size in found:
        taken = gpus[: len(roles) * size] if wish.gpus else sorted(gpus[: len(roles) * size], key=lambda gpu: gpu.index)
        groups = [taken[n * size : (n + 1) * size] for n in range(len(roles))]
        caches = [_gpu_cache(model, group) for group in groups]
        if min(caches) >= needed:
            return tuple(
                Placement(role, name, gpus=tuple(gpu.index for gpu in group), kv=kv, share=_share(group))
                for (role, name), group, kv in zip(roles, groups, caches, strict=True)
            )
    each = GPU_PROCESS + part(model.weights + needed, found[-1])
    free = ", ".join(f"{size_text(_share([gpu]) * gpu.total)} on GPU {gpu.index}" for gpu in gpus)
    raise Unavailable(
        f"{model.name} needs {size_text(each)} on each GPU for {_processes(len(roles))} of {found[-1]} "
        f"({size_text(GPU_PROCESS)} of vLLM's own, its part of {size_text(model.weights)} of weights and of "
        f"{size_text(needed)} of KV cache), available are {free}",
        hint="Stop what else uses the GPUs, ask for fewer processes, or serve a smaller model.",
    )


def _usable(machine: Machine, wish: Wish) -> list[Gpu]:
    """The GPUs to choose from: those that were listed, in their order, or all, the freest first."""
    if not wish.gpus:
        return sorted(machine.gpus, key=lambda gpu: (-gpu.free, gpu.index))
    found = {gpu.index: gpu for gpu in machine.gpus}
    missing = [index for index in wish.gpus if index not in found]
    if missing:
        raise Unavailable(
            f"there is no GPU {missing[0]} that may be used here: there are {', '.join(map(str, sorted(found)))}",
            hint="nvidia-smi lists the GPUs; CUDA_VISIBLE_DEVICES may hide some.",
        )
    return [found[index] for index in wish.gpus]


def sizes(model: Model, wish: Wish, count: int, gpus: int) -> list[int]:
    """How many GPUs one process may get, to be tried in this order. A tensor-parallel model's attention heads are
    shared out evenly, so their number must be a multiple."""
    most = gpus // count
    least = max(1, wish.each)
    if most < least:
        raise Unavailable(
            f"{model.name} needs {count * least} GPUs for {_processes(count)} of {least}, {gpus} may be used here",
            hint="Ask for fewer processes with --prefill and --decode; a GPU is not shared by two of them.",
        )
    if wish.each:
        return [wish.each]
    if wish.gpus and gpus % count:
        raise Unavailable(
            f"{gpus} GPUs can't be shared out evenly among {_processes(count)}",
            hint=f"List a multiple of {count} with --gpu.",
        )
    tried = [most] if wish.gpus else [1 << n for n in range(most.bit_length())]
    fits = [size for size in tried if not model.info.heads % size]
    if not fits:
        raise Unavailable(
            f"{model.name} has {model.info.heads} attention heads, which {tried[0]} GPUs can't share evenly",
            hint="List another number of GPUs with --gpu.",
        )
    return fits


def _share(group: Sequence[Gpu]) -> float:
    """The part of each GPU's memory that a process on these may take, in hundredths."""
    return min(max(0, int(min(GPU_SHARE, (gpu.free - GPU_MARGIN) / gpu.total) * 100)) for gpu in group) / 100


def _gpu_cache(model: Model, group: Sequence[Gpu]) -> int:
    """KV cache of a process on these GPUs in bytes; negative where not even the weights fit."""
    least = min(int(_share(group) * gpu.total) for gpu in group)
    return (least - GPU_PROCESS - part(model.weights, len(group))) * len(group)


def part(value: int, parts: int) -> int:
    """Each one's part of something that is shared out evenly, rounded up."""
    return -(-value // parts)


def _processes(count: int) -> str:
    return "1 vLLM process" if count == 1 else f"{count} vLLM processes"
