"""The vLLMs of one model of the mount: what each is told of its place, and the ports that it keeps."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType

from helios.config import DisaggregationSettings
from helios.errors import NotFound, UsageError
from helios.launch import roles, vllm
from helios.launch.compile_cache import Caches
from helios.launch.logs import Followers
from helios.launch.machine import Device, find_device, read_machine
from helios.launch.model_info import ModelInfo, weight_bytes
from helios.launch.plan import Model, Placement, Wish, check_role, plan
from helios.launch.processes import Children


def check_connector(settings: DisaggregationSettings) -> None:
    """Raise UsageError where the router would speak another protocol than the engines that are started."""
    if settings.connector != "nixl":
        raise UsageError(
            f"router.disaggregation.connector is {settings.connector!r}, and workers that are started here speak nixl",
            hint="Leave the setting out, or start the workers yourself and name them to `helios router`.",
        )


def require_nixl() -> None:
    """Raise NotFound unless NIXL is installed beside vLLM."""
    if importlib.util.find_spec("nixl") is None:
        raise NotFound(
            "NIXL, over which prefill workers hand their KV blocks to decode workers, is not installed beside vLLM",
            hint="pip install nixl, into the environment of vLLM; or leave --prefill and --decode out.",
        )


@dataclass(frozen=True, slots=True)
class Served:
    """A model at a commit, in a directory of the mount. ``arguments``: those for vLLM that users give."""

    name: str
    commit: str
    path: Path
    info: ModelInfo
    device: Device
    arguments: Sequence[str]

    @classmethod
    def read(cls, name: str, commit: str, path: Path, arguments: Sequence[str]) -> Served:
        """Raises InvalidInput where the directory is no model."""
        return cls(name, commit, path, ModelInfo.read(path), find_device(), arguments)

    def placements(self, wish: Wish) -> tuple[Placement, ...]:
        """What each process gets of this machine; raises Unavailable where it does not suffice."""
        if wish.apart and roles.ranks(self.arguments) > 1:
            raise UsageError(
                "a prefill or decode worker with data-parallel ranks is not known here: the router has one address of "
                "its KV events",
                hint="Leave --data-parallel-size out, and ask for more workers with --prefill and --decode.",
            )
        check_role(self.name, self.info, wish)
        if self.device == "cuda" and not wish.apart and not wish.gpus:
            return (Placement(wish.alone, "vllm"),)  # it has all GPUs, as vLLM uses them by itself
        wish = replace(wish, each=roles.gpus_each(self.arguments), positions=roles.longest(self.arguments))
        model = Model(self.name, weight_bytes(self.path), self.info)
        return plan(read_machine(self.device, os.environ), model, wish)


@dataclass(frozen=True, slots=True)
class At:
    """Where workers listen, and for how long they may end.

    ``host``: of their APIs; ``ports``: those of a worker, by its name, that has no free ones on loopback;
    ``arguments``: for vLLM, before those that users give; ``grace_s``: between SIGTERM and SIGKILL, in seconds."""

    host: str = roles.HOST
    ports: Mapping[str, roles.Ports] = field(default_factory=dict)
    arguments: Sequence[str] = ()
    grace_s: float = vllm.STOP_GRACE_S


class Workers:
    """Starts vLLM for each placement and ends it; a context that holds their ports."""

    def __init__(
        self, served: Served, placements: Sequence[Placement], children: Children, lease_s: float,
        followers: Followers | None = None, caches: Caches | None = None, at: At | None = None,
    ) -> None:  # fmt: skip
        """``lease_s``: see ``roles.told``; ``followers`` shows the logs, None: nobody wants them; ``caches``: see
        ``vllm.start``; ``at``: None: on loopback."""
        self._at = at or At()
        self._served, self._placements, self._children = served, placements, children
        self._lease_s, self._followers, self._caches = lease_s, followers, caches
        self._ports: dict[str, roles.Ports] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Workers:
        with contextlib.ExitStack() as stack:
            self._ports.update(self._at.ports)
            for one in [placement for placement in self._placements if placement.name not in self._ports]:
                self._ports[one.name] = _reserve(stack, apart=one.side_channel)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    @property
    def options(self) -> list[str]:
        """The workers, as the router takes them."""
        name, commit = self._served.name, self._served.commit
        return [roles.router_option(name, commit, one, self._ports[one.name]) for one in self._placements]

    def start(self, placement: Placement) -> vllm.Vllm:
        """See ``fleet.Starts``."""
        served, ports = self._served, self._ports[placement.name]
        told = roles.told(
            placement, served.device, ports, task=served.info.task, lease_s=self._lease_s, extra=served.arguments
        )
        told = replace(told, arguments=(*told.arguments, *self._at.arguments))
        worker = vllm.start(
            self._children, served.path, served.name, host=self._at.host, port=ports.api, device=served.device,
            info=served.info, extra=served.arguments, told=told, caches=self._caches, log_name=placement.name,
            grace_s=self._at.grace_s,
        )  # fmt: skip
        if self._followers is not None:
            self._followers.follow(worker.child)
        return worker

    def stop(self, workers: Sequence[vllm.Vllm]) -> None:
        """See ``fleet.Starts``."""
        for worker in workers:
            worker.child.begin_stop()
        for worker in workers:
            self._children.stop(worker.child)


def _reserve(stack: contextlib.ExitStack, *, apart: bool) -> roles.Ports:
    """A worker's ports for as long as the context lasts; ``apart``: it hands KV blocks over."""
    api = stack.enter_context(vllm.reserved_port())
    if not apart:
        return roles.Ports(api)
    events, replay = (stack.enter_context(vllm.reserved_port()) for _ in range(2))
    host, side_channel = stack.enter_context(vllm.reserved_side_channel())
    return roles.Ports(api, side_channel, events, replay, side_host=host)
