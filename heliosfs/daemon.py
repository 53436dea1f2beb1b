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
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Final

import msgspec
import trio

from helios import mounts
from helios.embedded import attach
from helios.errors import Conflict, HeliosError, Unavailable, UsageError
from helios.keepers import succeed
from helios.lockfile import held
from helios.metrics import CONTENT_TYPE, MountMetrics, rss_bytes
from helios.mounts import MountState
from helios.process import ProcessId
from helios.tokens import Token, no_token, token_of
from heliosfs import http
from heliosfs.blobs import BlobStore, open_store
from heliosfs.catalog import Catalog
from heliosfs.control.control import Control
from heliosfs.control.drain import Drain
from heliosfs.fuse.attach import Attachment, Event
from heliosfs.fuse.native import NativeMount
from heliosfs.fuse.operations import HeliosOperations
from heliosfs.fuse.portable import PortableMount
from heliosfs.metadata import MetadataClient
from heliosfs.plan import Plan, claimed
from heliosfs.records import Records
from heliosfs.routing import Page, Route, Routes, json_page, page
from heliosfs.shadow.plain import PlainDownload
from heliosfs.shadow.shadow import Shadow
from heliosfs.shadow.shadow import routes as shadow_routes
from heliosfs.tiers import api as room_api
from heliosfs.tiers.told import ToldClasses
from heliosfs.tree.nodelog import NodeLog
from heliosfs.tree.root import root
from heliosfs.tree.table import NodeTable
from heliosfs.usage import ReadCounts, ReadReports
from heliosfs.volumes import api
from heliosfs.volumes.files import VolumeFiles
from heliosfs.volumes.leases import VolumeLeases
from heliosfs.volumes.service import Volumes

log = logging.getLogger("heliosfs")

RECONNECT_S: Final = 1.0
ORPHAN_S: Final = 10.0
"""How long a worker waits for another keeper, in seconds."""

EXTERNAL_S: Final = 900.0
"""The same where somebody else starts keepers: an image may have to be fetched."""

CACHE_S: Final = 3.0
"""How long a worker waits for the one before it to give the cache up, in seconds."""

SPARE_S: Final = 30.0
"""A request may take this much longer than the longest READ before the keeper takes this process for hanging."""


def _node_name(setting: str) -> str:
    """What this node is called. Raises UsageError."""
    if setting and not (setting.isascii() and setting.isprintable() and " " not in setting and len(setting) <= 128):
        raise UsageError(f"mount.node is {setting[:80]!r}: 1 to 128 printable characters without spaces")
    return setting or socket.gethostname()[:128] or "node"


def run(plan: Plan, ready: Callable[[MountState], None], keeper: Attachment | None = None) -> int:
    """Mount and serve until a signal or an unmount; returns the exit status. ``ready`` is called once it answers.

    With a keeper the mount is there already, and stays when this ends. Raises HeliosError when it can't be mounted.
    """
    with contextlib.ExitStack() as stack:
        write: Callable[[bytes], object] = partial(mounts.write_state, mounts.state_path(plan.home, plan.mountpoint))
        if keeper is None or keeper.external:
            write = stack.enter_context(claimed(plan)).write
        urls, revive, beside = list(plan.config.registry.urls), None, None
        if not urls:
            registry = stack.enter_context(attach(plan.config, plan.home, plan.environ))
            urls, revive, beside = [registry.base], registry.ensure, registry.store
        token = token_of(plan.config.registry.token_file, plan.environ) if revive is None else no_token
        metadata = stack.enter_context(contextlib.closing(MetadataClient(urls, revive, token)))
        daemon = _Daemon(plan, write, metadata, urls, revive, beside, token, ready, keeper)
        try:
            return trio.run(daemon.main)
        except BaseExceptionGroup as group:
            raise _only(group) from group


class _Daemon:
    def __init__(
        self,
        plan: Plan,
        write: Callable[[bytes], object],
        metadata: MetadataClient,
        urls: list[str],
        revive: Callable[[], None] | None,
        beside: Path | None,
        token: Token,
        ready: Callable[[MountState], None],
        keeper: Attachment | None,
    ) -> None:
        self._plan, self._write, self._ready, self._keeper = plan, write, ready, keeper
        self._metadata, self._urls, self._revive, self._beside = metadata, urls, revive, beside
        self._token = token
        self._metrics = MountMetrics()
        self._stop = trio.Event()
        self._stopped_by: signal.Signals | None = None
        self._answers = self._alone = False
        self._new_state: Callable[[], MountState]

    async def main(self) -> int:
        plan, settings, keeper = self._plan, self._plan.config.mount, self._keeper
        self._metrics.build.info({"version": version("helios-llm")})
        with contextlib.ExitStack() as stack:
            if keeper is not None:
                await self._wait_for_cache()
            registry = self._urls, settings, self._metrics, self._revive, self._beside, plan.l2, self._token
            store = open_store(plan.cache, *registry)
            blobs = stack.enter_context(contextlib.closing(store))
            records = stack.enter_context(contextlib.closing(Records(plan.cache / "catalog.db")))
            volumes = Volumes(VolumeFiles(plan.cache / "volumes"), keeper=store.room.pins)
            await volumes.load()
            catalog = Catalog(self._metadata, records, volumes)
            await catalog.load()
            self._metrics.manifest_bytes.set_function(lambda: catalog.snapshot_bytes)
            nodes = stack.enter_context(contextlib.closing(self._node_log(keeper))) if keeper else None
            shadow, counts = self._shadow(stack), ReadCounts()
            operations = HeliosOperations(
                NodeTable(root(volumes), log=nodes),
                catalog,
                blobs,
                self._metrics,
                cache=plan.cache,
                uid=os.getuid(),
                gid=os.getgid(),
                mounted_ns=keeper.board.mounted_ns if keeper else None,
                generation=keeper.generation if keeper else 1,
                shadow=shadow,
                alone=keeper is None,
                counts=counts,
            )
            mount: PortableMount | NativeMount = PortableMount(plan.mountpoint, settings, operations, plan.portable)
            if keeper is not None:
                patience_s = blobs.patience_s + SPARE_S
                tiers = list(filter(None, (plan.cache, plan.l2)))
                ours = self._metrics, patience_s, tiers, self._tell
                mount = NativeMount(plan.mountpoint, settings, keeper, operations, *ours)
            self._metrics.mode.info({"mode": mount.mode, "reason": mount.reason})
            control, tcp, url = await self._listen(stack)
            self._new_state = partial(self._state, url, mount)
            state = self._new_state()
            async with trio.open_nursery() as background:
                await background.start(self._watch_signals, background.cancel_scope)
                await background.start(blobs.run)
                await background.start(catalog.run)
                holder = f"{socket.gethostname()}:{plan.name}"
                await background.start(
                    VolumeLeases(self._metadata, lambda: volumes.known().value, blobs.in_use, holder).run
                )
                await background.start(ReadReports(counts, self._metadata, _node_name(settings.node)).run)
                await background.start(ToldClasses(self._metadata, catalog, store.room.pins).run)
                if shadow is not None:
                    await background.start(shadow.run)
                if keeper is not None:
                    background.start_soon(self._obey, keeper)
                memory = (plan.home.run / f"work-{plan.name}", keeper.board.mounted_ns) if keeper else (None, 0)
                control_parts = Control.of(store, catalog, volumes, settings.scrub_mb_s, self._metrics, memory)
                await background.start(control_parts.run)
                pages = self._pages(state, mount, catalog, blobs, control_parts.drain)
                routes = [*pages, *api.routes(volumes, catalog), *room_api.routes(store.room, catalog)]
                routes += [*control_parts.routes(catalog), *shadow_routes(shadow)]
                background.start_soon(http.serve, [control], Routes(routes))
                if tcp:
                    background.start_soon(http.serve, tcp, Routes(pages))
                await self._serve(mount, operations, state)
                background.cancel_scope.cancel()
            if keeper is not None and nodes is not None and (mount.unmounted or _released(keeper)):
                nodes.remove()
                control_parts.remembered.forget()
                keeper.ended("unmounted")
            elif keeper is not None:
                if self._alone and not keeper.dropped:  # it would be dead
                    await trio.to_thread.run_sync(mounts.detach, plan.mountpoint)
                keeper.ended("stopped")
        return 0 if self._stopped_by in (None, signal.SIGTERM) else 128 + self._stopped_by

    def _shadow(self, stack: contextlib.ExitStack) -> Shadow | None:
        settings = self._plan.config.mount
        if not settings.shadow_percent:
            return None
        plain = PlainDownload(self._urls, settings.request_deadline_s, self._token)
        return Shadow(settings.shadow_percent, stack.enter_context(contextlib.closing(plain)), self._metrics)

    def _node_log(self, keeper: Attachment) -> NodeLog:
        return NodeLog.open(self._plan.home.run / f"nodes-{self._plan.name}.log", keeper.board.mounted_ns)

    async def _serve(self, mount: PortableMount | NativeMount, operations: HeliosOperations, state: MountState) -> None:
        """Serve until the mount is gone, or we are told to go; close what is open."""
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(mount.serve, self._stop)
                state = msgspec.structs.replace(state, reason=mount.reason)  # by now the kernel was asked
                self._write(msgspec.json.encode(state))
                self._metrics.mode.info({"mode": state.mode, "reason": state.reason})
                self._answers = True
                fields = {"mountpoint": state.mountpoint, "mode": state.mode, "reason": state.reason}
                log.info("mounted", extra={**fields, "cache": state.cache})
                self._ready(state)
        finally:
            self._answers = False
            with trio.CancelScope(shield=True):
                await operations.files.close()
        log.info("unmounted" if self._keeper is None else "ended", extra={"mountpoint": state.mountpoint})

    def _tell(self) -> None:
        """Say in the log, to who asks and in the state file how files are read now."""
        try:
            state = self._new_state()
            self._metrics.mode.info({"mode": state.mode, "reason": state.reason})
            log.warning("files are read in another way", extra={"mode": state.mode, "reason": state.reason})
            self._write(msgspec.json.encode(state))
        except (OSError, HeliosError) as error:  # a full disk; a keeper that is gone: the next one is told
            log.warning("the state file is not up to date", extra={"reason": str(error)})

    async def _obey(self, keeper: Attachment) -> None:
        """Go when the keeper says so. A lost one is replaced; where that can't be done the mount is let go, cleanly."""
        lost_at: float | None = None
        while True:
            if lost_at is None:
                await trio.lowlevel.wait_readable(keeper)
            else:
                await trio.sleep(RECONNECT_S)
                if keeper.dropped:
                    self._stop.set()
                    return
                if await trio.to_thread.run_sync(keeper.reconnect):
                    lost_at, self._alone = None, False
                elif trio.current_time() - lost_at > (EXTERNAL_S if keeper.external else ORPHAN_S):
                    log.error("the keeper is gone and no other one came; the mount is let go")
                    self._stop.set()
                    return
            while lost_at is None and (event := keeper.event()) is not None:
                if event is Event.STOP:
                    log.info("the keeper ends this worker")
                    self._stop.set()
                elif event is Event.KEEPER:
                    log.info("another keeper holds the mount", extra={"keeper": keeper.keeper})
                    self._write(msgspec.json.encode(self._new_state()))
                elif self._stop.is_set():
                    return
                else:
                    log.warning("the keeper is gone; another one is awaited")
                    lost_at, self._alone = trio.current_time(), True
                    if not keeper.external and not keeper.dropped:
                        await trio.to_thread.run_sync(self._start_keeper)

    async def _wait_for_cache(self) -> None:
        """The last worker may just be ending: the kernel drops its lock a moment after the process is gone."""
        with trio.move_on_after(CACHE_S):
            for tier in filter(None, (self._plan.cache, self._plan.l2)):
                with contextlib.suppress(OSError):  # a disk that fails: whoever opens the tier says what is wrong
                    while held(tier / "lock"):  # noqa: ASYNC110 - a file lock has no event
                        await trio.sleep(0.02)

    def _start_keeper(self) -> None:
        """Start a keeper that takes the mount over from this worker. In a thread."""
        plan = self._plan
        try:
            succeed(plan.home, plan.mountpoint, plan.created, sys.argv[1:])
        except Conflict as error:
            log.info("somebody else sees to the mount", extra={"reason": error.message})
        except (OSError, HeliosError) as error:
            log.error("no keeper can be started", extra={"reason": str(error)})

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
        control = stack.enter_context(http.listen_here(self._socket_path))
        listen = self._plan.config.mount.listen
        if not listen:
            return control, [], None
        tcp, url = await http.listen_on(listen, "mount.listen")
        return control, tcp, url

    @property
    def _socket_path(self) -> Path:
        return self._plan.home.socket(f"mount-{self._plan.name}")

    def _state(self, url: str | None, mount: PortableMount | NativeMount) -> MountState:
        plan = self._plan
        own = self._keeper is None or self._keeper.external
        me = ProcessId.current() if own or self._keeper is None else ProcessId.of(self._keeper.keeper)
        if me is None:
            raise Unavailable("the keeper of this mount is gone")
        return MountState(
            mountpoint=str(plan.mountpoint),
            pid=me.pid,
            start=me.start,
            since=self._keeper.board.mounted_ns / 1e9 if self._keeper else time.time(),
            cache=str(plan.cache),
            registry=self._urls,
            socket=str(self._socket_path),
            log=plan.log,
            created=plan.created,
            url=url,
            worker=None if own else ProcessId.current(),
            mode=mount.mode,
            reason=mount.reason,
        )

    def _pages(
        self,
        state: MountState,
        mount: PortableMount | NativeMount,
        catalog: Catalog,
        blobs: BlobStore,
        drain: Drain,
    ) -> list[Route]:
        def status() -> Page:
            now: dict[str, object] = {"registry_answers": catalog.answering, "rss_bytes": rss_bytes()}
            now |= {"pool": asdict(blobs.pool.report()), "manifest_bytes": catalog.snapshot_bytes}
            now |= {"draining": drain.draining, "reason": mount.reason}
            return json_page(msgspec.to_builtins(state) | now)

        def ready() -> Page:
            return Page(b"ready\n") if self._answers else Page(b"not mounted\n", status=503)

        return [
            Route("GET", "/metrics", page(lambda: Page(self._metrics.render(), CONTENT_TYPE))),
            Route("GET", "/healthz", page(lambda: Page(b"ok\n"))),
            Route("GET", "/readyz", page(ready)),
            Route("GET", "/api/v1/status", page(status)),
        ]


def _only(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one error in a nest of groups, or the group itself."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _released(keeper: Attachment) -> bool:
    """Whether our keeper has let the mount go: it does so first, and may end us before the device says that.

    One in another container has a mount table of its own, which says nothing here.
    """
    return not keeper.external and all(entry.device != keeper.device for entry in mounts.mount_table())
