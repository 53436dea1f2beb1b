"""vLLM's loader for ``--load-format helios``: vLLM's own for safetensors, with our way to get at the tensors.

What vLLM does around the tensors stays its: experts of other ranks are skipped, secondary weights loaded, parameters
that got nothing reported.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Generator
from typing import Any, Final

import torch
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight

from helios.config import LoaderSettings, load
from helios.errors import InvalidInput
from heliosfs.loader.cuda import Cuda
from heliosfs.loader.folders import open_folder
from heliosfs.loader.load import load_tensors
from heliosfs.loader.shards import refuse_file
from heliosfs.loader.sources import Folder
from heliosfs.loader.staging import Device

log = logging.getLogger("vllm.helios")

TRACK: Final = "enable_weights_track"
"""The one key of vLLM's ``--model-loader-extra-config`` that has a meaning here."""


class HeliosModelLoader(DefaultModelLoader):  # type: ignore[misc]  # vLLM is looked at by nobody's type checker
    """Reads safetensors in parallel: where the mount or the client keeps them, or from any directory.

    Raises InvalidInput for options that are other loaders'.
    """

    def __init__(self, load_config: Any) -> None:
        extra = load_config.model_loader_extra_config or {}
        if others := sorted(set(extra) - {TRACK}):
            raise InvalidInput(
                f"--model-loader-extra-config has {', '.join(others)}, which --load-format helios does not know",
                hint="Its settings are in the section [loader] of helios.toml (HELIOS_LOADER__THREADS, ...).",
            )
        if (strategy := load_config.safetensors_load_strategy) is not None:
            raise InvalidInput(
                f"--safetensors-load-strategy {strategy} does not go with --load-format helios, which has its own",
                hint="Leave one of them out.",
            )
        super().__init__(load_config)
        self._settings: LoaderSettings = load(os.environ).loader
        self.counter_before_loading_weights: float = 0.0

    def download_model(self, model_config: Any) -> None:
        """Make the model local, where it is a registry's."""
        with open_folder(model_config.model, model_config.revision) as folder:
            folder.fetch()

    def _get_weights_iterator(self, source: Any) -> Generator[tuple[str, torch.Tensor], None, None]:
        if self.load_config.safetensors_load_strategy == "torchao":  # set by vLLM for such a model
            raise InvalidInput(
                f"{source.model_or_path} was written by torchao, whose tensors are put together from several",
                hint="Take --load-format auto.",
            )
        refuse_file(source.model_or_path)
        if self.counter_before_loading_weights == 0.0:
            self.counter_before_loading_weights = time.perf_counter()
        return self._read(source, self._device())

    def _read(self, source: Any, device: Device | None) -> Generator[tuple[str, torch.Tensor], None, None]:
        unused = getattr(source, "is_unused_weight", None)
        started, count = time.perf_counter(), 0

        def needed(name: str) -> bool:
            return not (should_skip_weight(name, self.local_expert_ids) or (unused is not None and unused(name)))

        with open_folder(source.model_or_path, source.revision, source.subfolder or "") as folder:
            opened_s = time.perf_counter() - started
            patterns = source.allow_patterns_overrides
            for name, tensor in load_tensors(folder, self._settings, device=device, patterns=patterns, needed=needed):
                count += tensor.nbytes
                yield source.prefix + name, tensor
            _say(folder, count, opened_s, time.perf_counter() - started, device)

    def _device(self) -> Device | None:
        """The GPU that the model is loaded to, if it is one."""
        from vllm.config import get_current_vllm_config

        wanted = self.load_config.device or get_current_vllm_config().device_config.device
        return Cuda(torch.cuda.current_device()) if torch.device(wanted).type == "cuda" else None


def _say(folder: Folder, count: int, opened_s: float, seconds: float, device: Device | None) -> None:
    log.info(
        "%s: %.2f GB of weights in %.2f s (opened in %.2f s), through %s to %s",
        folder.name,
        count / 1e9,
        seconds,
        opened_s,
        folder.way,
        "the CPU" if device is None else "the GPU",
    )
