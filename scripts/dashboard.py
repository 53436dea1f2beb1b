"""The Grafana dashboard of the chart (scripts/chart.py writes it): rows of panels, each of them queries over metrics.

Grafana's JSON model of dashboards, schema version 39 (Grafana 11). A panel is 8 of 24 columns wide, 7 rows high.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

WIDTH: Final = 8
HEIGHT: Final = 7
DATASOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}
RATE: Final = "$__rate_interval"


@dataclass(frozen=True, slots=True)
class Panel:
    """A graph; ``queries`` are PromQL and its legend, ``unit`` is one of Grafana's."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    help: str


def _quantile(share: float, name: str, by: str, matchers: str = "") -> str:
    return f"histogram_quantile({share}, sum by (le, {by}) (rate({name}_bucket{{{matchers}}}[{RATE}])))"


def _rate(name: str, by: str, matchers: str = "") -> str:
    return f"sum by ({by}) (rate({name}{{{matchers}}}[{RATE}]))"


def _replicas(state: str) -> str:
    """Every process of the operator says the same."""
    by = "inference_namespace, inference_service, role"
    return f'max by ({by}) (helios_operator_replicas{{state="{state}"}})'


NODE: Final = 'node=~"$node"'
MODEL: Final = 'model=~"$model"'

ROWS: Final[dict[str, tuple[Panel, ...]]] = {
    "Nodes: models as files": (
        Panel(
            "Opens by where the bytes were", "ops", ((_rate("helios_mount_opens_total", "tier", NODE), "{{tier}}"),),
            "l1: all of them on the local disk; partial, remote: a source is asked.",
        ),
        Panel(
            "Bytes given to readers by the mount's process", "Bps",
            ((_rate("helios_mount_read_bytes_total", "tier", NODE), "{{tier}}"),),
            "What the kernel reads itself, of whole files most, is in no count.",
        ),
        Panel(
            "Bytes fetched", "Bps", ((_rate("helios_mount_fetched_bytes_total", "source", NODE), "{{source}}"),),
            "By the source that they came from.",
        ),
        Panel(
            "Requests of the kernel, p50 and p99", "s",
            ((_quantile(0.5, "helios_mount_request_seconds", "operation", NODE), "p50 {{operation}}"),
             (_quantile(0.99, "helios_mount_request_seconds", "operation", NODE), "p99 {{operation}}")),
            "From a request's coming to its answer.",
        ),
        Panel(
            "Oldest request without an answer", "s",
            ((f"max by (node) (helios_mount_oldest_request_seconds{{{NODE}}})", "{{node}}"),),
            "Reads that wait for a source are answered or fail within minutes.",
        ),
        Panel(
            "Errors", "ops",
            ((_rate("helios_mount_errors_total", "operation, errno", f'{NODE}, errno!="ENOENT"'),
              "{{operation}} {{errno}}"),
             (_rate("helios_mount_fetch_failures_total", "source, reason", NODE), "fetch {{source}} {{reason}}"),
             (_rate("helios_mount_verify_failures_total", "source", NODE), "wrong hash {{source}}")),
            "What readers were answered, fetches that failed over, hashes that were wrong.",
        ),
        Panel(
            "Tiers: used of the limit", "percentunit",
            ((f"sum by (node, tier) (helios_mount_cache_used_bytes{{{NODE}}}) / "
              f"sum by (node, tier) (helios_mount_cache_limit_bytes{{{NODE}}} > 0)", "{{node}} {{tier}}"),),
            "Full is as it should be; a tier without a limit is not shown.",
        ),
        Panel(
            "Evicted and moved", "Bps",
            ((_rate("helios_mount_cache_evicted_bytes_total", "tier, reason", NODE), "evicted {{tier}} {{reason}}"),
             (_rate("helios_mount_cache_moved_bytes_total", "move", NODE), "{{move}}")),
            "Much of it for room means that models used together don't fit.",
        ),
        Panel(
            "Memory of the worker", "bytes",
            ((f'max by (node) (helios_rss_anon_shmem_bytes{{job="helios-worker", {NODE}}})', "{{node}}"),),
            "RssAnon and RssShmem; bounded by mount.buffer_mib and mount.pool_mib.",
        ),
    ),
    "Registry": (
        Panel(
            "Answers", "reqps", ((_rate("helios_registry_requests_total", "route, status"), "{{route}} {{status}}"),),
            "By route and status.",
        ),
        Panel(
            "Time to the end of an answer, p99", "s",
            ((_quantile(0.99, "helios_registry_request_seconds", "route"), "{{route}}"),), "By route.",
        ),
        Panel(
            "Bytes", "Bps",
            (("sum(rate(helios_registry_sent_bytes_total[$__rate_interval]))", "sent"),
             ("sum(rate(helios_registry_fetched_bytes_total[$__rate_interval]))", "fetched from the upstream"),
             (_rate("helios_registry_ingested_bytes_total", "result"), "published {{result}}")),
            "Redirected downloads leave the store and are not in sent.",
        ),
        Panel(
            "Quotas: used of the limit", "percentunit",
            (('max by (quota, bytes) (helios_registry_quota_bytes{state="used"}) / '
              'max by (quota, bytes) (helios_registry_quota_bytes{state="limit"} > 0)', "{{quota}} {{bytes}}"),),
            "What is reserved by work under way comes on top.",
        ),
        Panel(
            "The fast disk in front of the store", "bytes",
            (("max(helios_registry_front_used_bytes)", "used"),
             ("max(helios_registry_front_waiting_bytes)", "not in the cloud yet")),
            "Where registry.front is set.",
        ),
        Panel(
            "Damage and refusals", "short",
            (("sum(increase(helios_registry_verify_failures_total[1h]))", "wrong hashes, last hour"),
             ("max(helios_registry_store_problems)", "directories that lack something"),
             ("sum by (quota) (increase(helios_registry_quota_refusals_total[1h]))",
              "refused by {{quota}}, last hour")),
            "All zero when all is well.",
        ),
    ),
    "Router": (
        Panel(
            "Requests", "reqps",
            ((_rate("helios_router_requests_total", "model, status", MODEL), "{{model}} {{status}}"),),
            "By model and status.",
        ),
        Panel(
            "Time to the first byte, p50 and p99", "s",
            ((_quantile(0.5, "helios_router_first_byte_seconds", "model", MODEL), "p50 {{model}}"),
             (_quantile(0.99, "helios_router_first_byte_seconds", "model", MODEL), "p99 {{model}}")),
            "From the request to the first byte of the answer, waiting included.",
        ),
        Panel(
            "Waiting requests", "short", ((f"sum by (model) (helios_router_queued{{{MODEL}}})", "{{model}}"),),
            "For a worker that has room, or for a model that wakes.",
        ),
        Panel(
            "Workers that are up", "short",
            ((f"sum by (model) (max by (model, worker) (helios_router_worker_up{{{MODEL}}}))", "{{model}}"),),
            "As any router sees them.",
        ),
        Panel(
            "Requests at workers", "short", (("sum by (worker) (helios_router_in_flight)", "{{worker}}"),),
            "Of all routers together.",
        ),
        Panel(
            "What fails", "ops",
            ((_rate("helios_router_retries_total", "reason"), "retried {{reason}}"),
             (_rate("helios_router_cut_answers_total", "reason"), "cut {{reason}}"),
             (_rate("helios_router_refused_total", "reason"), "refused {{reason}}"),
             (_rate("helios_router_breaker_openings_total", "worker"), "breaker {{worker}}")),
            "Retries, answers broken off, refusals by admission, breakers that opened.",
        ),
    ),
    "Operator": (
        Panel(
            "Workers wanted and ready", "short",
            ((_replicas("wanted"), "{{inference_service}} {{role}} wanted"),
             (_replicas("ready"), "{{inference_service}} {{role}} ready")),
            "By service and role, as its status says.",
        ),
        Panel(
            "What the forecast would have, and what was wanted", "short",
            ((_replicas("forecast"), "{{inference_service}} {{role}} forecast"),
             (_replicas("wanted"), "{{inference_service}} {{role}} wanted")),
            "With forecast.mode Observe the forecast raises nothing; lay the two over each other before it may.",
        ),
        Panel(
            "Held requests, and services that sleep", "short",
            ((f"sum by (model) (helios_router_queued{{{MODEL}}})", "held {{model}}"),
             (f'count(sum by (inference_namespace, inference_service) ({_replicas("wanted")}) == 0)', "asleep")),
            "A service that sleeps wakes when a request is held for it.",
        ),
        Panel(
            "How long held requests waited, p50 and p99", "s",
            ((_quantile(0.5, "helios_router_queue_seconds", "model", f'{MODEL}, outcome="served"'), "p50 {{model}}"),
             (_quantile(0.99, "helios_router_queue_seconds", "model", f'{MODEL}, outcome="served"'), "p99 {{model}}")),
            "Of those that were served; a cold start shows here.",
        ),
        Panel(
            "Routers that are not heard", "short",
            (("max by (namespace) (helios_operator_routers)", "there are"),
             ("max by (namespace) (helios_operator_routers_unheard)", "unheard"),
             (_rate("helios_operator_router_look_failures_total", "namespace"), "failed looks a second")),
            "While one is not heard nothing is taken away.",
        ),
        Panel(
            "Leading", "short", (("sum by (namespace, pod) (helios_operator_leading)", "{{pod}}"),),
            "One at a time.",
        ),
        Panel(
            "Turns", "ops", ((_rate("helios_operator_turns_total", "kind, result"), "{{kind}} {{result}}"),),
            "failed: an action was refused; broken: a defect of the operator's.",
        ),
        Panel(
            "Waiting turns, and the time that one takes, p99", "short",
            (("max by (pod) (helios_operator_queued)", "waiting {{pod}}"),
             (_quantile(0.99, "helios_operator_turn_seconds", "kind"), "seconds {{kind}}")),
            "Turns that are due later wait, too: the resync's.",
        ),
        Panel(
            "Writes to the API server", "ops",
            ((_rate("helios_operator_writes_total", "kind, method, result"), "{{kind}} {{method}} {{result}}"),
             (_rate("helios_operator_repairs_total", "kind"), "repaired {{kind}}"),
             (_rate("helios_operator_failures_total", "kind, reason"), "failed {{kind}} {{reason}}")),
            "None in steady state. Repaired: somebody else had changed it.",
        ),
    ),
    "vLLM": (
        Panel(
            "Ready", "short", ((f"sum by (model, role) (helios_worker_ready{{{MODEL}}})", "{{model}} {{role}}"),),
            "`helios worker`s that take requests.",
        ),
        Panel(
            "The last start", "s",
            ((f"max by (model, phase) (helios_worker_start_phase_seconds{{{MODEL}}})", "{{model}} {{phase}}"),),
            "By phase, as vLLM's log says.",
        ),
        Panel(
            "Restarts, last hour", "short",
            ((f"sum by (model) (increase(helios_worker_restarts_total{{{MODEL}}}[1h]))", "{{model}}"),),
            "Starts of vLLM after the first.",
        ),
    ),
}  # fmt: skip


def text() -> str:
    """The dashboard, as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    top = 0
    for name, row in ROWS.items():
        panels.append({"type": "row", "title": name, "gridPos": {"x": 0, "y": top, "w": 24, "h": 1}})
        top += 1
        for place, panel in enumerate(row):
            at = {"x": place % 3 * WIDTH, "y": top + place // 3 * HEIGHT, "w": WIDTH, "h": HEIGHT}
            panels.append(_graph(panel, at))
        top += -(-len(row) // 3) * HEIGHT
    for number, each in enumerate(panels, start=1):
        each["id"] = number
    variables = [
        {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"},
        _variable("node", "label_values(helios_mount_mode_info, node)"),
        _variable("model", "label_values(helios_router_worker_up, model)"),
    ]
    document = {
        "uid": "helios",
        "title": "Helios",
        "tags": ["helios"],
        "schemaVersion": 39,
        "editable": True,
        "time": {"from": "now-3h", "to": "now"},
        "refresh": "30s",
        "templating": {"list": variables},
        "panels": panels,
    }
    return json.dumps(document, indent=1) + "\n"


def _variable(name: str, query: str) -> dict[str, Any]:
    everything = {"text": "All", "value": "$__all"}
    return {
        "name": name, "type": "query", "datasource": DATASOURCE, "query": query, "refresh": 2,
        "multi": True, "includeAll": True, "allValue": ".*", "current": everything, "sort": 1,
    }  # fmt: skip


def _graph(panel: Panel, at: dict[str, int]) -> dict[str, Any]:
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.help,
        "datasource": DATASOURCE,
        "gridPos": at,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + number), "expr": expr, "legendFormat": legend, "datasource": DATASOURCE}
            for number, (expr, legend) in enumerate(panel.queries)
        ],
    }
