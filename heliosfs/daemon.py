"""A mount's daemon: puts the parts together, owns their tasks and takes them down in order.

Order of starting: the claim on the mount point, the registry, the local tier, the mount, the loops; a failure at any
step undoes those before it. SIGTERM and SIGINT unmount first, so that nobody new comes in, let requests under way end
for a moment, and stop the rest.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

import msgspec
import pyfuse3
import trio

from helios import mounts
from helios.config import Config
from helios.embedded import attach
from helios.errors import Conflict, HeliosError, Unavailable, UsageError
from helios.home import Home, hash_text
from helios.lockfile import LockFile
from helios.metrics import CONTENT_TYPE, MountMetrics, rss_bytes
from helios.mounts import MountState
from helios.process import ProcessId
from heliosfs import http
from heliosfs.blobs import open_store
from heliosfs.catalog import Catalog
from heliosfs.fuse import mounting
from heliosfs.fuse.operations import HeliosOperations
from heliosfs.metadata import MetadataClient
from heliosfs.records import Records
from heliosfs.routing import Page, Route, Routes, json_page, page
from heliosfs.tree.root import root
from heliosfs.tree.table import NodeTable
from heliosfs.volumes import api
from heliosfs.volumes.files import VolumeFiles
from heliosfs.volumes.service import Volumes

log = logging.getLogger("heliosfs")

DRAIN_S: Final = 2.0
"""How long requests under way may take after the unmount, in seconds."""

TASKS: Final = 512
"""Requests served at once: a READ that waits for its bytes holds one, and names must still be answered."""

IDLE_TASKS: Final = 8
"""Tasks that stay when there is little to do."""

MODE: Final = "portable"
REASON: Final = "pyfuse3 mounts alone"


@dataclass(frozen=True)
class Plan:
    """What to mount where. ``mountpoint`` is canonical and empty; ``created``: it was made for this mount."""

    mountpoint: Path
    config: Config
    home: Home
    environ: Mapping[str, str]
    created: bool = False
    log: str | None = None

    @property
    def cache(self) -> Path:
        """The local tier's directory."""
        configured = self.config.mount.cache
        return Path(os.path.abspath(configured)) if configured else self.home.cache

    @property
    def name(self) -> str:
        """A short name that no other mount has."""
        return f"{hash_text(str(self.mountpoint)):016x}"


def run(plan: Plan, ready: Callable[[MountState], None]) -> int:
    """Mount and serve until a signal or an unmount; returns the exit status. ``ready`` is called once it answers.

    Raises HeliosError when it can't be mounted.
    """
    with contextlib.ExitStack() as stack:
        state_file = mounts.claim(plan.home, plan.mountpoint)
        if state_file is None:
            raise Conflict(f"{plan.mountpoint} is mounted already, or about to be")
        stack.callback(state_file.release)
        if plan.created:
            stack.callback(_remove_directory, plan.mountpoint)
        stack.enter_context(_pid_file(plan))
        urls, revive, beside = list(plan.config.registry.urls), None, None
        if not urls:
            registry = stack.enter_context(attach(plan.config, plan.home, plan.environ))
            urls, revive, beside = [registry.base], registry.ensure, registry.store
        metadata = stack.enter_context(contextlib.closing(MetadataClient(urls, revive)))
        daemon = _Daemon(plan, state_file, metadata, urls, revive, beside, ready)
        try:
            return trio.run(daemon.main)
        except BaseExceptionGroup as group:
            raise _only(group) from group


class _Daemon:
    def __init__(
        self,
        plan: Plan,
        state_file: LockFile,
        metadata: MetadataClient,
        urls: list[str],
        revive: Callable[[], None] | None,
        beside: Path | None,
        ready: Callable[[MountState], None],
    ) -> None:
        self._plan, self._state_file, self._ready = plan, state_file, ready
        self._metadata, self._urls, self._revive, self._beside = metadata, urls, revive, beside
        self._metrics = MountMetrics()
        self._stop = trio.Event()
        self._stopped_by: signal.Signals | None = None
        self._detached = self._answers = False

    async def main(self) -> int:
        plan, settings = self._plan, self._plan.config.mount
        self._metrics.build.info({"version": version("helios-llm")})
        self._metrics.mode.info({"mode": MODE, "reason": REASON})
        with contextlib.ExitStack() as stack:
            store = open_store(plan.cache, self._urls, settings, self._metrics, self._revive, self._beside)
            blobs = stack.enter_context(contextlib.closing(store))
            records = stack.enter_context(contextlib.closing(Records(plan.cache / "catalog.db")))
            volumes = Volumes(VolumeFiles(plan.cache / "volumes"))
            await volumes.load()
            catalog = Catalog(self._metadata, records, volumes)
            await catalog.load()
            table = NodeTable(root(volumes))
            operations = HeliosOperations(
                table, catalog, blobs, self._metrics, cache=plan.cache, uid=os.getuid(), gid=os.getgid()
            )
            control, tcp, url = await self._listen(stack)
            state = self._state(url)
            async with trio.open_nursery() as background:
                await background.start(self._watch_signals, background.cancel_scope)
                await background.start(blobs.run)
                pages = self._pages(state, catalog)
                background.start_soon(http.serve, [control], Routes([*pages, *api.routes(volumes, catalog)]))
                if tcp:
                    background.start_soon(http.serve, tcp, Routes(pages))
                await self._serve(operations, state)
                background.cancel_scope.cancel()
        return 0 if self._stopped_by in (None, signal.SIGTERM) else 128 + self._stopped_by

    async def _serve(self, operations: HeliosOperations, state: MountState) -> None:
        """Mount, serve until the mount is gone, close what is open."""
        mountpoint = self._plan.mountpoint
        with self._mounted(operations):
            try:
                async with trio.open_nursery() as loop:
                    loop.start_soon(self._loop, loop.cancel_scope)
                    loop.start_soon(self._unmount_when_stopped, loop.cancel_scope)
                    await mounting.wait_until_it_answers(mountpoint)
                    mounting.set_readahead(mountpoint, self._plan.config.mount.readahead_kib)
                    self._state_file.write(msgspec.json.encode(state))
                    self._answers = True
                    log.info("mounted", extra={"mountpoint": state.mountpoint, "mode": MODE, "cache": state.cache})
                    self._ready(state)
            finally:
                self._answers = False
                with trio.CancelScope(shield=True):
                    await operations.close()
        log.info("unmounted", extra={"mountpoint": state.mountpoint})

    @contextlib.contextmanager
    def _mounted(self, operations: HeliosOperations) -> Iterator[None]:
        mounting.check_unmountable()
        mountpoint, wanted = self._plan.mountpoint, self._plan.config.mount.allow_other
        allow_other = wanted and mounting.may_allow_other()
        if wanted and not allow_other:
            log.warning("other users can't read this mount: /etc/fuse.conf lacks user_allow_other")
        try:
            pyfuse3.init(operations, str(mountpoint), mounting.options(allow_other))
        except RuntimeError as error:
            raise Unavailable(
                f"{mountpoint} can't be mounted: {error}",
                hint="The lines before this one in the log say why; `helios doctor` checks this machine.",
            ) from None
        try:
            yield
        finally:
            pyfuse3.close(unmount=not self._detached)

    async def _loop(self, scope: trio.CancelScope) -> None:
        await pyfuse3.main(min_tasks=IDLE_TASKS, max_tasks=TASKS)
        scope.cancel()

    async def _unmount_when_stopped(self, scope: trio.CancelScope) -> None:
        """Unmount, then give the loop, which ends when nobody uses the mount any more, a moment."""
        await self._stop.wait()
        try:
            await trio.to_thread.run_sync(mounts.detach, self._plan.mountpoint)
            self._detached = True
        except HeliosError as error:
            log.error("the unmount failed", extra={"reason": str(error)})
        await trio.sleep(DRAIN_S)
        log.warning("the mount is still in use: whatever is open there fails from now on")
        scope.cancel()

    async def _watch_signals(
        self, scope: trio.CancelScope, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """The first signal stops the daemon in order, a second one at once."""
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as received:
            task_status.started()
            async for number in received:
                if self._stop.is_set():
                    scope.cancel()
                self._stopped_by = signal.Signals(number)
                log.info("stopping", extra={"signal": self._stopped_by.name})
                self._stop.set()

    async def _listen(
        self, stack: contextlib.ExitStack
    ) -> tuple[trio.SocketListener, list[trio.SocketListener], str | None]:
        """Where the control API is served, where the pages alone are, and the address of those."""
        path = self._socket_path
        path.unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(path))
        stack.callback(path.unlink, missing_ok=True)
        path.chmod(0o600)
        sock.listen(64)
        control = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        tcp: list[trio.SocketListener] = []
        url = None
        if listen := self._plan.config.mount.listen:
            host, _, port = listen.rpartition(":")
            if not host or not port.isdecimal():
                raise UsageError(f"mount.listen is {listen!r}: write host:port")
            try:
                tcp = await trio.open_tcp_listeners(int(port), host=host.strip("[]"))
            except OSError as error:
                raise Unavailable(
                    f"{listen} can't be used: {error.strerror}", hint="Change mount.listen; port 0 takes a free one."
                ) from None
            url = f"http://{host}:{tcp[0].socket.getsockname()[1]}"
        return control, tcp, url

    @property
    def _socket_path(self) -> Path:
        return self._plan.home.socket(f"mount-{self._plan.name}")

    def _state(self, url: str | None) -> MountState:
        plan, me = self._plan, ProcessId.current()
        return MountState(
            mountpoint=str(plan.mountpoint),
            pid=me.pid,
            start=me.start,
            since=time.time(),
            cache=str(plan.cache),
            registry=self._urls,
            socket=str(self._socket_path),
            log=plan.log,
            created=plan.created,
            url=url,
            mode=MODE,
            reason=REASON,
        )

    def _pages(self, state: MountState, catalog: Catalog) -> list[Route]:
        def status() -> Page:
            now = {"registry_answers": catalog.answering, "rss_bytes": rss_bytes()}
            return json_page(msgspec.to_builtins(state) | now)

        def ready() -> Page:
            return Page(b"ready\n") if self._answers else Page(b"not mounted\n", status=503)

        return [
            Route("GET", "/metrics", page(lambda: Page(self._metrics.render(), CONTENT_TYPE))),
            Route("GET", "/healthz", page(lambda: Page(b"ok\n"))),
            Route("GET", "/readyz", page(ready)),
            Route("GET", "/api/v1/status", page(status)),
        ]


@contextlib.contextmanager
def _pid_file(plan: Plan) -> Iterator[None]:
    """``heliosfs-worker.pid``; a second mount of the same home has its own name in it."""
    run = plan.home.run
    held = LockFile.acquire(run / "heliosfs-worker.pid") or LockFile.acquire(run / f"heliosfs-worker-{plan.name}.pid")
    if held is None:
        raise Conflict(f"another process holds {run}/heliosfs-worker-{plan.name}.pid")
    try:
        held.write(f"{os.getpid()}\n".encode())
        yield
    finally:
        held.release()


def _remove_directory(path: Path) -> None:
    with contextlib.suppress(OSError):  # not empty: somebody uses it
        path.rmdir()


def _only(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one error in a nest of groups, or the group itself."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
