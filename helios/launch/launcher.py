"""Real vLLM on the models of the mount that clients ask for: what each takes, and how it is started."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from helios.errors import UsageError
from helios.launch import plan, roles, sleep, vllm
from helios.launch.machine import Device
from helios.launch.model_info import ModelInfo, weight_bytes
from helios.launch.needs import Budget, Need, needs
from helios.launch.resident import Model
from helios.launch.serving import Serving, model_path
from helios.names import RepoId


class Launcher:
    """See ``on_demand.Launches``; threads may share it."""

    def __init__(
        self, serving: Serving, mountpoint: Path, arguments: Sequence[str], device: Device, budget: Budget
    ) -> None:
        """``arguments`` of users go to every vLLM. Raises UsageError for some that can't be planned with."""
        if roles.ranks(arguments) > 1:
            raise UsageError(
                "data-parallel ranks can't be planned for models that share a machine",
                hint="Leave --data-parallel-size out, or name one model: helios serve ORG/NAME.",
            )
        self._serving, self._mountpoint, self._arguments = serving, mountpoint, arguments
        self._device: Device = device
        self._budget = budget
        self._sleeps = sleep.may_sleep(device, arguments)
        self._lock = threading.Lock()
        self._number = 0

    def size(self, model: Model) -> tuple[Need, ...]:
        path = self._path(model)
        wish = plan.Wish(each=roles.gpus_each(self._arguments), positions=roles.longest(self._arguments))
        planned = plan.Model(model.name, weight_bytes(path), ModelInfo.read(path))
        return needs(self._budget, planned, wish, sleeps=self._sleeps)

    @contextlib.contextmanager
    def launch(self, model: Model, need: Need) -> Iterator[vllm.Vllm]:
        path = self._path(model)
        info = ModelInfo.read(path)
        with vllm.reserved_port() as port:
            yield self._start(model, path, need, info, port)

    def _start(self, model: Model, path: Path, need: Need, info: ModelInfo, port: int) -> vllm.Vllm:
        extra = sleep.arguments(self._arguments) if self._sleeps else self._arguments
        with self._lock:
            self._number += 1
            return vllm.start(
                self._serving.children, path, model.name, also=[model.pinned], port=port, device=self._device,
                info=info, extra=extra,
                told=told(need.placement, self._device, info, port, self._arguments, sleeps=self._sleeps),
                caches=self._serving.caches, log_name=f"vllm-{self._number}",
            )  # fmt: skip

    def stop(self, worker: vllm.Vllm) -> None:
        self._serving.children.stop(worker.child)

    def _path(self, model: Model) -> Path:
        return model_path(self._mountpoint, RepoId.parse(model.name), model.commit)


def told(
    placement: plan.Placement, device: Device, info: ModelInfo, port: int, arguments: Sequence[str], *, sleeps: bool
) -> roles.Told:
    """What a vLLM is told that shares the machine with others."""
    found = roles.told(placement, device, roles.Ports(port), task=info.task, lease_s=0.0, extra=arguments)
    if placement.gpus:
        # Said in bytes: what others take or give back while vLLM looks at the GPU must not count as its own.
        cache = placement.kv // len(placement.gpus)
        found = roles.Told((*found.arguments, "--kv-cache-memory-bytes", str(cache)), found.env)
    return sleep.told(found) if sleeps else found
