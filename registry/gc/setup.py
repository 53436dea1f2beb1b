"""The registry's collections, verifications, repairs and compressions, made from its settings."""

from __future__ import annotations

from helios.config import RegistrySettings
from registry.catalog import Catalog
from registry.gc.collect import Times
from registry.gc.jobs import Jobs, Settings
from registry.gc.mending import Mender, repairing
from registry.pull.setup import Pulling


def make_mender(settings: RegistrySettings, catalog: Catalog, pulling: Pulling) -> Mender:
    """What repairs damage that a reader found, from the same sources."""
    keep_s = settings.lease_s + settings.gc_grace_s
    sources = repairing(catalog, keep_s, settings.peers, pulling.upstream)
    return Mender(catalog, sources, rate=settings.verify_mb_s * 1e6)


def make_jobs(settings: RegistrySettings, catalog: Catalog, pulling: Pulling) -> Jobs:
    """Jobs that repair from the configured peers, and from the Hub that models are pulled from."""
    times = Times(settings.keep_commits_s, settings.gc_grace_s, settings.lease_s, settings.keep_history)
    jobs = Settings(
        settings.gc_every_s,
        times,
        settings.verify_mb_s,
        settings.recompress_after_s,
        settings.recompress_min_gain,
        settings.recompress_mb_s,
    )
    return Jobs(catalog, jobs, settings.peers, pulling.upstream, pulling.downloads.expire)
