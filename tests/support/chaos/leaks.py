"""What a router holds, as seen from outside: counters, descriptors, threads, tasks, memory, connections to workers."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Final

from tests.support.chaos.board import Count
from tests.support.chaos.fleet import Fleet
from tests.support.routing import RouterProcess

INSIDE: Final = Path(__file__).parent / "inside"
"""In the router's PYTHONPATH: its processes then write what they hold on SIGUSR2 (``sitecustomize.py``)."""
ZERO: Final = (
    "helios_router_in_flight",
    "helios_router_in_flight_tokens",
    "helios_router_queued",
    "helios_router_queued_bytes",
)
OBJECTS: Final = 1500
"""Python objects by which caches and metrics may grow; a request that is not let go costs more than ten."""
ANSWER_S: Final = 10.0


@dataclass(frozen=True)
class Held:
    """What one process holds."""

    files: int
    tasks: int
    objects: int
    """Of Python's that the collector knows."""


def held(pid: int, where: Path) -> Held:
    """``where``: the directory in which the process writes (HELIOS_CHAOS_INSIDE)."""
    file, end = where / str(pid), time.monotonic() + ANSWER_S
    file.unlink(missing_ok=True)
    os.kill(pid, signal.SIGUSR2)
    while not file.exists():
        if time.monotonic() > end:
            raise RuntimeError(f"process {pid} does not say what it holds")
        time.sleep(0.01)
    tasks, objects = map(int, file.read_text().split())
    return Held(len(os.listdir(f"/proc/{pid}/fd")), tasks, objects)


def resident(pid: int) -> int:
    """Bytes of the process's own memory."""
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found[1]) << 10 if found else 0


def most(router: RouterProcess, where: Path) -> Held:
    """The most that any data process holds."""
    each = [held(pid, where) for pid in router.pids()]
    return Held(*(max(counts) for counts in zip(*map(astuple, each), strict=True)))


def left_over(router: RouterProcess, fleet: Fleet, where: Path, start: Held, processes: int) -> list[str]:
    """What is there beyond the start, once everything has ended."""
    problems = [f"{name} is {value:g}" for name in ZERO if (value := router.metric(name))]
    problems += [f"workers: {name.name.lower()} {n}" for name in (Count.BUSY, Count.OPEN) if (n := fleet.count(name))]
    pids = router.pids()
    if len(pids) != processes or len(router.pids("control")) != 1:
        problems.append(f"{len(pids)} data processes")
    for pid in pids:
        now = held(pid, where)
        if now.files > start.files or now.tasks > start.tasks or now.objects > start.objects + OBJECTS:
            problems.append(f"process {pid} has {now}, at the start {start}")
    return problems


def settle(look: Callable[[], list[str]], within_s: float) -> list[str]:
    """What is left over when the time is up, looked at until it is nothing."""
    end = time.monotonic() + within_s
    while problems := look():
        if time.monotonic() > end:
            return problems
        time.sleep(0.2)
    return []
