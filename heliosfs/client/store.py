"""The store, for programs on trio: ``connect`` puts the parts together and owns their tasks."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import trio

from helios.config import Config, load
from helios.embedded import attach
from helios.errors import Unavailable
from helios.home import Home
from helios.metrics import MountMetrics
from helios.names import split_spec
from helios.tokens import no_token, token_of
from heliosfs.blobs import BlobRef, BlobStore, open_store
from heliosfs.catalog import Catalog
from heliosfs.client.buffers import Descriptor
from heliosfs.client.caches import Cache, choose
from heliosfs.client.calls import Calls, background
from heliosfs.client.file import File
from heliosfs.client.model import Model
from heliosfs.client.routes import MountRoute, Route, SharedRoute
from heliosfs.client.values import Closed, FileInfo, FileStatus, StoreStatus
from heliosfs.metadata import MetadataClient
from heliosfs.records import Records
from heliosfs.resolve import resolve

T = TypeVar("T")

THREADS: Final = 8
"""Reads of local files at a time."""

MOUNT_THREADS: Final = 16
"""Reads through a mount at a time, those that it never answered included."""

CALL_S: Final = 30.0
"""Deadline of ``resolve`` and ``open`` where none is given, in seconds."""

CLOSE_S: Final = 30.0
"""How long open files may take to be closed at the end, in seconds."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to connect to: a configuration on a home. ``cache`` is the directory that was asked for, if any."""

    config: Config
    home: Home
    cache: Path | None

    @property
    def configured_cache(self) -> Path:
        """The home's own cache directory."""
        configured = self.config.mount.cache
        return Path(os.path.abspath(configured)) if configured else self.home.cache

    @property
    def configured_l2(self) -> Path | None:
        """The second tier of the home's own cache, if there is one."""
        configured = self.config.mount.l2
        return Path(os.path.abspath(configured)) if configured else None


def plan(
    *,
    home: Path | str | None = None,
    config: Path | str | None = None,
    registry: str | Sequence[str] | None = None,
    cache: Path | str | None = None,
) -> Plan:
    """What ``connect`` works with: file, environment and HELIOS_HOME as every command, then the arguments.

    Raises UsageError for a configuration that is wrong.
    """
    environ = dict(os.environ)
    if home is not None:
        environ["HELIOS_HOME"] = os.path.abspath(home)
    urls = [registry] if isinstance(registry, str) else registry
    overrides: dict[str, dict[str, Any]] = {"registry": {"urls": None if urls is None else list(urls)}}
    settings = load(environ, overrides, None if config is None else Path(config))
    chosen = None if cache is None else Path(os.path.abspath(cache))
    return Plan(settings, Home.from_env(environ), chosen)


@dataclass(frozen=True, slots=True)
class Parts:
    """What a store is made of; whoever made them closes them."""

    urls: tuple[str, ...]
    cache: Cache
    catalog: Catalog
    patience_s: float


def assemble(plan: Plan, stack: ExitStack) -> Parts:
    """Find the registry, started if it is the embedded one, and open the cache; ``stack`` undoes both. Blocks.

    Raises HeliosError.
    """
    urls, revive, beside = list(plan.config.registry.urls), None, None
    shown = tuple(urls)
    if not urls:
        registry = stack.enter_context(attach(plan.config, plan.home))
        urls, revive, beside = [registry.base], registry.ensure, registry.store
        shown = tuple(registry.urls)
    settings = plan.config.mount
    token = token_of(plan.config.registry.token_file) if revive is None else no_token

    def open_in(root: Path, l2: Path | None) -> BlobStore:
        return open_store(root, urls, settings, MountMetrics(), revive, beside, l2, token)

    cache = choose(plan.home, plan.configured_cache, plan.configured_l2, plan.cache, open_in)
    stack.enter_context(closing(cache.store))
    metadata = stack.enter_context(closing(MetadataClient(urls, revive, token)))
    records = stack.enter_context(closing(Records(cache.root / "catalog.db")))
    patience_s = 2 * settings.request_deadline_s * (len(urls) + 1) + 10
    return Parts(shown, cache, Catalog(metadata, records), patience_s)


@asynccontextmanager
async def connect(
    *,
    home: Path | str | None = None,
    config: Path | str | None = None,
    registry: str | Sequence[str] | None = None,
    cache: Path | str | None = None,
) -> AsyncIterator[Store]:
    """A store for as long as the block runs.

    Configured as every command is: the file, the environment, HELIOS_HOME; the arguments win. ``registry`` is a URL or
    several; without any the home's embedded registry is used, and started if it does not run. ``cache`` is a directory
    that no other process uses; by default the home's, or beside it where another process has that.

    Raises UsageError for a wrong configuration, Conflict when another process has ``cache``, Unavailable, NoSpace.
    """
    chosen = plan(home=home, config=config, registry=registry, cache=cache)
    with ExitStack() as stack:
        parts = await trio.to_thread.run_sync(assemble, chosen, stack)
        async with running(parts) as store:
            yield store


@asynccontextmanager
async def running(parts: Parts) -> AsyncIterator[Store]:
    """A store of these parts, working as long as the block runs."""
    await parts.catalog.load()
    async with background() as nursery:
        await nursery.start(parts.cache.store.run)
        await nursery.start(parts.catalog.run)
        store = Store(parts)
        try:
            yield store
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_S):
                await store.close()


class Store:
    """Models of a registry, with the local cache. Its methods belong to one trio loop; tasks may share it."""

    def __init__(self, parts: Parts) -> None:
        self.cache = parts.cache
        self._parts, self._catalog = parts, parts.catalog
        self._calls = Calls("the store")
        self._files: set[File] = set()
        self._threads = trio.CapacityLimiter(THREADS)
        self._mount_threads = trio.CapacityLimiter(MOUNT_THREADS)

    async def resolve(self, spec: str, *, kind: str = "models", deadline_s: float | None = CALL_S) -> Model:
        """The model ``org/name[@revision]`` at the commit that the revision names now (``main`` by default).

        While no registry answers, what a name named last counts. Raises InvalidInput for a malformed spec,
        RepoNotFound, RevisionNotFound, DeadlineExceeded, Unavailable.
        """
        repo, revision = split_spec(spec, kind=kind)
        try:
            found = await self.call(f"resolving {spec}", deadline_s, partial(resolve, repo, revision, self._catalog))
        except Closed:
            raise
        except Unavailable as error:
            raise type(error)(
                f"{spec} can't be resolved: {error.message} ({', '.join(self._parts.urls)})",
                hint="Start the registry, or check registry.urls (HELIOS_REGISTRY__URLS, connect(registry=...)).",
            ) from error
        return Model(self, found, revision)

    async def status(self) -> StoreStatus:
        """What the store holds and does now."""
        self._calls.check()
        await trio.lowlevel.checkpoint()
        cache, usage = self.cache, self.cache.store.usage()
        tiers, disk = usage.tiers.values(), usage.tiers.get("l1")
        return StoreStatus(
            cache=cache.root,
            own_cache=cache.shared is None,
            shared=cache.shared,
            mountpoint=cache.mountpoint,
            registry=self._parts.urls,
            registry_answers=self._catalog.answering,
            blobs=sum(tier.blobs for tier in tiers),
            blob_bytes=sum(tier.blob_bytes for tier in tiers),
            partials=sum(tier.partials for tier in tiers),
            partial_bytes=sum(tier.partial_bytes for tier in tiers),
            disk_free=disk.free if disk else 0,
            disk_total=disk.total if disk else 0,
            filling=usage.filling,
            queued=usage.queued,
            in_flight=usage.in_flight,
            memory=usage.memory,
            open_files=len(self._files),
        )

    async def close(self) -> None:
        """End the calls under way and close the files that are open; ``connect`` calls it."""
        await self._calls.close()
        for file in list(self._files):
            await file.close()

    # --- for models ---

    async def call(self, what: str, deadline_s: float | None, call: Callable[[], Awaitable[T]]) -> T:
        """Do something that the store's close, or a deadline, may end."""
        return await self._calls.run(what, deadline_s, call)

    async def open_file(self, want: BlobRef, info: FileInfo, deadline_s: float | None) -> File:
        """Open a file of a commit."""
        seconds = CALL_S if deadline_s is None else deadline_s
        return await self.call(f"opening {want.path}", seconds, partial(self._open, want, info))

    async def held(self, want: BlobRef) -> FileStatus:
        """How much of a file is here."""
        own = self.cache.store.status(want.sha256)
        if not own.complete and (shared := await self._shared(want)) is not None:
            shared.close()
            return FileStatus(want.path, want.size, want.size, True)
        return FileStatus(want.path, want.size, own.local_bytes, own.complete)

    async def _open(self, want: BlobRef, info: FileInfo) -> File:
        local, route = None, None
        if not want.size:
            local = Descriptor(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), want.path, 0)
        elif not self.cache.store.status(want.sha256).complete:
            local = await self._shared(want)
        if local is None:
            route = await self._route(want)
        file = File(info, want, self.cache, local, route, self._threads, self._files.discard)
        self._files.add(file)
        try:
            await file.look()
        except BaseException:
            with trio.CancelScope(shield=True):
                await file.close()
            raise
        return file

    async def _shared(self, want: BlobRef) -> Descriptor | None:
        if self.cache.shared is None:
            return None
        return await trio.to_thread.run_sync(self.cache.open_shared, want, limiter=self._threads)

    async def _route(self, want: BlobRef) -> Route:
        own = partial(self.cache.store.open, want)
        path = self.cache.mounted(want)
        if path is None or self.cache.store.status(want.sha256).complete:
            return await own()
        try:
            mount = await MountRoute.open(path, want.size, self._parts.patience_s, self._mount_threads)
        except Unavailable:
            return await own()
        return SharedRoute(mount, own)
