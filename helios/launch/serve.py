"""``helios serve``: one published model behind the router, or those that clients ask for, until a signal."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

import msgspec

from helios.config import Config
from helios.embedded import AttachedRegistry
from helios.errors import NotFound
from helios.home import Home
from helios.http.client import HttpClient
from helios.launch import vllm
from helios.launch.demand import Demand, Model
from helios.launch.fleet import Fleet, Starts
from helios.launch.logs import Followers
from helios.launch.machine import find_device
from helios.launch.model_info import ModelInfo
from helios.launch.on_demand import OnDemand, WakeServer
from helios.launch.plan import Placement, Wish
from helios.launch.progress import Progress
from helios.launch.serving import Router, Serving, check_port, model_path
from helios.launch.signals import signals_ignored
from helios.launch.workers import Served, Workers, check_connector, require_nixl
from helios.names import RepoId


@dataclass(frozen=True, slots=True)
class Group:
    """What the command line says of the workers of the model that it names. ``logs``: whether their logs are shown on
    standard error."""

    wish: Wish
    arguments: Sequence[str]
    start_timeout_s: float
    logs: bool


def serve(home: Home, config: Config, repo: RepoId, revision: str, group: Group) -> NoReturn:
    """Serve ``repo`` at ``revision`` (pinned to its commit now) until a signal raises Stopped.

    Raises NotFound for a model that the registry lacks, Unavailable when the machine does not suffice, a worker can't
    be started, or the router ends.
    """
    if group.wish.apart:
        check_connector(config.router.disaggregation)
        require_nixl()
    with _begun(home, config, plain=group.logs) as (serving, registry):
        try:
            commit = registry.client().resolve(repo, revision).commit
        except NotFound as error:
            error.hint = (
                error.hint or f"`helios pull {repo.id}` brings it from the Hub, `helios ls` lists what is here."
            )
            raise
        path = model_path(Path(serving.mount().mountpoint), repo, commit)
        followers = serving.enter_context(Followers(sys.stderr)) if group.logs else None
        served = Served.read(repo.id, commit, path, group.arguments)
        placements = served.placements(group.wish)
        lease_s = config.router.disaggregation.lease_s
        children = serving.children
        with Workers(served, placements, children, lease_s, followers, serving.caches) as workers:
            serve_group(serving, workers, placements, workers.options, f"{repo.id}@{commit[:12]}", group)


def serve_group(
    serving: Serving, starts: Starts, placements: Sequence[Placement], options: Sequence[str], name: str, group: Group
) -> NoReturn:
    """Serve with the workers that ``starts`` starts for ``placements``; ``options``: as the router takes them."""
    config = serving.config.router
    with Fleet(starts, placements, group.start_timeout_s, serving.progress.note) as fleet:
        with serving.progress.stage("vLLM") as stage:
            stage.doing("starting")
            fleet.wait_ready(stage.doing)
            stage.done(
                ", ".join(f"{one.name} at {worker.url}" for one, worker in zip(placements, fleet.workers, strict=True))
            )
        router = serving.start_router(config.host, config.port, options)
        try:
            print(router.url, flush=True)
            serving.progress.note(f"{name} answers at {router.url}/v1 until Ctrl-C.")
            serving.watch(fleet.step)
        finally:
            with signals_ignored():
                serving.children.stop(router.child)  # before its workers: what is under way may end


@contextlib.contextmanager
def _begun(home: Home, config: Config, plain: bool = False) -> Iterator[tuple[Serving, AttachedRegistry]]:
    """What can't do without is found out first; then the registry is there. ``plain``: no spinner among other lines."""
    vllm.require_vllm()
    with Serving(home, config, Progress(plain=plain)) as serving:
        serving.repair()
        check_port(config.router.host, config.router.port)
        yield serving, serving.registry()


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the command line says of models that are started on demand. ``idle_s``: 0 is never."""

    most: int
    idle_s: float
    fetch: Sequence[str]
    arguments: Sequence[str]
    start_timeout_s: float


def serve_on_demand(home: Home, config: Config, wishes: Wishes) -> NoReturn:
    """Serve the registry's models as clients ask for them, until a signal raises Stopped.

    Raises Unavailable when the router ends.
    """
    with _begun(home, config) as (serving, registry):
        launcher = Launcher(serving, Path(serving.mount().mountpoint), wishes.arguments)
        with on_demand(serving, registry.base, launcher, wishes) as (router, demand):
            print(router.url, flush=True)
            serving.progress.note(
                f"Models of the registry answer at {router.url}/v1 when they are asked for, until Ctrl-C."
            )
            serving.watch(demand.step)


@contextlib.contextmanager
def on_demand(serving: Serving, registry: str, launcher: Launches, wishes: Wishes) -> Iterator[tuple[Router, OnDemand]]:
    """A router whose models ``launcher`` starts; ``OnDemand.step`` has to be called all the time."""
    config = serving.config
    models = OnDemand(
        Demand(wishes.most, wishes.idle_s), launcher.launch, launcher.stop, wishes.start_timeout_s,
        serving.progress.note,
    )  # fmt: skip
    with models, WakeServer(models.ask) as wakes:
        router = serving.start_router(
            config.router.host, config.router.port, env=_settings(config, registry, wakes.url, wishes.fetch)
        )
        port = router.url.rpartition(":")[2]
        socket = config.router.admin_socket or str(serving.home.socket(f"router-{port}"))
        with contextlib.closing(HttpClient(f"unix:{socket}")) as admin:
            models.behind(admin)
            try:
                yield router, models
            finally:
                serving.children.stop(router.child)  # before its workers: what is under way may end


def _settings(config: Config, registry: str, wake_url: str, fetch: Sequence[str]) -> dict[str, str]:
    """The router's, in its environment: what is configured, and what on demand needs."""
    ours = config.router
    discovery = msgspec.structs.replace(ours.discovery, resolve=True, hold=True, fetch=[*ours.discovery.fetch, *fetch])
    admission = msgspec.structs.replace(ours.admission, wake_url=wake_url)
    return {
        "HELIOS_REGISTRY__URLS": msgspec.json.encode([registry]).decode(),
        "HELIOS_ROUTER__DISCOVERY": msgspec.json.encode(discovery).decode(),
        "HELIOS_ROUTER__ADMISSION": msgspec.json.encode(admission).decode(),
    }


class Launches(Protocol):
    """Starts workers and ends them; threads share it."""

    def launch(self, model: Model) -> AbstractContextManager[vllm.Vllm]:
        """See ``on_demand.Launch``."""
        ...

    def stop(self, worker: vllm.Vllm) -> None:
        """End what ``launch`` has started; once more is no harm."""
        ...


class Launcher:
    """Starts vLLM on models of the mount; threads may share it."""

    def __init__(self, serving: Serving, mountpoint: Path, arguments: Sequence[str]) -> None:
        self._serving, self._mountpoint, self._arguments = serving, mountpoint, arguments
        self._lock = threading.Lock()
        self._number = 0

    @contextlib.contextmanager
    def launch(self, model: Model) -> Iterator[vllm.Vllm]:
        path = model_path(self._mountpoint, RepoId.parse(model.name), model.commit)
        with vllm.reserved_port() as port:
            yield self._start(model, path, port)

    def _start(self, model: Model, path: Path, port: int) -> vllm.Vllm:
        info, device = ModelInfo.read(path), find_device()
        with self._lock:
            self._number += 1
            children = self._serving.children
            return vllm.start(
                children, path, model.name, also=[model.pinned], port=port, device=device, info=info,
                extra=self._arguments, caches=self._serving.caches, log_name=f"vllm-{self._number}",
            )  # fmt: skip

    def stop(self, worker: vllm.Vllm) -> None:
        self._serving.children.stop(worker.child)
