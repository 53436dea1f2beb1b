"""A worker of vLLM on a CPU stays on the cores it was given when it also hands KV blocks over.

vLLM binds a worker's threads to the cores that ``VLLM_CPU_OMP_THREADS_BIND`` names. Its NIXL connector (0.32,
``nixl/base_worker.py``) then pins the thread that makes it, which is the one that runs the model, to the last core of
each NUMA node (``CpuPlatform.discover_numa_topology``), whoever that core was given to: a pair on two cores computes on
one. Where cores are named there is no core of a node to choose: it is told of none, and pins nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Final

from helios.after_import import after_import

log = logging.getLogger("vllm.helios")
"""Below ``vllm``, since vLLM shows the records of no other logger."""

VARIABLE: Final = "VLLM_CPU_OMP_THREADS_BIND"
UNNAMED: Final = frozenset({"", "auto", "nobind"})
"""Values that name no core: vLLM chooses, or nobody does."""
PLATFORM: Final = "vllm.platforms.cpu"


def cores_named(environ: Mapping[str, str]) -> bool:
    """Whether a worker's cores are named, and not left to vLLM."""
    return environ.get(VARIABLE, "") not in UNNAMED


def keep_cores_when_imported() -> None:
    """Have NIXL's connector leave threads where they are bound, once vLLM's CPU platform is imported."""
    after_import(PLATFORM, _keep)


def _keep(platform: ModuleType) -> None:
    cpu: Any = getattr(platform, "CpuPlatform", None)
    if not hasattr(cpu, "discover_numa_topology"):
        log.warning("%s is not made as it was: NIXL may move a worker's thread to another core than %s names",
                    platform.__name__, VARIABLE)  # fmt: skip
        return
    cpu.discover_numa_topology = classmethod(_no_core)


def _no_core(cls: type) -> list[list[int]]:
    return []
