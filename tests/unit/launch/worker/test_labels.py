"""Labels for every sample of an exposition, whatever the exposition has in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary, generate_latest
from prometheus_client.core import Exemplar, Metric
from prometheus_client.openmetrics.exposition import generate_latest as open_metrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open_metrics
from prometheus_client.parser import text_string_to_metric_families as parse

from helios.launch.worker.labels import Labels

OURS = {"model": "org/name", "revision": "c" * 40, "role": "decode"}
CAPTURED = Path(__file__).parents[3] / "golden" / "vllm" / "metrics-decode-nixl.txt"

values = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
names = st.sampled_from(["model", "role", "revision", "le_", "exported_model", "exported_exported_model", "x", "_y9"])
label_sets = st.dictionaries(names, values, max_size=5)
numbers = st.floats(allow_nan=False)


def expected(labels: dict[str, str], ours: dict[str, str]) -> dict[str, str]:
    """As Prometheus joins a target's labels with those of a sample."""
    out = dict(labels)
    for name in labels:
        if name in ours:
            new = name
            while new in out or new in ours:
                new = f"exported_{new}"
            out[new] = out.pop(name)
    return out | ours


def samples(text: str, parser=parse) -> list[tuple]:
    return [
        (one.name, dict(one.labels), one.value, one.timestamp, one.exemplar)
        for family in parser(text)
        for one in family.samples
    ]


@given(st.lists(st.tuples(label_sets, numbers, st.none() | st.integers(0, 2**40)), max_size=6), st.data())
def test_each_sample_has_its_own_labels_and_ours(rows, data):
    """Written by prometheus-client, rewritten, read by prometheus-client."""
    metric = Metric("vllm:something", "Help with\na line end, \\ and {braces}.", "gauge")
    for labels, value, _ in rows:
        metric.add_sample("vllm:something", labels, value)
    registry = CollectorRegistry()
    registry.register(type("One", (), {"collect": lambda self: [metric]})())
    text = generate_latest(registry)
    ours = data.draw(st.dictionaries(st.sampled_from(["model", "revision", "role"]), values.filter(bool)))
    found = samples(Labels(ours).add(text).decode())
    assert [(labels, value) for _, labels, value, _, _ in found] == [
        (expected(labels, ours), value) for labels, value, _ in rows
    ]


@given(label_sets, st.text("ab1,= ", min_size=1), st.floats(0, 1e9))
def test_the_labels_of_an_exemplar_are_let_alone(labels, trace, value):
    metric = Metric("a", "Help.", "counter")
    metric.add_sample("a_total", labels, value, exemplar=Exemplar({"model": trace[:8]}, 0.5))
    registry = CollectorRegistry()
    registry.register(type("One", (), {"collect": lambda self: [metric]})())
    text = open_metrics(registry)
    before, after = (samples(one.decode(), parse_open_metrics) for one in (text, Labels(OURS).add(text)))
    ((_, theirs, *rest),), ((_, both, *same),) = before, after
    assert both == expected(theirs, OURS)
    assert same == rest
    assert Labels(OURS).add(text).endswith(b"# EOF\n")


@pytest.mark.parametrize(
    ("line", "after"),
    [
        ("a 1", 'a{model="m"} 1'),
        ("a{} 1", 'a{model="m"} 1'),
        ("a\t1 1700000000000", 'a{model="m"} 1 1700000000000'),
        (' a { b = "c" , } +Inf', 'a{b="c",model="m"} +Inf'),
        ('a{b="}"} 1', 'a{b="}",model="m"} 1'),
        ('a{b="\\"}{,"} NaN', 'a{b="\\"}{,",model="m"} NaN'),
        ('a{b="\\\\"} 1', 'a{b="\\\\",model="m"} 1'),
        ('a_total 3 # {model="x"} 1 2', 'a_total{model="m"} 3 # {model="x"} 1 2'),
        ('a{model="x",exported_model="y"} 1', 'a{exported_exported_model="x",exported_model="y",model="m"} 1'),
        ('{"my.metric"} 1', '{"my.metric",model="m"} 1'),
        ('{"my.metric","my.label"="x",model="y"} 1', '{"my.metric","my.label"="x",exported_model="y",model="m"} 1'),
        ("vllm:a:b 1", 'vllm:a:b{model="m"} 1'),
        # no samples
        ("# HELP a model{x}", "# HELP a model{x}"),
        ("# TYPE a gauge", "# TYPE a gauge"),
        ("", ""),
        ("a", "a"),
        ("a{b} 1", "a{b} 1"),
        ('a{b="c 1', 'a{b="c 1'),
        ("<html>", "<html>"),
    ],
)
def test_lines(line, after):
    assert Labels({"model": "m", "revision": ""}).add(line.encode()).decode() == after


def test_all_types_of_the_client_pass_through():
    registry = CollectorRegistry()
    Counter("c", "C.", ["role"], registry=registry).labels("x").inc()
    Gauge("g", "G.", registry=registry).set(1)
    Histogram("h", "H.", registry=registry).observe(1)
    Summary("s", "S.", registry=registry).observe(1)
    text = generate_latest(registry).decode()
    after = Labels(OURS).add(text.encode()).decode()
    assert [line for line in after.splitlines() if line[0] == "#"] == [
        line for line in text.splitlines() if line[0] == "#"
    ]
    before = samples(text)
    assert samples(after) == [(name, expected(labels, OURS), *rest) for name, labels, *rest in before]


def test_what_vllm_really_says_keeps_every_sample():
    text = CAPTURED.read_text()
    before = samples(text)
    assert len(before) > 300
    found = samples(Labels(OURS).add(text.encode()).decode())
    assert found == [(name, {**labels, **OURS}, *rest) for name, labels, *rest in before]
