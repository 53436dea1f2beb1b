"""Every metric Helios exports: one place for the names.

Each daemon makes one of these classes on a registry of its own and hands it to what it runs; there is no global state.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST
LATENCY_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """A registry and its text form."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.build = Info("helios_build", "Version of Helios", registry=self.registry)
        self.rss = Gauge("helios_rss_anon_shmem_bytes", "RssAnon + RssShmem of the process", registry=self.registry)
        self.rss.set_function(rss_bytes)

    def render(self) -> bytes:
        """The Prometheus text exposition."""
        return generate_latest(self.registry)


class RegistryMetrics(Metrics):
    def __init__(self) -> None:
        super().__init__()
        r = self.registry
        self.requests = Counter("helios_registry_requests_total", "Requests answered", ["route", "status"], registry=r)
        self.latency = Histogram(
            "helios_registry_request_seconds", "Time to the end of an answer", ["route"], buckets=LATENCY_S, registry=r
        )
        self.sent_bytes = Counter("helios_registry_sent_bytes_total", "Object bytes sent", registry=r)
        self.store_problems = Gauge(
            "helios_registry_store_problems", "Directories of the store that lack something", registry=r
        )
        self.redirected = Counter(
            "helios_registry_redirects_total", "Downloads sent to the object store itself", registry=r
        )
        self.ingested_bytes = Counter(
            "helios_registry_ingested_bytes_total", "Bytes published", ["result"], registry=r
        )  # result: new, deduplicated
        self.verify_failures = Counter("helios_registry_verify_failures_total", "Hash mismatches found", registry=r)
        self.fetched_bytes = Counter(
            "helios_registry_fetched_bytes_total", "Bytes of files fetched from the upstream Hub", registry=r
        )
        self.pulls = Counter("helios_registry_pulls_total", "Pulls from the upstream Hub", ["result"], registry=r)
        self.xorb_bytes = Counter("helios_registry_xorb_bytes_total", "Bytes of Xet xorbs sent", registry=r)
        self.xet_layouts = Counter(
            "helios_registry_xet_layouts_total", "Blobs that hf-xet has laid out", ["result"], registry=r
        )  # result: made, failed
        self.xet_waiting = Gauge("helios_registry_xet_waiting", "Blobs that wait for a Xet layout", registry=r)
        self.repositories = Gauge("helios_registry_repositories", "Repositories held", registry=r)


class MountMetrics(Metrics):
    def __init__(self) -> None:
        super().__init__()
        r = self.registry
        self.mode = Info("helios_mount_mode", "Mount mode and why", registry=r)
        self.operations = Histogram(
            "helios_mount_operation_seconds",
            "Latency of filesystem operations",
            ["operation"],
            buckets=LATENCY_S,
            registry=r,
        )
        self.requests = Histogram(
            "helios_mount_request_seconds",
            "From a request's coming to its answer, by operation",
            ["operation"],
            buckets=LATENCY_S,
            registry=r,
        )
        self.errors = Counter(
            "helios_mount_errors_total", "Operations answered with an error", ["operation", "errno"], registry=r
        )
        self.read_bytes = Counter("helios_mount_read_bytes_total", "Bytes read through the mount", ["tier"], registry=r)
        self.opens = Counter(
            "helios_mount_opens_total", "Files opened, by where their bytes were", ["tier"], registry=r
        )  # tier: l1 (all of them), partial, remote
        self.fetched_bytes = Counter("helios_mount_fetched_bytes_total", "Bytes fetched", ["source"], registry=r)
        self.fetch_failures = Counter(
            "helios_mount_fetch_failures_total", "Fetches that failed", ["source", "reason"], registry=r
        )
        self.verify_failures = Counter(
            "helios_mount_verify_failures_total", "Chunks whose hash was wrong", ["source"], registry=r
        )
        self.damaged = Counter("helios_mount_damaged_blobs_total", "Local blobs found to be wrong", registry=r)
        self.scrubbed_bytes = Counter(
            "helios_mount_scrubbed_bytes_total", "Bytes looked at by the scrubber", registry=r
        )
        self.quarantined = Gauge("helios_mount_quarantine_files", "Files in quarantine", registry=r)
        self.fills = Gauge("helios_mount_fills", "Blobs being filled", registry=r)
        self.evictions = Counter(
            "helios_mount_cache_evictions_total", "Blobs removed from a local tier", ["tier", "reason"], registry=r
        )  # reason: room, bounds, asked, moved (the other tier has it), damaged
        self.evicted_bytes = Counter(
            "helios_mount_cache_evicted_bytes_total", "Disk bytes that evictions freed", ["tier", "reason"], registry=r
        )
        self.cache_used = Gauge("helios_mount_cache_used_bytes", "Disk bytes of a tier's blobs", ["tier"], registry=r)
        self.cache_reserved = Gauge(
            "helios_mount_cache_reserved_bytes", "Disk bytes promised to what is being written", ["tier"], registry=r
        )
        self.cache_limit = Gauge(
            "helios_mount_cache_limit_bytes", "Most bytes of a tier (0: bounded by free space)", ["tier"], registry=r
        )
        self.cache_up = Gauge("helios_mount_cache_up", "Whether a tier can be read and written", ["tier"], registry=r)
        self.cache_moves = Counter(
            "helios_mount_cache_moves_total", "Blobs moved between tiers", ["move"], registry=r
        )  # move: promotion (to L1), demotion (to L2)
        self.cache_moved_bytes = Counter(
            "helios_mount_cache_moved_bytes_total", "Bytes of blobs moved between tiers", ["move"], registry=r
        )
        self.pool_used = Gauge("helios_mount_pool_used_bytes", "Memory that the pool takes", ["kind"], registry=r)
        # kind: small, header, recipe, chunk
        self.pool_limit = Gauge("helios_mount_pool_limit_bytes", "Most memory of the pool", registry=r)
        self.pool_hits = Counter("helios_mount_pool_hits_total", "Chunks found in the pool", ["kind"], registry=r)
        self.manifest_bytes = Gauge(
            "helios_mount_manifest_bytes", "Memory that the manifests in use take, about", registry=r
        )
        self.shadow_compared = Counter(
            "helios_mount_shadow_compared_total", "Reads compared with a plain download", ["way"], registry=r
        )  # way: read, passthrough
        self.shadow_bytes = Counter("helios_mount_shadow_bytes_total", "Bytes of reads compared", registry=r)
        self.shadow_mismatches = Counter(
            "helios_mount_shadow_mismatches_total", "Reads that differ from a plain download", registry=r
        )
        self.shadow_errors = Counter(
            "helios_mount_shadow_errors_total", "Reads that could not be compared", ["side"], registry=r
        )  # side: mount, download
        self.shadow_dropped = Counter(
            "helios_mount_shadow_dropped_total", "Reads not compared because too many waited", registry=r
        )
        self.shadow_seconds = Histogram(
            "helios_mount_shadow_seconds", "Time of the reads compared", ["side"], buckets=LATENCY_S, registry=r
        )
        self.open_handles = Gauge("helios_mount_open_handles", "Open file handles", registry=r)
        self.inherited_files = Gauge(
            "helios_mount_inherited_files", "Files held because they are open since an earlier worker", registry=r
        )
        self.inodes = Gauge("helios_mount_inodes", "Inodes the kernel knows", registry=r)
        self.passthrough_opens = Counter(
            "helios_mount_passthrough_opens_total", "Files opened for the kernel to read itself", registry=r
        )
        self.channel_reads = Counter(
            "helios_mount_channel_reads_total", "READs answered without the event loop", registry=r
        )
        self.resends = Counter(
            "helios_mount_resends_total", "Requests that an earlier worker had not answered", registry=r
        )
        self.oldest_request = Gauge(
            "helios_mount_oldest_request_seconds", "Age of the oldest request that is not answered", registry=r
        )


class RouterMetrics(Metrics):
    def __init__(self) -> None:
        super().__init__()
        r = self.registry
        self.requests = Counter(
            "helios_router_requests_total", "Requests answered", ["route", "model", "status"], registry=r
        )
        self.first_byte = Histogram(
            "helios_router_first_byte_seconds",
            "Request to first byte of the answer",
            ["model"],
            buckets=LATENCY_S,
            registry=r,
        )
        self.duration = Histogram(
            "helios_router_request_seconds", "Request to end of the answer", ["model"], buckets=LATENCY_S, registry=r
        )
        self.in_flight = Gauge("helios_router_in_flight", "Requests at a worker now", ["worker"], registry=r)
        self.worker_up = Gauge(
            "helios_router_worker_up", "1 while a worker is healthy", ["worker", "model"], registry=r
        )
        self.retries = Counter("helios_router_retries_total", "Requests sent to another worker", ["reason"], registry=r)
        self.disconnects = Counter("helios_router_client_disconnects_total", "Clients gone before the end", registry=r)
        self.cut = Counter(
            "helios_router_cut_answers_total", "Answers broken off after their first byte", ["reason"], registry=r
        )


def rss_bytes() -> float:
    """RssAnon + RssShmem of this process in bytes (mapped files are not counted)."""
    total = 0
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(("RssAnon:", "RssShmem:")):
                total += int(line.split()[1]) * 1024
    return float(total)
