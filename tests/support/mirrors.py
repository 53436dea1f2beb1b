"""A mirror beside a catalog in the test's own process."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from helios.config import RegistrySettings
from helios.metrics import RegistryMetrics
from registry.catalog import Catalog
from registry.ingest.ingest import Ingest
from registry.mirror.mirror import Mirror
from registry.pull.setup import kept_blobs, make_pulling
from registry.pull.spool import Spool
from registry.sessions import Sessions
from registry.threads import Threads


def make_mirror(stack: contextlib.ExitStack, catalog: Catalog, root: Path, **settings: Any) -> Mirror:
    """By default one that asks nobody: ``mirror`` is off."""
    chosen = RegistrySettings(**{"mirror": "off", "upstream": "http://127.0.0.1:9", **settings})
    ingest = Ingest(catalog.store, catalog.index)
    sessions = Sessions(catalog, catalog.store, ingest, lambda: kept_blobs(catalog))
    spool = Spool(root / "pulls")
    pulling = make_pulling(chosen, {}, catalog, catalog.store, sessions, spool, RegistryMetrics())
    stack.callback(pulling.close)
    long = stack.enter_context(contextlib.closing(Threads("long", 2)))
    mirror = Mirror(chosen, catalog, pulling, long)
    stack.callback(mirror.close)
    return mirror
