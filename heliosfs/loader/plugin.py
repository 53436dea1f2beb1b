"""What vLLM loads of ours: the entry point ``helios`` in its group ``vllm.general_plugins``.

vLLM calls ``register`` in each of its processes, the API server's too, which never loads a model. So nothing heavy is
imported here: the loader is registered when vLLM itself imports the module that knows them all.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import Final

from helios.after_import import after_import
from helios.nixl_cores import cores_named, keep_cores_when_imported
from helios.nixl_delay import delay_from, delay_when_imported

LOAD_FORMAT: Final = "helios"
LOADERS: Final = "vllm.model_executor.model_loader"


def register() -> None:
    """Make ``--load-format helios`` known, and see to NIXL's pause and cores. May be called again. Raises
    UsageError."""
    delay_us = delay_from(os.environ)
    after_import(LOADERS, _add_loader)
    if delay_us is not None:
        delay_when_imported(delay_us)
    if cores_named(os.environ):
        keep_cores_when_imported()


def _add_loader(loaders: ModuleType) -> None:
    from heliosfs.loader.engine import HeliosModelLoader

    if getattr(loaders, "_LOAD_FORMAT_TO_MODEL_LOADER", {}).get(LOAD_FORMAT) is not HeliosModelLoader:
        loaders.register_model_loader(LOAD_FORMAT)(HeliosModelLoader)
