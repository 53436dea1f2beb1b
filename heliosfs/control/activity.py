"""What a mount does now, and what it holds, in one document: what ``helios status`` shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import trio
from prometheus_client import Counter, Gauge

from helios.metrics import MountMetrics, rss_bytes
from heliosfs.blobs import BlobStore
from heliosfs.catalog import Catalog
from heliosfs.control.drain import Drain
from heliosfs.control.jobs import ACTIVE, Jobs
from heliosfs.control.models import Seen
from heliosfs.control.rates import Rates
from heliosfs.scrub import Scrubber
from heliosfs.tiers.directory import TierDirectory
from heliosfs.tiers.tier import Tier
from heliosfs.volumes.service import Volumes

SAMPLE_S: Final = 2.0
"""How often numbers are sampled, in seconds."""

MAX_MODELS: Final = 100
MAX_FILLS: Final = 100
MAX_JOBS: Final = 20
"""Models, fills and jobs that one answer names."""

LOCAL: Final = ("l1", "l2", "memory")
"""Tiers that need no source."""


class Activity:
    """Puts the document together. ``run`` samples what only grows."""

    def __init__(
        self,
        store: BlobStore,
        catalog: Catalog,
        volumes: Volumes,
        jobs: Jobs,
        scrubber: Scrubber,
        drain: Drain,
        metrics: MountMetrics,
        seen: Seen,
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        self._store, self._catalog, self._volumes = store, catalog, volumes
        self._jobs, self._scrubber, self._drain = jobs, scrubber, drain
        self._metrics, self._seen, self._clock = metrics, seen, clock
        self._rates = Rates(clock)
        self._since = 0.0

    async def run(self) -> None:
        """Sample until cancelled."""
        self._since = self._clock()
        while True:
            self._rates.feed(self._numbers())
            await trio.sleep(SAMPLE_S)

    async def document(self) -> dict[str, Any]:
        """What goes on now; sizes in bytes, times in seconds, rates in bytes a second."""
        usage, pending = self._store.usage(), self._store.pending()
        return {
            "uptime_s": round(self._clock() - self._since, 1),
            "draining": self._drain.draining,
            "registry_answers": self._catalog.answering,
            "models": await self._models(),
            "tiers": [await trio.to_thread.run_sync(_tier, tier) for tier in self._store.room.all()],
            "reads": self._counts(self._metrics.read_bytes, "read"),
            "opens": self._ratios(self._metrics.opens, "open"),
            "passthrough_opens": sum(_values(self._metrics.passthrough_opens).values()),
            "fills": self._fills(),
            "queued": usage.queued,
            "in_flight": usage.in_flight,
            "unflushed": pending.unflushed,
            "sources": self._sources(),
            "scrubber": self._scrubber.document(),
            "jobs": [job.document(self._jobs.now()) for job in self._latest_jobs()],
            "oldest_request_s": round(sum(_values(self._metrics.oldest_request).values()), 3),
            "open_files": int(sum(_values(self._metrics.open_handles).values())),
            "rss_bytes": int(rss_bytes()),
        }

    # --- inside ---

    def _numbers(self) -> dict[str, float]:
        metrics = self._metrics
        found = {f"read {tier}": value for tier, value in _values(metrics.read_bytes).items()}
        found |= {f"open {tier}": value for tier, value in _values(metrics.opens).items()}
        found |= {f"source {name}": value for name, value in _values(metrics.fetched_bytes).items()}
        return found | {f"fill {want.sha256}": float(local) for want, local in self._store.fills()}

    def _counts(self, counter: Counter, what: str) -> dict[str, dict[str, int]]:
        """What a counter says by tier: in all, and in the last minute."""
        values = _values(counter)
        lately = {tier: self._rates.grown(f"{what} {tier}") for tier in values}
        return {
            name: {tier: int(n) for tier, n in each.items()} for name, each in (("total", values), ("minute", lately))
        }

    def _ratios(self, counter: Counter, what: str) -> dict[str, dict[str, Any]]:
        """The same, each with the share that needed no source. Not for bytes: the kernel reads most of what is here
        itself, so of those that are counted few are."""
        counts = self._counts(counter, what)
        return {name: each | {"hit_ratio": _hit_ratio(each)} for name, each in counts.items()}

    def _fills(self) -> list[dict[str, Any]]:
        out = []
        for want, local in self._store.fills()[:MAX_FILLS]:
            rate = self._rates.rate(f"fill {want.sha256}")
            eta_s = round((want.size - local) / rate, 1) if rate else None
            named = {"repo": str(want.repo), "commit": want.commit, "path": want.path, "sha256": want.sha256}
            out.append(named | {"bytes": want.size, "local": local, "rate": round(rate), "eta_s": eta_s})
        return out

    def _sources(self) -> list[dict[str, Any]]:
        failed: dict[str, float] = {}
        for labels, value in _labelled(self._metrics.fetch_failures):
            failed[labels["source"]] = failed.get(labels["source"], 0.0) + value
        fetched = _values(self._metrics.fetched_bytes)
        return [
            {
                "name": source.name,
                "state": "paused" if source.paused_s else "ok",
                "paused_s": round(source.paused_s, 3),
                "latency_s": round(source.latency_s, 6),
                "rate": round(self._rates.rate(f"source {source.name}")),
                "in_flight": source.running,
                "connections": source.connections,
                "fetched": int(fetched.get(source.name, 0)),
                "failures": int(failed.get(source.name, 0)),
                "failures_in_a_row": source.failures,
            }
            for source in self._store.sources()
        ]

    def _latest_jobs(self) -> list[Any]:
        jobs = self._jobs.all()
        active = [job for job in jobs if job.state in ACTIVE]
        ended = [job for job in jobs if job.state not in ACTIVE]
        return [*active, *reversed(ended)][:MAX_JOBS]

    async def _models(self) -> list[dict[str, Any]]:
        seen = {key: files.sizes for key, files in (await self._seen.files()).items()}
        tiers = [(tier.files, set(tier.room.policy.entries)) for tier in self._store.tiers]
        here = await trio.to_thread.run_sync(_local_bytes, list(seen.values()), tiers)
        volumes = {(record.repo, record.commit) for record in self._volumes.known().value.values()}
        pins = {(pin.repo, pin.commit): pin.priority for pin in self._store.room.pins.all()}
        models: list[dict[str, Any]] = []
        for (repo, commit), files in seen.items():
            local = sum(here.get(sha256, 0) for sha256 in files)
            key = (str(repo), commit)
            if not local and key not in pins and key not in volumes:
                continue
            models.append(
                {
                    "repo": key[0],
                    "commit": commit,
                    "refs": self._catalog.refs_at(repo, commit),
                    "files": len(files),
                    "local_files": sum(here.get(sha256, 0) == size for sha256, size in files.items()),
                    "bytes": sum(files.values()),
                    "local": local,
                    "class": pins.get(key, "critical" if key in volumes else "normal"),
                    "volume": key in volumes,
                }
            )
        models.sort(key=lambda model: (-model["local"], model["repo"], model["commit"]))
        return models[:MAX_MODELS]


def _local_bytes(
    commits: Iterable[Mapping[str, int]], tiers: Sequence[tuple[TierDirectory, set[str]]]
) -> dict[str, int]:
    """Local bytes of the blobs of these commits; with each tier what it has. In a thread."""
    here = {}
    sizes = {sha256: size for files in commits for sha256, size in files.items()}
    for sha256, size in sizes.items():
        for files, known in tiers:
            if files.is_whole(sha256):
                here[sha256] = size
            elif sha256 in known:
                here[sha256] = max(here.get(sha256, 0), files.held(sha256)[0])
    return here


def _tier(tier: Tier) -> dict[str, Any]:
    """In a thread."""
    policy, disk, directory = tier.policy, tier.disk(), tier.directory
    files, size = (0, 0) if directory is None or disk is None else directory.quarantine.usage()
    return {
        "name": tier.name,
        "path": str(tier.root),
        "state": tier.health.state.value,
        "used": policy.used,
        "reserved": policy.reserved,
        "limit": policy.bounds.limit,
        "min_free": policy.bounds.min_free,
        "free": 0 if disk is None else disk.free,
        "total": 0 if disk is None else disk.total,
        "blobs": len(policy.entries),
        "quarantined": files,
        "quarantined_bytes": size,
    }


def _hit_ratio(values: dict[str, int]) -> float | None:
    """The share that needed no source; None where there are none."""
    total = sum(values.values())
    return round(sum(values.get(tier, 0) for tier in LOCAL) / total, 4) if total else None


def _labelled(metric: Counter | Gauge) -> list[tuple[dict[str, str], float]]:
    """A metric's samples: labels and value."""
    found = (sample for family in metric.collect() for sample in family.samples)
    return [(sample.labels, sample.value) for sample in found if not sample.name.endswith("_created")]


def _values(metric: Counter | Gauge) -> dict[str, float]:
    """A metric's samples by the value of its only label."""
    return {next(iter(labels.values()), ""): value for labels, value in _labelled(metric)}
