"""The policy in the configuration: what is taken, and that what is not known is said with what there is."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from helios.config import load
from helios.errors import UsageError
from router.scheduling.configured import FILTERS, PICKERS, POLICIES, SCORERS, Tools, build, parse_policy
from router.scheduling.request import Request
from router.workers import Workers, parse_worker

TOOLS = Tools(lambda: 0.0, random.Random(0), 1.0)


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"canary"}))
def test_every_policy_can_be_named(name: str) -> None:
    candidates = Workers([parse_worker("m=http://h:1"), parse_worker("m=http://h:2")], lambda: 0.0).candidates("m", ())
    for wanted in (name, {"name": name}):
        assert build(wanted, TOOLS).policy.choose(Request("m"), candidates) in candidates


def test_metrics_are_scraped_only_for_who_reads_them() -> None:
    assert [name for name in POLICIES if name != "canary" and build(name, TOOLS).reads_metrics] == [
        "lora-affinity",
        "queue-depth",
    ]
    assert build({"filters": ["unsaturated"], "picker": "random"}, TOOLS).reads_metrics


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("round-robbin", ["no policy 'round-robbin'", "Did you mean 'round-robin'", *POLICIES]),
        ({"name": 5}, ["no policy 5", "least-requests"]),
        ({}, ["empty", "prefix-affinity"]),
        ({"scorer": ["latency"]}, ["unknown key 'scorer'", "scorers", "picker"]),
        ({"scorers": ["latancy"]}, ["unknown scorer 'latancy'", *SCORERS]),
        ({"filters": ["latency"]}, ["unknown filter 'latency'", *FILTERS]),
        ({"picker": "best"}, ["unknown picker 'best'", *PICKERS]),
        ({"scorers": "latency"}, ["scorers must be a list"]),
        ({"scorers": [5]}, ["has no name"]),
        ({"scorers": [{"weight": 1}]}, ["has no name"]),
        ({"scorers": ["latency", {"name": "latency", "weight": 2}]}, ["'latency' twice"]),
        ({"scorers": [{"name": "latency", "weight": 0}]}, ["weight of the policy's 'latency'", "above 0"]),
        ({"scorers": [{"name": "latency", "weight": True}]}, ["above 0"]),
        ({"scorers": [{"name": "latency", "weight": "2"}]}, ["above 0"]),
        ({"scorers": [{"name": "latency", "tau": 2}]}, ["unknown parameter 'tau'", "none"]),
        ({"picker": {"name": "random", "weight": 2}}, ["unknown parameter 'weight'"]),
        ({"name": "prefix-affinity", "prefix_char": 5}, ["Did you mean 'prefix_chars'", "load_factor"]),
        ({"name": "prefix-affinity", "load_factor": 1.0}, ["load_factor"]),
        ({"name": "prefix-affinity", "prefix_chars": 0}, ["prefix_chars"]),
        ({"name": "prefix-affinity", "min_requests": "4"}, ["min_requests"]),
        ({"name": "session-affinity", "field": "usr"}, ["field"]),
        ({"name": "session-affinity", "header": "a b"}, ["'a b' is not the name of a header"]),
        ({"name": "round-robin", "scorers": ["latency"]}, ["takes no scorers"]),
        ({"name": "round-robin", "seed": 1}, ["unknown parameter 'seed'"]),
        ("canary", ["weights"]),
        ({"name": "canary", "weights": {"a": 0}}, ["needs weights"]),
        ({"name": "canary", "weights": {"a": -1}}, ["weights"]),
    ],
)
def test_what_is_wrong_is_said_with_what_there_is(wanted: Any, words: list[str]) -> None:
    with pytest.raises(UsageError) as wrong:
        build(wanted, TOOLS)
    assert all(word in str(wrong.value) for word in words), str(wrong.value)


def test_a_name_or_a_table_in_the_file_the_environment_and_on_the_command_line(tmp_path: Path) -> None:
    environ = {"HELIOS_HOME": str(tmp_path)}
    assert load(environ).router.policy == "prefix-cache"
    (tmp_path / "helios.toml").write_text("[router.policy]\nname = 'prefix-affinity'\nload_factor = 2.0\n")
    assert load(environ).router.policy == {"name": "prefix-affinity", "load_factor": 2.0}
    (tmp_path / "helios.toml").write_text(
        "[router]\npolicy = {scorers = [{name = 'latency', weight = 2}, 'least-requests'], picker = 'power-of-two'}\n"
    )
    table = load(environ).router.policy
    assert build(table, TOOLS).policy
    given = {**environ, "HELIOS_ROUTER__POLICY": '{"name": "canary", "weights": {"a": 1}}'}
    assert build(load(given).router.policy, TOOLS).policy
    assert load({**environ, "HELIOS_ROUTER__POLICY": "random"}).router.policy == "random"
    assert parse_policy("random") == "random"
    assert parse_policy('{"name": "random"}') == {"name": "random"}
    with pytest.raises(UsageError, match="not valid JSON"):
        parse_policy("{name}")
