"""One load: the tensors of a folder's safetensors files by name, in memory of the CPU or of a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from typing import Any, Final

from helios.config import LoaderSettings
from heliosfs.loader.memory import DeviceMemory, HostMemory, Memory
from heliosfs.loader.pipeline import Limits, deliver
from heliosfs.loader.shards import choose_files, read_headers
from heliosfs.loader.sources import Folder, Source
from heliosfs.loader.staging import Device, Ring

MIB: Final = 1 << 20
PART: Final = 16 * MIB
"""Bytes that a thread reads at a time; also the size of a staging buffer."""

STALL_S: Final = 300.0
"""Sources give up by themselves after less; this is for disks and devices that say nothing at all."""

MOST_THREADS: Final = 8


def load_tensors(
    folder: Folder,
    settings: LoaderSettings,
    *,
    device: Device | None = None,
    patterns: Sequence[str] | None = None,
    needed: Callable[[str], bool] = lambda _: True,
) -> Generator[tuple[str, Any], None, None]:
    """Tensors by name, in loading order, on ``device`` or, without one, on the CPU; only those that are ``needed``.

    All headers are read and checked first: nothing is delivered of a model with a truncated file. ``patterns``: which
    files, where not those that the index names. A tensor may be kept and written to. Raises InvalidInput,
    EntryNotFound, what the sources raise, DeadlineExceeded.
    """
    with ExitStack() as stack:
        files, wanted = choose_files(folder, patterns)
        sources = [stack.enter_context(closing(folder.open(file))) for file in files]
        ranges = read_headers(sources, wanted, needed)
        limits = limits_for(settings, sources, device, os.cpu_count() or 1)
        memory = stack.enter_context(closing(memory_for(settings, limits, device)))
        opened = [(wanted.nbytes, partial(memory.open, wanted)) for wanted in ranges]
        for block in stack.enter_context(closing(deliver(opened, limits))):
            yield from block.tensors()
            del block


def limits_for(settings: LoaderSettings, sources: Sequence[Source], device: Device | None, cores: int) -> Limits:
    """How many threads, and how far ahead. Mapped files cost CPU time alone, the engine's own copies need the rest."""
    mapped = device is None and all(source.fileno() is not None for source in sources)
    usual = max(1, min(MOST_THREADS, cores // 2)) if mapped else MOST_THREADS
    return Limits(settings.threads or usual, settings.ahead_mib * MIB, PART, STALL_S)


def memory_for(settings: LoaderSettings, limits: Limits, device: Device | None) -> Memory:
    """The memory that tensors are delivered in."""
    host = HostMemory(limits.ahead_bytes)
    if device is None:
        return host
    count = max(2, settings.staging_mib * MIB // PART)
    return DeviceMemory(device, Ring(device, count, PART, STALL_S), host)
