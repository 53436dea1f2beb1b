"""The pulls of a registry, made from its settings."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from helios.config import RegistrySettings
from helios.metrics import RegistryMetrics
from heliosfs.store.objects import ObjectStore
from registry.catalog import Catalog
from registry.pull.pull import Puller
from registry.pull.pulls import Pulls
from registry.pull.spool import Spool
from registry.pull.upstream import Upstream
from registry.sessions import Sessions

DEFAULT_ENDPOINT = "https://huggingface.co"


def make_pulls(
    settings: RegistrySettings,
    environ: Mapping[str, str],
    catalog: Catalog,
    store: ObjectStore,
    sessions: Sessions,
    spool: Spool,
    metrics: RegistryMetrics,
) -> Pulls:
    """Pulls from the configured upstream, else from HF_ENDPOINT, else from huggingface.co."""
    upstream = Upstream(endpoint_of(settings, environ), stall_s=settings.pull_stall_s)

    def free_bytes() -> dict[str, int]:
        return free_on(spool.ensure(), store.staging())

    puller = Puller(catalog, sessions, spool, upstream, files=settings.pull_files, free_bytes=free_bytes)
    return Pulls(catalog, sessions, spool, upstream, puller, metrics)


def endpoint_of(settings: RegistrySettings, environ: Mapping[str, str]) -> str:
    """The Hub to pull from."""
    return settings.upstream or environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT


def free_on(spool: Path, store: Path) -> dict[str, int]:
    """Bytes free for downloads and for the object store: ``both`` where they share a file system."""
    if os.stat(spool).st_dev == os.stat(store).st_dev:
        return {"both": shutil.disk_usage(store).free}
    return {"spool": shutil.disk_usage(spool).free, "store": shutil.disk_usage(store).free}
