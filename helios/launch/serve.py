"""``helios serve``: one published model behind the router, or those that clients ask for, until a signal."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import msgspec

from helios.config import Config
from helios.embedded import AttachedRegistry
from helios.errors import NotFound
from helios.home import Home
from helios.http.client import HttpClient
from helios.launch import vllm
from helios.launch.demand import Demand
from helios.launch.fleet import Fleet, Starts
from helios.launch.launcher import Launcher
from helios.launch.logs import Followers
from helios.launch.machine import find_device, read_machine
from helios.launch.needs import Budget
from helios.launch.on_demand import Launches, OnDemand, WakeServer
from helios.launch.plan import Placement, Wish
from helios.launch.pools import Pools, text
from helios.launch.progress import Progress
from helios.launch.serving import Router, Serving, check_port, model_path
from helios.launch.signals import signals_ignored
from helios.launch.wanted import Wanted
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
    """What the command line says of models that are started on demand. ``memory`` and ``gpu_memory`` (of each GPU):
    what they may take together, in bytes, 0: what is available; ``idle_s``: 0 is never; ``warm_s``: how long a model
    stays that has come, at least; ``wait_s``: longest wait for memory that others hold."""

    memory: int
    gpu_memory: int
    idle_s: float
    warm_s: float
    wait_s: float
    fetch: Sequence[str]
    arguments: Sequence[str]
    start_timeout_s: float


def serve_on_demand(home: Home, config: Config, wishes: Wishes) -> NoReturn:
    """Serve the registry's models as clients ask for them, until a signal raises Stopped.

    Raises Unavailable when the machine has less memory than is allowed, and when the router ends.
    """
    device = find_device()
    with _begun(home, config) as (serving, registry):
        mountpoint = Path(serving.mount().mountpoint)
        budget = Budget.of(read_machine(device, os.environ), wishes.memory, wishes.gpu_memory)
        launcher = Launcher(serving, mountpoint, wishes.arguments, device, budget)
        with on_demand(serving, registry.base, launcher, budget.pools, wishes) as (router, demand):
            print(router.url, flush=True)
            serving.progress.note(
                f"Models of the registry answer at {router.url}/v1 when they are asked for, until Ctrl-C. Together "
                f"they take at most {text(budget.pools)}."
            )
            serving.watch(demand.step, demand.due)


@contextlib.contextmanager
def on_demand(
    serving: Serving, registry: str, launches: Launches, pools: Pools, wishes: Wishes
) -> Iterator[tuple[Router, OnDemand]]:
    """A router whose models ``launches`` starts, which together take no more than ``pools``; ``OnDemand.step`` has to
    be called all the time, and soon once ``OnDemand.due`` is set."""
    config = serving.config
    demand = Demand(pools, Wanted(wishes.idle_s, wishes.warm_s), wishes.wait_s)
    models = OnDemand(demand, launches, wishes.start_timeout_s, serving.progress.note)
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
