"""The registry's collections and verifications, made from its settings."""

from __future__ import annotations

from helios.config import RegistrySettings
from registry.catalog import Catalog
from registry.gc.collect import Times
from registry.gc.jobs import Jobs, Settings
from registry.pull.upstream import Upstream


def make_jobs(settings: RegistrySettings, catalog: Catalog, upstream: Upstream) -> Jobs:
    """Jobs that repair from the configured peers, and from the Hub that models are pulled from."""
    times = Times(settings.keep_commits_s, settings.gc_grace_s, settings.lease_s, settings.keep_history)
    return Jobs(catalog, Settings(settings.gc_every_s, times, settings.verify_mb_s), settings.peers, upstream)
