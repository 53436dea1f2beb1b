"""Alerts and the dashboard: queries that Prometheus parses, over metrics and labels that Helios has."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import promql_parser
import pytest
import yaml

from helios.metrics import (
    CsiMetrics,
    MountMetrics,
    OperatorMetrics,
    RegistryMetrics,
    RoleState,
    RouterMetrics,
    SignalsMetrics,
    WorkerMetrics,
    WorkerState,
)  # fmt: skip
from tests.support.chart import DAEMONSET, Chart
from tests.support.manifests import containers, pods
from tests.support.operator_schemas import SPECS, check
from tests.unit.node_daemonset.conftest import VALUES

CHART = DAEMONSET / "chart"
TARGET = {"job", "namespace", "pod", "container", "instance", "node", "service", "endpoint"}
"""Labels that Prometheus adds to what it scrapes, as the monitors have it."""
OF_WORKERS = {"model", "revision", "role"}
"""Labels that `helios worker` adds to its own metrics."""
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum"), "info": ("_info",), "gauge": ("",)}


def exported() -> dict[str, set[str]]:
    """Names of series with the labels that they may have."""
    found: dict[str, set[str]] = {}
    operator = OperatorMetrics()
    SignalsMetrics(operator.registry)
    operator.services.states = lambda: [RoleState("models", "chat", "decode", 3, 2, 4)]
    workers = [WorkerState(url="http://a", models=["m"], up=True, requests=0, tokens=0)]
    for metrics in (
        MountMetrics(), RegistryMetrics(), RouterMetrics(lambda: workers), WorkerMetrics(), CsiMetrics(),
        operator,
    ):  # fmt: skip
        more = OF_WORKERS if isinstance(metrics, WorkerMetrics) else set()
        declared = {id(each): each for each in vars(metrics).values() if hasattr(each, "_labelnames")}
        labels = {each._name: set(each._labelnames) for each in declared.values()}
        for family in metrics.registry.collect():
            its = labels.get(family.name, set()) | more
            its |= {label for sample in family.samples for label in sample.labels}
            for suffix in SUFFIXES[family.type]:
                found[family.name + suffix] = its | ({"le"} if suffix == "_bucket" else set())
    found["helios_mount_mode_info"] |= {"mode", "reason"}  # docs/control-api.md
    counts = {"helios_router_requests": {"route", "model", "status"}, "helios_router_tokens": {"model", "source"}}
    times = ("helios_router_first_byte_seconds", "helios_router_request_seconds")
    for name, its in counts.items():
        assert f"{name}_total" in found
        found[f"{name}_total"] |= its
    for name in times:
        for suffix in SUFFIXES["histogram"]:
            found[name + suffix] |= {"model", "le"}
    return found | {"up": set()}


def selectors(node: Any) -> Iterator[Any]:
    """Every selector in a parsed query."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
        return
    for name in ("expr", "lhs", "rhs", "vector_selector", "vs", "param"):
        inner = getattr(node, name, None)
        if inner is not None and not isinstance(inner, str | int | float):
            yield from selectors(inner)
    for each in getattr(node, "args", None) or []:
        yield from selectors(each)


def dashboard() -> dict[str, Any]:
    return json.loads((CHART / "dashboards" / "helios.json").read_text())


def queries() -> dict[str, str]:
    """Every query by what it is of."""
    found = {
        rule["alert"]: rule["expr"]
        for group in yaml.safe_load((CHART / "alerts.yaml").read_text())["groups"]
        for rule in group["rules"]
    }
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            found[f"{panel['title']} {target['refId']}"] = target["expr"].replace("$__rate_interval", "5m")
    return found


@pytest.mark.parametrize("of", queries())
def test_a_query_asks_for_metrics_and_labels_that_there_are(of: str):
    series = exported()
    found = list(selectors(promql_parser.parse(queries()[of])))
    assert found, "a query over nothing"
    for each in found:
        assert each.name in series, f"there is no metric {each.name}"
        asked = {matcher.name for matcher in each.matchers.matchers}
        assert asked <= series[each.name] | TARGET, f"{each.name} has no such label: {asked}"


def test_what_queries_group_by_are_labels_of_what_they_ask_for():
    series = exported()

    def check(node: Any, of: str) -> None:
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            grouped = set(node.modifier.labels)
            for each in selectors(node):
                assert grouped <= series[each.name] | TARGET, (of, each.name, grouped)
        for name in ("expr", "lhs", "rhs"):
            inner = getattr(node, name, None)
            if inner is not None:
                check(inner, of)
        for each in getattr(node, "args", None) or []:
            check(each, of)

    for of, query in queries().items():
        check(promql_parser.parse(query), of)


def test_what_alerts_say_uses_labels_that_they_have():
    series = exported()
    known = set().union(*series.values()) | TARGET
    for group in yaml.safe_load((CHART / "alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
            assert rule["labels"]["severity"] in ("warning", "critical")
            assert set(rule["annotations"]) == {"summary", "description"}
            text = rule["annotations"]["summary"]
            used = {word.split("}")[0].strip() for word in text.split("$labels.")[1:]}
            assert used <= known, (rule["alert"], used)


@pytest.mark.parametrize("values", VALUES)
def test_monitors_and_rules_are_ones_that_the_operator_takes(chart: Chart, values: str):
    monitoring = {"monitors": True, "rules": True, "labels": {"release": "prometheus"}}
    found = [each for each in chart.objects({**VALUES[values], "monitoring": monitoring}) if each["kind"] in SPECS]
    assert "PrometheusRule" in {each["kind"] for each in found}
    for each in found:
        check(each)
    plain = [
        e for e in yaml.safe_load_all((DAEMONSET / "manifests" / "monitoring.yaml").read_text()) if e["kind"] in SPECS
    ]
    assert len(plain) == 6
    for each in plain:
        check(each)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (["spec", "podMetricsEndpoints", 0, "relabeling"], []),
        (["spec", "podMetricsEndpoints", 0, "interval"], "15"),
        (["spec", "podMetricsEndpoints", 0, "port"], 8472),
        (["spec", "podMetricsEndpoints", 0, "relabelings", 0, "target_label"], "job"),
        (["spec", "podMetricsEndpoints", 0, "relabelings", 0, "action"], "set"),
        (["spec", "endpoints"], []),
        (["spec", "selector", "matchLabels"], {}),
        (["metadata", "labels", "release"], 1),
        (["apiVersion"], "monitoring.coreos.com/v1beta1"),
    ],
)
def test_what_the_operator_would_not_take_is_found(everything: list[dict[str, Any]], place: list[Any], value: Any):
    """Else the test above could not fail."""
    monitor = copy.deepcopy(next(each for each in everything if each["kind"] == "PodMonitor"))
    at: Any = monitor
    for part in place[:-1]:
        at = at[part]
    at[place[-1]] = value
    with pytest.raises(jsonschema_rs.ValidationError):
        check(monitor)


def test_monitors_scrape_ports_that_there_are(everything: list[dict[str, Any]]):
    ports = {
        name.rpartition("helios-")[2]: {port["name"] for c in containers(pod) for port in c.get("ports", [])}
        for name, pod in pods(everything)
    }
    monitors = [each for each in everything if each["kind"] in ("PodMonitor", "ServiceMonitor")]
    assert len(monitors) == 6
    for each in monitors:
        assert each["apiVersion"] == "monitoring.coreos.com/v1"
        assert each["metadata"]["labels"]["release"] == "prometheus"
        part = each["spec"]["selector"]["matchLabels"]["app.kubernetes.io/component"]
        key = "podMetricsEndpoints" if each["kind"] == "PodMonitor" else "endpoints"
        elsewhere = {"namespaceSelector"} if part == "picker" else set()
        assert set(each["spec"]) == {"selector", key} | elsewhere
        (endpoint,) = each["spec"][key]
        assert endpoint["port"] in ports[part]
        assert {"targetLabel": "job", "replacement": f"helios-{part}"} in endpoint["relabelings"]
        if each["kind"] == "ServiceMonitor":
            found = [
                service
                for service in everything
                if service["kind"] == "Service"
                and each["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
            ]
            assert [endpoint["port"] in [p["name"] for p in service["spec"]["ports"]] for service in found] == [True]


def test_rules_and_dashboard_are_in_the_chart_as_they_are_in_their_files(everything: list[dict[str, Any]]):
    (rule,) = [each for each in everything if each["kind"] == "PrometheusRule"]
    assert rule["spec"] == yaml.safe_load((CHART / "alerts.yaml").read_text())
    (board,) = [each for each in everything if each["metadata"]["name"] == "helios-dashboard"]
    assert json.loads(board["data"]["helios.json"]) == dashboard()
    assert len(board["data"]["helios.json"]) < 1 << 20, "a ConfigMap takes a mebibyte"


def test_panels_of_the_dashboard_lie_beside_one_another():
    taken: set[tuple[int, int]] = set()
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not taken & cells, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
