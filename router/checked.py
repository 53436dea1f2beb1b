"""Whether settings can work: asked before anything is started with them, and before they replace others."""

from __future__ import annotations

import random
import time
from typing import Final

from helios.config import DiscoverySettings, RegistrySettings, RouterSettings
from helios.errors import UsageError
from helios.metrics import RouterMetrics
from router import descriptors, tls, worker_keys
from router.admin_access import Access
from router.admission.admission import make
from router.batches import service as batches
from router.discovery.assembly import Discovery
from router.discovery.waking import waker
from router.kv.publishers import check_settings
from router.picker import port as picker
from router.resilience.resilience import Resilience
from router.scheduling.configured import Tools, build
from router.tracing import settings as tracing
from router.workers import Workers

MAX_PROCESSES: Final = 256


def check(settings: RouterSettings, registry: RegistrySettings) -> list[str]:
    """The models' names; raises UsageError for settings that can't work. ``registry``: the one that is asked.

    Each part says itself what it can't do, so all of them are made here once, and nothing is run.
    """
    for name in (
        "connect_timeout_s", "first_byte_timeout_s", "idle_timeout_s", "health_interval_s", "health_timeout_s",
        "max_body_mib", "max_buffered_mib", "drain_s", "scrape_interval_s",
    ):  # fmt: skip
        if getattr(settings, name) <= 0:
            raise UsageError(f"router.{name} must be more than 0, not {getattr(settings, name)}")
    for name in ("min_tokens", "max_waiting_tokens", "timeout_s", "lease_s"):
        if (value := getattr(settings.disaggregation, name)) <= 0:
            raise UsageError(f"router.disaggregation.{name} must be more than 0, not {value}")
    if not 0 < (part := settings.disaggregation.cache_hit_threshold) <= 1:
        raise UsageError(f"router.disaggregation.cache_hit_threshold must be more than 0 and at most 1, not {part:g}")
    if settings.slow_start_s < 0:
        raise UsageError(f"router.slow_start_s must not be less than 0, not {settings.slow_start_s}")
    if not 0 <= settings.processes <= MAX_PROCESSES:
        raise UsageError(
            f"router.processes must be between 0 and {MAX_PROCESSES}, not {settings.processes}",
            hint="0 means one for each core.",
        )
    descriptors.most_connections(settings.max_connections)
    if not settings.workers and settings.discovery == DiscoverySettings() and not settings.admin_tokens:
        raise UsageError(
            "no worker is configured",
            hint="Give --worker MODEL=URL, once for each worker, or say in router.discovery where they come from.",
        )
    tls.certificate(settings)
    tls.to_workers(settings)
    worker_keys.check(settings)
    metrics = RouterMetrics()
    Resilience(settings, metrics)
    workers = Workers(settings.workers, time.monotonic)
    if silent := workers.without_decode():
        raise UsageError(
            f"every worker of {silent[0]!r} has role=prefill, so none would answer clients",
            hint="Give it a worker with role=decode or without a role.",
        )
    built = build(settings.policy, Tools(time.monotonic, random.Random(), 1.0))  # noqa: S311 - no secret
    check_settings(settings.kv_events)
    silent_workers = not any(worker.kv.publishes(settings.kv_events) for worker in workers.all)
    if built.asks_index and settings.workers and silent_workers and settings.discovery == DiscoverySettings():
        raise UsageError(
            "the policy goes by the KV events of workers, and none of them is said to publish any",
            hint="Set router.kv_events.port, or kv_events of a worker; workers publish with --kv-events-config.",
        )
    make(settings, workers, metrics)
    waker(settings.admission)
    if settings.discovery.hold and not settings.discovery.resolve:
        raise UsageError("router.discovery.hold holds requests while the registry is asked, which needs resolve")
    Discovery(settings.discovery, registry, workers.apply, lambda model: False, metrics)
    batches.check(settings.batches)
    picker.check(settings.picker)
    tracing.check(settings.tracing)
    Access(settings.admin_tokens, settings.discovery.registrars, settings.demand_tokens)
    return workers.models
