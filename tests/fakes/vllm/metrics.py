"""The metrics of vLLM that a router reads, under vLLM's names and labels."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
SOURCES = ("local_compute", "local_cache_hit", "external_kv_transfer")


class Metrics:
    """One fake's metrics."""

    def __init__(self, model: str) -> None:
        self.registry = r = CollectorRegistry()
        names, self._values = ["engine", "model_name"], ("0", model)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, names, registry=r).labels(*self._values)

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, names, registry=r).labels(*self._values)

        def seconds(name: str, text: str) -> Histogram:
            return Histogram(name, text, names, buckets=SECONDS, registry=r).labels(*self._values)

        self.running = gauge("vllm:num_requests_running", "Number of requests in model execution batches.")
        self.waiting = gauge("vllm:num_requests_waiting", "Number of requests waiting to be processed.")
        self.kv_usage = gauge("vllm:kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.")
        self.cache_queries = counter("vllm:prefix_cache_queries", "Prefix cache queries, in tokens.")
        self.cache_hits = counter("vllm:prefix_cache_hits", "Prefix cache hits, in tokens.")
        self.external_queries = counter("vllm:external_prefix_cache_queries", "External prefix cache queries.")
        self.external_hits = counter("vllm:external_prefix_cache_hits", "External prefix cache hits.")
        self.preemptions = counter("vllm:num_preemptions", "Cumulative number of preemptions.")
        self.prompt_tokens = counter("vllm:prompt_tokens", "Number of prefill tokens processed.")
        self.generation_tokens = counter("vllm:generation_tokens", "Number of generation tokens processed.")
        self.ttft = seconds("vllm:time_to_first_token_seconds", "Time to first token.")
        self.itl = seconds("vllm:inter_token_latency_seconds", "Inter-token latency.")
        self.e2e = seconds("vllm:e2e_request_latency_seconds", "End to end latency of requests.")
        self._by_source = Counter(
            "vllm:prompt_tokens_by_source", "Prompt tokens by source.", [*names, "source"], registry=r
        )
        self._success = Counter("vllm:request_success", "Requests that ended.", [*names, "finished_reason"], registry=r)
        for source in SOURCES:
            self._by_source.labels(*self._values, source)
        for reason in ("stop", "length", "abort", "error"):
            self._success.labels(*self._values, reason)

    def ended(self, reason: str) -> None:
        """A request ended: ``stop``, ``length``, ``abort`` or ``error``."""
        self._success.labels(*self._values, reason).inc()

    def prompt(self, tokens: int, source: str) -> None:
        """A prompt was processed; ``source`` says where its KV came from."""
        self.prompt_tokens.inc(tokens)
        self._by_source.labels(*self._values, source).inc(tokens)
        self.cache_queries.inc(tokens)
        if source == "external_kv_transfer":
            self.external_queries.inc(tokens)
            self.external_hits.inc(tokens)

    def render(self) -> bytes:
        return generate_latest(self.registry)
