"""A published model served on this machine: mount, vLLM and router, as ``quickstart`` and ``serve`` both want it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, NoReturn

from helios.config import Config
from helios.embedded import AttachedRegistry, attach, running, users_path
from helios.errors import DeadlineExceeded, HeliosError, Unavailable
from helios.home import Home
from helios.http.client import HttpClient
from helios.launch import vllm
from helios.launch.compile_cache import CompileCaches
from helios.launch.compile_commits import MountedCommits
from helios.launch.machine import find_device
from helios.launch.model_info import ModelInfo
from helios.launch.processes import Child, Children, repair
from helios.launch.progress import Progress
from helios.launch.shared_mount import shared_mount
from helios.launch.signals import signals_ignored
from helios.mounts import MountState
from helios.names import RepoId
from helios.process import ProcessId

START_TIMEOUT_S: Final = 900.0
"""Longest start of vLLM, in seconds: large models load for minutes."""
ROUTER_START_S: Final = 120.0
"""Longest start of the router, in seconds: one or two, unless the cores have other things to do."""
BEYOND_S: Final = 5.0
"""What the router may take to end beyond the time that answers in flight have, in seconds."""
REGISTRY_STOP_S: Final = 15.0
WATCH_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class Router:
    """A router that was started; ``url`` is where clients go."""

    child: Child
    url: str


def check_port(host: str, port: int) -> None:
    """Fail early, before anything was started, when the router's port is taken."""
    from helios.http.server import listen_tcp

    listen_tcp(host, port).close()


def model_path(mountpoint: Path, repo: RepoId, commit: str) -> Path:
    """Where a mount shows a commit's files."""
    return mountpoint / (repo.org or "_") / repo.name / commit


def wait_for_router(child: Child) -> str:
    """The URL a router printed, once it is ready for requests; raises Unavailable with its last lines."""
    deadline = time.monotonic() + ROUTER_START_S
    url: str | None = None
    while time.monotonic() < deadline:
        if (status := child.poll()) is not None:
            raise Unavailable(f"the router ended with status {status}; the end of {child.log}:\n{child.tail()}")
        if url is None:
            lines = child.log.read_text(errors="replace").splitlines()
            url = next((line for line in lines if line.startswith(("http://", "https://"))), None)
        elif is_ready(url):
            return url
        time.sleep(0.05)
    raise DeadlineExceeded(
        f"the router was not ready after {ROUTER_START_S:.0f} s; the end of {child.log}:\n{child.tail()}"
    )


def is_ready(url: str, path: str = "/readyz") -> bool:
    """Whether a daemon says that it is ready."""
    client = HttpClient(url, timeout_s=2.0)
    try:
        with client.request("GET", path) as response:
            response.read()
            return response.status == 200
    except HeliosError:
        return False
    finally:
        client.close()


def end_unused_registry(home: Home) -> None:
    """End the embedded registry now instead of a little later, if nobody uses it: nothing is to be left running.

    Holding its users' lock alone, as it does itself when it ends, keeps others from coming meanwhile.
    """
    fd = os.open(users_path(home), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        for _ in range(10):
            record = running(home)
            if record is None or not record.embedded:
                return
            with contextlib.suppress(BlockingIOError):  # others use it, or it looks for users in this moment
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                ProcessId(record.pid, record.start).end(REGISTRY_STOP_S)
                return
            time.sleep(0.05)
    finally:
        os.close(fd)


class Serving(contextlib.ExitStack):
    """Owns what runs; leaving the context takes it down: router, vLLM, the mount, in this order."""

    def __init__(self, home: Home, config: Config, progress: Progress) -> None:
        super().__init__()
        self.home, self.config, self.progress = home, config, progress
        self._children: Children | None = None
        self._registry: AttachedRegistry | None = None
        self._mountpoint: Path | None = None
        self.caches: CompileCaches | None = None
        """Where engines among the children find compiled kernels, once there are children on a mount."""
        self._watched: list[Child] = []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> bool | None:
        with signals_ignored():  # a second Ctrl-C would leave things behind; what ends here has deadlines of its own
            return super().__exit__(kind, error, tb)

    def repair(self) -> None:
        """End what a run that was killed left behind."""
        for name in repair(self.home):
            self.progress.note(f"An earlier run was killed and had left {name} behind: ended.")

    def registry(self) -> AttachedRegistry:
        """The registry to use; an embedded one ends with the last user."""
        self.callback(end_unused_registry, self.home)
        self._registry = self.enter_context(attach(self.config, self.home))
        return self._registry

    def mount(self) -> MountState:
        """The home's mount, made if it is not there."""
        with self.progress.stage("Mount") as stage:
            stage.doing("mounting")
            state = self.enter_context(shared_mount(self.home))
            stage.done(f"{state.mountpoint}, {state.mode} mode")
        self._mountpoint = Path(state.mountpoint)
        return state

    def start_vllm(
        self, path: Path, repo: RepoId, extra: Sequence[str], timeout_s: float
    ) -> tuple[vllm.Vllm, ModelInfo]:
        """Start vLLM on a model's directory and wait until it is healthy."""
        vllm.require_vllm()
        with self.progress.stage("vLLM") as stage:
            info = ModelInfo.read(path)
            device = find_device()
            with vllm.reserved_port() as port:
                children = self.children
                worker = vllm.start(
                    children, path, repo.id, port=port, device=device, info=info, extra=extra, caches=self.caches
                )
                self._watched.append(worker.child)
                worker.wait_ready(timeout_s, stage.doing)
            stage.done(f"{info.architecture} on {device}, {worker.url}")
        return worker, info

    def start_router(
        self, host: str, port: int, workers: Sequence[str] = (), env: Mapping[str, str] | None = None
    ) -> Router:
        """Start the router in front of workers, as its ``--worker`` takes them, and wait until it answers.

        ``env``: settings of its own."""
        with self.progress.stage("Router") as stage:
            stage.doing("starting")
            command = [sys.executable, "-P", "-m", "helios", "router", "--host", host, "--port", str(port)]
            for worker in workers:
                command += ["--worker", worker]
            grace_s = self.config.router.drain_s + BEYOND_S
            child = self.children.start("router", command, env=env, grace_s=grace_s)
            self._watched.append(child)
            url = wait_for_router(child)
            stage.done(url)
        return Router(child, url)

    def watch(self, step: Callable[[], None] = lambda: None, due: threading.Event | None = None) -> NoReturn:
        """Stay until something ends that should not; raises Unavailable naming it. ``step`` is called all the time,
        and as soon as ``due`` is set."""
        due = due or threading.Event()
        while True:
            due.clear()  # before the step: what is set from now on is for the next one
            step()
            for child in self._watched:
                if (status := child.poll()) is not None:
                    raise Unavailable(
                        f"{child.name} ended with status {status}; the end of {child.log}:\n{child.tail()}"
                    )
            due.wait(WATCH_S)

    @property
    def children(self) -> Children:
        """What this owns, made when it is needed first."""
        if self._children is None:
            if self._registry is not None and self._mountpoint is not None:
                caches = CompileCaches(
                    self.home,
                    self.config.compile_cache,
                    self._registry.client(),
                    MountedCommits(self._mountpoint),
                    self.progress.note,
                )
                self.caches = self.enter_context(caches)  # before the children: it is taken down after them
            self._children = self.enter_context(Children(self.home))
        return self._children
