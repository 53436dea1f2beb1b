"""In a router's PYTHONPATH: on SIGUSR2 a process writes how many tasks and objects it has, as nobody else can."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from pathlib import Path


def _say(number: int, frame: object) -> None:
    try:
        tasks = len(asyncio.all_tasks(asyncio.get_running_loop()))
    except RuntimeError:
        tasks = 0
    file = Path(os.environ["HELIOS_CHAOS_INSIDE"]) / str(os.getpid())
    fresh = file.with_suffix(".new")
    gc.collect()
    fresh.write_text(f"{tasks} {len(gc.get_objects())}")
    fresh.replace(file)


if "HELIOS_CHAOS_INSIDE" in os.environ:
    signal.signal(signal.SIGUSR2, _say)
