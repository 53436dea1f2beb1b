"""What a vLLM counts, out of the metrics that a real one had."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from helios.launch.engine_sums import Sums

REAL = (Path(__file__).parents[2] / "golden" / "vllm" / "metrics-decode-nixl.txt").read_bytes()
NAMES = ("request_success_total", "num_requests_running", "num_requests_waiting")


def test_sums_are_those_of_prometheus_own_parser() -> None:
    expected: dict[str, float] = {}
    for family in text_string_to_metric_families(REAL.decode()):
        for sample in family.samples:
            name = sample.name.removeprefix("vllm:")
            if sample.name.startswith("vllm:") and name in NAMES:
                expected[name] = expected.get(name, 0.0) + sample.value
    assert expected.keys() == set(NAMES)
    assert Sums(*NAMES).of(REAL) == expected


def test_series_are_added_and_others_left() -> None:
    text = b'vllm:a{x="1"} 2\nvllm:a{x="2"} 3.5\nvllm:ab 7\n# vllm:a 9\nvllm:b 1\n'
    assert Sums("a", "c").of(text) == {"a": 5.5}


def test_a_sample_that_is_no_number_is_an_error() -> None:
    with pytest.raises(ValueError, match="many"):
        Sums("a").of(b"vllm:a many\n")
