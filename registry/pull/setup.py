"""What downloads of a registry work with, made from its settings."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from helios.config import RegistrySettings, without_credentials
from helios.metrics import RegistryMetrics
from heliosfs.store.objects import ObjectStore
from registry.catalog import Catalog
from registry.metadata import mirror as tables
from registry.processes import Processes
from registry.pull.downloads import Downloads
from registry.pull.flights import Flights
from registry.pull.pull import Puller
from registry.pull.pulls import Pulls
from registry.pull.sharing import Sharing
from registry.pull.spool import Spool
from registry.pull.upstream import Upstream
from registry.sessions import Sessions

DEFAULT_ENDPOINT = "https://huggingface.co"


@dataclass(frozen=True)
class Pulling:
    """The parts; close it at shutdown."""

    upstream: Upstream
    flights: Flights
    pulls: Pulls
    downloads: Downloads

    def stop(self) -> None:
        """End what is under way, within bounds."""
        self.pulls.close()
        self.flights.close()

    def close(self) -> None:
        self.stop()
        self.upstream.close()


def make_pulling(
    settings: RegistrySettings,
    environ: Mapping[str, str],
    catalog: Catalog,
    store: ObjectStore,
    sessions: Sessions,
    spool: Spool,
    metrics: RegistryMetrics,
    processes: Processes | None = None,
) -> Pulling:
    """Downloads from the configured upstream, else from HF_ENDPOINT, else from huggingface.co. ``processes`` are
    the registry's others, with which downloads are shared."""
    endpoint = settings.upstream or without_credentials(environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT, "HF_ENDPOINT")
    upstream = Upstream(
        endpoint,
        stall_s=settings.pull_stall_s,
        redirects=settings.upstream_redirects,
        offline=settings.offline or environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"),
    )

    def free_bytes() -> dict[str, int]:
        return free_on(spool.ensure(), store.staging())

    flights = Flights(
        upstream,
        catalog.database,
        sessions,
        spool,
        connections=settings.pull_connections,
        finish=settings.mirror_finish,
        free_bytes=free_bytes,
        fetched=metrics.fetched_bytes.inc,
        sharing=None if processes is None else Sharing(catalog, processes),
    )
    with contextlib.ExitStack() as undo:
        undo.callback(upstream.close)
        downloads = Downloads(catalog.database, sessions, spool, flights, keep_s=settings.keep_commits_s)
        puller = Puller(catalog, sessions, spool, flights, upstream.endpoint, files=settings.pull_files)
        pulls = Pulls(catalog, downloads, upstream, puller, metrics)
        undo.pop_all()
    return Pulling(upstream, flights, pulls, downloads)


def kept_blobs(catalog: Catalog) -> set[tuple[str, str]]:
    """Blobs, by domain and sha256, that stay in the store although no commit holds them yet."""
    with catalog.database.read() as connection:
        found = tables.downloaded(connection)
    return {(catalog.domain_of(repo), sha256) for repo, sha256 in found}


def free_on(spool: Path, store: Path) -> dict[str, int]:
    """Bytes free for downloads and for the object store: ``both`` where they share a file system."""
    if os.stat(spool).st_dev == os.stat(store).st_dev:
        return {"both": shutil.disk_usage(store).free}
    return {"spool": shutil.disk_usage(spool).free, "store": shutil.disk_usage(store).free}
