"""What this machine has for vLLM: cores, memory that is available, GPUs."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final, Literal

from helios.errors import Unavailable
from helios.launch.plan import Gpu, Machine

Device = Literal["cpu", "cuda"]
SMI_S: Final = 30.0
"""Longest wait for nvidia-smi, in seconds: it may have to wake the driver."""
CELLS: Final = 4
QUERY: Final = ("nvidia-smi", "--query-gpu=index,uuid,memory.free,memory.total", "--format=csv,noheader,nounits")


def find_device() -> Device:
    """``cuda`` where an NVIDIA driver lists a GPU."""
    if not shutil.which("nvidia-smi"):
        return "cpu"
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=SMI_S, check=False)
    return "cuda" if done.returncode == 0 and "GPU" in done.stdout else "cpu"


def read_machine(device: Device, environ: Mapping[str, str]) -> Machine:
    """Look at this machine; raises Unavailable where it does not say what it has."""
    cores = find_cores(os.sched_getaffinity(0))
    if device == "cpu":
        return Machine(cores, available_memory())
    done = subprocess.run(QUERY, capture_output=True, text=True, timeout=SMI_S, check=False)
    if done.returncode:
        raise Unavailable(f"nvidia-smi does not say which GPUs there are: {(done.stderr or done.stdout).strip()}")
    gpus = read_gpus(done.stdout, environ.get("CUDA_VISIBLE_DEVICES"))
    if not gpus:
        raise Unavailable(
            "no GPU may be used", hint="CUDA_VISIBLE_DEVICES hides those that nvidia-smi lists; unset it."
        )
    return Machine(cores, available_memory(), gpus)


def find_cores(allowed: Collection[int], system: Path = Path("/sys/devices/system")) -> list[tuple[int, ...]]:
    """The logical CPUs of each core, of those that are ``allowed``; cores of one NUMA node side by side."""
    node_of = {
        cpu: int(path.parent.name.removeprefix("node"))
        for path in system.glob("node/node[0-9]*/cpulist")
        for cpu in _numbers(path.read_text())
    }
    cores = set()
    for cpu in allowed:
        siblings = system / f"cpu/cpu{cpu}/topology/thread_siblings_list"
        together = _numbers(siblings.read_text()) if siblings.exists() else {cpu}
        cores.add(tuple(sorted(together & set(allowed) | {cpu})))
    return sorted(cores, key=lambda core: (node_of.get(core[0], 0), core))


def _numbers(text: str) -> set[int]:
    """The numbers of a list as the kernel writes it: ``0-3,8``."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            found.update(range(int(first), int(last or first) + 1))
    return found


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of memory that new processes may take: the machine's, or what the cgroup's limit leaves if that is less."""
    available: int | None = None
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    if available is None:
        raise Unavailable("/proc/meminfo does not say how much memory is available")
    return min([available, *_cgroup_leaves(root)])


def _cgroup_leaves(root: Path) -> list[int]:
    """What is left of the limit of each cgroup (version 2) that this process is in, in bytes. The page cache counts as
    used there but gives way, hence ``inactive_file``."""
    lines = (root / "proc/self/cgroup").read_text().splitlines()
    path = next((line[3:].strip("/") for line in lines if line.startswith("0::")), None)
    if path is None:
        return []
    top = root / "sys/fs/cgroup"
    found = []
    here = top / path
    for directory in [here, *here.parents][: len(here.relative_to(top).parts) + 1]:
        limit = directory / "memory.max"
        if limit.exists() and (text := limit.read_text().strip()) != "max":
            used = int((directory / "memory.current").read_text())
            stat = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
            found.append(max(0, int(text) - used + int(stat.get("inactive_file", 0))))
    return found


def read_gpus(text: str, visible: str | None) -> list[Gpu]:
    """What nvidia-smi answered to ``QUERY``, of it what CUDA_VISIBLE_DEVICES shows (numbers or UUIDs; None: all)."""
    names = None if visible is None else {name.strip() for name in visible.split(",") if name.strip()}
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != CELLS or not all(cell.isdecimal() for cell in cells[2:]):
            continue  # memory that it can't tell ([N/A]), as of one that shares the host's
        index, uuid, free, total = cells
        if names is None or index in names or any(uuid.startswith(name) for name in names):
            found.append(Gpu(int(index), int(free) << 20, int(total) << 20))
    return found
