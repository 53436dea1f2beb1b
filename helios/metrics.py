"""Every metric Helios exports: one place for the names.

Each daemon makes one of these classes on a registry of its own and hands it to what it runs; there is no global state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, Metric, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.registry import Collector

from helios.series import Counts, Times

CONTENT_TYPE = CONTENT_TYPE_LATEST
LATENCY_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """A registry and its text form."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.build = Info("helios_build", "Version of Helios", registry=self.registry)
        self.rss = Gauge("helios_rss_anon_shmem_bytes", "RssAnon + RssShmem of the process", registry=self.registry)
        self.rss.set_function(_Rss())

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
        self.front_limit = Gauge(
            "helios_registry_front_limit_bytes", "Most bytes of the front store (0: no limit)", registry=r
        )
        self.front_used = Gauge("helios_registry_front_used_bytes", "Bytes of the front store's objects", registry=r)
        self.front_waiting = Gauge(
            "helios_registry_front_waiting", "Objects to be uploaded or removed in the cloud", registry=r
        )
        self.front_waiting_bytes = Gauge(
            "helios_registry_front_waiting_bytes", "Bytes that only the front store has", registry=r
        )
        self.front_uploads = Counter(
            "helios_registry_front_uploads_total", "What waited in the front store", ["result"], registry=r
        )  # result: done, removed, failed
        self.front_reads = Counter(
            "helios_registry_front_reads_total", "Reads of objects, by where they were", ["level"], registry=r
        )  # level: front, store
        self.front_read_bytes = Counter(
            "helios_registry_front_read_bytes_total",
            "Bytes of objects read, but for files that are sent",
            ["level"],
            registry=r,
        )
        self.front_brought_bytes = Counter(
            "helios_registry_front_brought_bytes_total", "Bytes brought to the front store for readers", registry=r
        )
        self.front_evictions = Counter(
            "helios_registry_front_evictions_total", "Objects removed from the front store for others", registry=r
        )
        self.front_evicted_bytes = Counter(
            "helios_registry_front_evicted_bytes_total", "Bytes of the objects removed for others", registry=r
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
        self.quota_bytes = Gauge(
            "helios_registry_quota_bytes", "Bytes of quotas", ["quota", "bytes", "state"], registry=r
        )  # bytes: logical, stored; state: limit, used, reserved
        self.quota_refusals = Counter(
            "helios_registry_quota_refusals_total", "Publishes, uploads and downloads refused", ["quota"], registry=r
        )
        self.usage_rows = Counter(
            "helios_registry_usage_rows_total", "Rows of usage written", ["result"], registry=r
        )  # result: recorded, merged (too many in the hour, or while the database was away)
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
            "helios_mount_shadow_dropped_total", "Reads not compared: too many waited, or disks hang", registry=r
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
        self.passthrough_refused = Counter(
            "helios_mount_passthrough_refused_total",
            "Whole files opened that the kernel would not read itself",
            registry=r,
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


@dataclass(frozen=True, slots=True)
class WorkerState:
    """What is measured of one worker of the router; ``models`` is empty for one that gets no new requests."""

    url: str
    models: Sequence[str]
    up: bool
    requests: int
    tokens: int


class WorkersCollector(Collector):
    """Gauges of workers, read when they are asked for: they can't drift, and a worker that is gone leaves none."""

    def __init__(self, workers: Callable[[], Iterable[WorkerState]]) -> None:
        self._workers = workers

    def describe(self) -> Iterable[Metric]:
        return self._families()

    def collect(self) -> Iterable[Metric]:
        in_flight, tokens, up = families = self._families()
        for worker in self._workers():
            in_flight.add_metric([worker.url], worker.requests)
            tokens.add_metric([worker.url], worker.tokens)
            for model in worker.models:
                up.add_metric([worker.url, model], worker.up)
        return families

    def _families(self) -> tuple[GaugeMetricFamily, GaugeMetricFamily, GaugeMetricFamily]:
        return (
            GaugeMetricFamily("helios_router_in_flight", "Requests at a worker now", labels=["worker"]),
            GaugeMetricFamily("helios_router_in_flight_tokens", "Their tokens, estimated", labels=["worker"]),
            GaugeMetricFamily("helios_router_worker_up", "1 while a worker is healthy", labels=["worker", "model"]),
        )


class RouterMetrics(Metrics):
    def __init__(self, workers: Callable[[], Iterable[WorkerState]] = tuple) -> None:
        """``workers``: those to be measured."""
        super().__init__()
        r = self.registry
        r.register(WorkersCollector(workers))
        self.requests = Counts("helios_router_requests", "Requests answered", ["route", "model", "status"], r)
        self.first_byte = Times(
            "helios_router_first_byte_seconds", "Request to first byte of the answer", "model", LATENCY_S, r
        )
        self.duration = Times("helios_router_request_seconds", "Request to end of the answer", "model", LATENCY_S, r)
        self.retries = Counter("helios_router_retries_total", "Requests sent to another worker", ["reason"], registry=r)
        self.disconnects = Counter("helios_router_client_disconnects_total", "Clients gone before the end", registry=r)
        self.connections = Gauge("helios_router_client_connections", "Connections of clients", registry=r)
        self.turned_away = Counter(
            "helios_router_connections_turned_away_total", "Connections of clients beyond the limit", registry=r
        )
        self.cut = Counter(
            "helios_router_cut_answers_total", "Answers broken off after their first byte", ["reason"], registry=r
        )
        self.breaker_state = Gauge(
            "helios_router_breaker_state", "0 closed, 1 half open, 2 open", ["worker"], registry=r
        )
        self.breaker_openings = Counter(
            "helios_router_breaker_openings_total", "Times a worker's breaker opened", ["worker"], registry=r
        )
        self.ejections = Counter(
            "helios_router_ejections_total",
            "Workers ejected as worse than their peers",
            ["worker", "reason"],
            registry=r,
        )  # reason: slow, failing
        self.hung = Gauge("helios_router_worker_hung", "1 while a worker generates nothing", ["worker"], registry=r)
        self.token_checks = Counter(
            "helios_router_token_checks_total", "Checks that ask a worker for a token", ["worker", "result"], registry=r
        )  # result: ok, failed, busy (nothing, but others' tokens came), unable
        self.failed_open = Counter(
            "helios_router_failed_open_total",
            "Requests sent to a worker that should get none, as there was no better one",
            ["worker"],
            registry=r,
        )
        self.budget_exhausted = Counter(
            "helios_router_retry_budget_exhausted_total", "Retries that the budget did not allow", ["model"], registry=r
        )
        self.hedges = Counter(
            "helios_router_hedges_total", "Second attempts at late requests", ["model", "result"], registry=r
        )  # result: won, lost, failed (it had no answer), gone (neither had one)
        self.unhedged = Counter(
            "helios_router_unhedged_total", "Late requests without a second attempt", ["model", "reason"], registry=r
        )  # reason: busy, budget, nobody (there is no other worker)
        self.prefills = Counter(
            "helios_router_prefills_total", "Prompts for workers that take blocks from others", ["model", "result"],
            registry=r,
        )  # fmt: skip
        # result: remote (another worker computed it); of those computed where they are answered: short, no_worker, cold
        # (no pair of workers has exchanged blocks yet), busy (enough waits at each prefill worker); what about the
        # request forbids it: route, several_answers, several_prompts, whole_prompt, kept_state, malformed; what
        # happened at the other worker: not_sent, refused, no_blocks, too_long, broke, late; failed (too often)
        self.warm_pairs = Gauge(
            "helios_router_warm_pairs", "Pairs of workers that have exchanged blocks", registry=r
        )  # fmt: skip
        self.prefill_seconds = Histogram(
            "helios_router_prefill_seconds", "How long other workers took for prompts", ["model"], buckets=LATENCY_S,
            registry=r,
        )  # fmt: skip
        self.fallbacks = Counter(
            "helios_router_fallbacks_total",
            "Requests served by another model or endpoint",
            ["model", "to"],
            registry=r,
        )
        self.discovered = Gauge(
            "helios_router_discovered_workers", "Workers that a source knows", ["source"], registry=r
        )  # source: static, file, kubernetes, registration
        self.discovery_problems = Gauge(
            "helios_router_discovery_problems", "What a source says that can't be used", ["source"], registry=r
        )
        self.discovery_failures = Counter(
            "helios_router_discovery_failures_total", "Looks at a source that failed", ["source", "reason"], registry=r
        )  # reason: broken, unreadable, list, connection, watch, silent, gone; expired of registrations
        self.discovery_fresh = Gauge(
            "helios_router_discovery_fresh_timestamp_seconds", "When a source was last heard of", ["source"], registry=r
        )
        self.resolutions = Counter(
            "helios_router_resolutions_total", "Names resolved at the registry", ["result"], registry=r
        )  # result: fresh, stale, asked, unknown, retired, unavailable
        self.models_awaited = Gauge(
            "helios_router_models_awaited", "Models asked for that no worker serves yet", registry=r
        )
        self.kv_events = Counter(
            "helios_router_kv_events_total", "KV events of workers taken in", ["type"], registry=r
        )  # one of stored, removed, cleared
        self.kv_skipped = Counter(
            "helios_router_kv_skipped_total", "KV events, or parts of them, not taken in", ["reason"], registry=r
        )  # reason: unknown, malformed, unsupported, group, opaque, orphan
        self.kv_gaps = Counter("helios_router_kv_gaps_total", "Times that messages with KV events missed", registry=r)
        self.kv_replays = Counter(
            "helios_router_kv_replays_total", "Replays of KV events asked for", ["result"], registry=r
        )  # result: done, partial, failed
        self.kv_forgotten = Counter(
            "helios_router_kv_forgotten_blocks_total", "Blocks forgotten for the index's bounds", registry=r
        )
        self.kv_blocks = Gauge("helios_router_kv_blocks", "Blocks of workers in the index", registry=r)
        self.kv_feeds = Gauge("helios_router_kv_feeds_in_step", "Publishers of KV events followed", registry=r)
        self.kv_lag = Gauge(
            "helios_router_kv_lag_seconds", "From the publication of KV events to the index, the worst", registry=r
        )
        self.kv_lookups = Counter(
            "helios_router_kv_lookups_total", "Questions of requests to the index", ["result"], registry=r
        )  # result: known, unknown, late, unasked
        self.spans = Counter("helios_router_spans_total", "Spans of requests", ["result"], registry=r)
        # result: sent; dropped, because too many waited; failed, because the collector did not take them
        self.refused = Counter(
            "helios_router_refused_total", "Requests refused by admission", ["reason"], registry=r
        )  # reason: the error's code
        self.queued = Gauge("helios_router_queued", "Requests that wait, by model", ["model"], registry=r)
        self.queued_bytes = Gauge("helios_router_queued_bytes", "Bytes of the bodies that wait", registry=r)
        self.queue_wait = Histogram(
            "helios_router_queue_seconds",
            "How long requests waited that had to",
            ["model", "outcome"],
            buckets=LATENCY_S,
            registry=r,
        )  # outcome: served, refused, gone
        self.tokens = Counts(
            "helios_router_tokens", "Tokens of requests with a limit in tokens", ["model", "source"], r
        )  # source: reported (by the worker), estimated
        self.wakes = Counter("helios_router_wakes_total", "Models woken", ["model", "result"], registry=r)
        # result: up, failed
        self.batches = Counter("helios_router_batches_total", "Batches that are over", ["status"], registry=r)
        self.batch_lines = Counter(
            "helios_router_batch_lines_total", "Requests of batches that are done", ["result"], registry=r
        )  # result: completed, failed, expired, cancelled; again: asked once more
        self.batch_lines_in_flight = Gauge(
            "helios_router_batch_lines_in_flight", "Requests of batches under way", registry=r
        )
        self.batches_running = Gauge("helios_router_batches_running", "Batches that processes own", registry=r)
        self.batch_claims = Counter(
            "helios_router_batch_claims_total", "Batches that a process took on", ["from"], registry=r
        )  # from: nobody, lapsed (an owner that showed no sign of life)
        self.batch_losses = Counter(
            "helios_router_batch_losses_total", "Batches that their owner had to leave", ["reason"], registry=r
        )  # reason: taken (by another), store (it could not be reached)
        self.picks = Counter(
            "helios_router_picks_total", "Requests of gateways that were answered", ["result"], registry=r
        )
        # result: picked, models (their list, answered here), gone, or the error's code
        self.pick_seconds = Histogram(
            "helios_router_pick_seconds", "From a gateway's request to where it goes", buckets=LATENCY_S, registry=r
        )
        self.picker_streams = Gauge("helios_router_picker_streams", "Requests that gateways ask about", registry=r)
        self.picks_elsewhere = Counter(
            "helios_router_picks_elsewhere_total", "Requests that a gateway sent to another choice than the first",
            registry=r,
        )  # fmt: skip
        self.picks_outlived = Counter(
            "helios_router_picks_outlived_total",
            "Requests of gateways that counted for router.picker.hold_s",
            registry=r,
        )
        self.shared_limits_up = Gauge(
            "helios_router_shared_limits_up", "1 while the store of shared limits can be asked", registry=r
        )


class SignalsMetrics:
    """What the operator hears of routers, and is asked of it; on a registry that it shares."""

    def __init__(self, registry: CollectorRegistry) -> None:
        r = registry
        self.replicas = Gauge("helios_operator_routers", "Replicas of the router that there are", registry=r)
        self.replicas_unheard = Gauge(
            "helios_operator_routers_unheard", "Replicas of the router of which nothing is known now", registry=r
        )
        self.look_failures = Counter(
            "helios_operator_router_look_failures_total", "Looks at a router's demand that failed", registry=r
        )
        self.watch_failures = Counter(
            "helios_operator_router_watch_failures_total", "Streams of a router's demand that ended", registry=r
        )
        self.scaler_calls = Counter(
            "helios_operator_scaler_calls_total", "Calls of KEDA", ["method", "status"], registry=r
        )
        self.scaler_streams = Gauge("helios_operator_scaler_streams", "Streams of KEDA", registry=r)
        self.external_requests = Counter(
            "helios_operator_external_metrics_total", "Metrics asked for by autoscalers", ["metric", "status"],
            registry=r,
        )  # fmt: skip


def rss_bytes() -> float:
    """RssAnon + RssShmem of this process in bytes (mapped files are not counted)."""
    total = 0
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(("RssAnon:", "RssShmem:")):
                total += int(line.split()[1]) * 1024
    return float(total)


class WorkerMetrics(Metrics):
    """`helios worker`; model, revision and role are added to all of them, as to those of vLLM."""

    def __init__(self) -> None:
        super().__init__()
        r = self.registry
        self.ready = Gauge("helios_worker_ready", "1 while it takes requests", registry=r)
        self.live = Gauge("helios_worker_live", "0 once vLLM shows no sign of life", registry=r)
        self.draining = Gauge("helios_worker_draining", "1 from when it has to end", registry=r)
        self.restarts = Counter("helios_worker_restarts_total", "Starts of vLLM after the first", registry=r)
        self.start_seconds = Gauge(
            "helios_worker_start_seconds",
            "What the last start of vLLM that is known took, warm-up included",
            registry=r,
        )
        self.phase_seconds = Gauge(
            "helios_worker_start_phase_seconds", "...and its phases, by vLLM's log", ["phase"], registry=r
        )
        self.warm_ups = Counter(
            "helios_worker_warm_ups_total", "Warm-up requests", ["result"], registry=r
        )  # result: answered, failed
        self.registrations = Gauge(
            "helios_worker_registrations", "Routers that have its registration, or may", registry=r
        )
        self.registration_failures = Counter(
            "helios_worker_registration_failures_total", "Routers could not be told of it", registry=r
        )
        self.engine_metrics = Gauge(
            "helios_worker_engine_metrics", "1 where vLLM's own metrics are in this answer", registry=r
        )
        self.scrape_seconds = Histogram(
            "helios_worker_scrape_seconds", "Time until vLLM gave its metrics", buckets=LATENCY_S, registry=r
        )
        self.scrape_failures = Counter(
            "helios_worker_scrape_failures_total", "vLLM did not give its metrics", registry=r
        )


class CsiMetrics(Metrics):
    """The CSI driver."""

    def __init__(self) -> None:
        super().__init__()
        r = self.registry
        self.calls = Counter("helios_csi_calls_total", "Calls answered", ["call", "status"], registry=r)
        # status: gRPC's name of it, OK included
        self.call_seconds = Histogram(
            "helios_csi_call_seconds", "From a call's coming to its answer", ["call"], buckets=LATENCY_S, registry=r
        )
        self.under_way = Gauge("helios_csi_calls_under_way", "Calls that are worked on", registry=r)
        self.stuck = Gauge(
            "helios_csi_stuck_calls", "Calls to filesystems that have not come back in time, and not since", registry=r
        )
        self.live = Gauge("helios_csi_live", "0 once only a restart would help", registry=r)
        self.ready = Gauge("helios_csi_ready", "1 from when it has recovered", registry=r)
        self.published = Gauge("helios_csi_published_volumes", "Places where volumes are published", registry=r)
        self.swept = Counter("helios_csi_swept_volumes_total", "Volumes deleted that no pod had any more", registry=r)
        self.rights = Counter(
            "helios_csi_rights_total", "Questions whether a pod may read a model", ["answer"], registry=r
        )  # answer: allowed, refused; remembered (it was allowed lately), away (allowed earlier, and the registry is
        # away), failed (it is away)
        self.tainted = Gauge(
            "helios_csi_startup_taint", "1 while the node's startup taint is to be removed", registry=r
        )
        self.node_labels = Gauge(
            "helios_csi_node_labels", "Labels that say which models the node's cache has", registry=r
        )
        self.node_label_failures = Counter(
            "helios_csi_node_label_failures_total", "Times that these labels could not be looked after", registry=r
        )


@dataclass(frozen=True, slots=True)
class RoleState:
    """Workers of one role of an InferenceService, as its status has them; ``forecast`` None: it is off."""

    namespace: str
    service: str
    role: str
    wanted: int
    ready: int
    forecast: int | None = None


class RolesCollector(Collector):
    """Gauges of services' workers, read when they are asked for: a service that is gone leaves none."""

    def __init__(self) -> None:
        self.states: Callable[[], Iterable[RoleState]] = tuple
        """Of all services that are known."""

    def describe(self) -> Iterable[Metric]:
        return (self._family(),)

    def collect(self) -> Iterable[Metric]:
        family = self._family()
        for one in self.states():
            for state, count in (("wanted", one.wanted), ("ready", one.ready), ("forecast", one.forecast)):
                if count is not None:
                    family.add_metric([one.namespace, one.service, one.role, state], count)
        return (family,)

    def _family(self) -> GaugeMetricFamily:
        # ``namespace`` and ``service`` are labels that Prometheus adds of its own.
        labels = ["inference_namespace", "inference_service", "role", "state"]  # state: wanted, ready, forecast
        return GaugeMetricFamily("helios_operator_replicas", "Workers of an InferenceService", labels=labels)


class OperatorMetrics(Metrics):
    """The operator."""

    def __init__(self) -> None:
        super().__init__()
        r = self.registry
        self.services = RolesCollector()
        r.register(self.services)
        self.leading = Gauge("helios_operator_leading", "1 while this process leads", registry=r)
        self.synced = Gauge("helios_operator_synced", "1 once every kind that is watched was listed", registry=r)
        self.objects = Gauge("helios_operator_cached_objects", "Objects in the caches", registry=r)
        self.queued = Gauge("helios_operator_queued", "Objects that wait for a turn, now or later", registry=r)
        self.turns = Counter(
            "helios_operator_turns_total", "Turns, by what became of them", ["kind", "result"], registry=r
        )
        # result: done; failed (an action was refused); broken (the reconciler itself failed)
        self.turn_seconds = Histogram(
            "helios_operator_turn_seconds",
            "From the begin of a turn to its end",
            ["kind"],
            buckets=LATENCY_S,
            registry=r,
        )
        self.failures = Counter(
            "helios_operator_failures_total", "Actions that could not be performed", ["kind", "reason"], registry=r
        )
        self.writes = Counter(
            "helios_operator_writes_total", "Writes to the API server", ["kind", "method", "result"], registry=r
        )  # result: done, failed (no answer), or the HTTP status
        self.repairs = Counter(
            "helios_operator_repairs_total", "Objects that somebody had changed, applied again", ["kind"], registry=r
        )
        self.watch_failures = Counter(
            "helios_operator_watch_failures_total", "Lists and watches that failed", ["kind", "reason"], registry=r
        )  # reason: gone, list, connection, silent, watch
        self.heard = Gauge(
            "helios_operator_heard_timestamp_seconds",
            "When the API server last said anything of a kind",
            ["kind"],
            registry=r,
        )


class _Rss:
    """``rss_bytes``, or what it was last while no descriptor is left to read it: the other figures say why then."""

    def __init__(self) -> None:
        self._last = 0.0

    def __call__(self) -> float:
        with contextlib.suppress(OSError):
            self._last = rss_bytes()
        return self._last
