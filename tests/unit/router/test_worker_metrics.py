"""Reading a worker's own metrics, and the estimate of its times."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.latency import TAU_S, PeakEwma
from router.worker_metrics import parse
from tests.fakes.vllm.metrics import Metrics

TEXT = b"""\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="org/m"} 3.0
vllm:num_requests_running{engine="1",model_name="org/m"} 4.0
vllm:num_requests_waiting{engine="0",model_name="odd } \\"name"} 2.0
vllm:num_requests_waiting{engine="1",model_name="org/m"} 0.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 99.0
vllm:kv_cache_usage_perc{engine="0",model_name="org/m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="org/m"} 0.75
vllm:lora_requests_info{max_lora="2",running_lora_adapters="old",waiting_lora_adapters=""} 1.7e+09
vllm:lora_requests_info{max_lora="4",running_lora_adapters="a, b",waiting_lora_adapters="c"} 1.8e+09
vllm:lora_requests_info{max_lora="0",running_lora_adapters="",waiting_lora_adapters=""} 1.6e+09
"""


def test_engines_are_added_up_and_the_newest_adapters_count() -> None:
    metrics = parse(TEXT, 5.0, 7)
    assert metrics is not None
    assert (metrics.at, metrics.sent, metrics.running, metrics.waiting, metrics.kv_usage) == (5.0, 7, 7, 2, 0.5)
    assert (set(metrics.adapters_running), set(metrics.adapters_waiting)) == ({"a", "b"}, {"c"})
    assert metrics.adapters_max == 4


def test_the_fake_is_read_as_vllm() -> None:
    fake = Metrics("tiny")
    fake.running.set(2)
    fake.kv_usage.set(0.5)
    metrics = parse(fake.render(), 0.0, 0)
    assert metrics is not None
    assert (metrics.running, metrics.waiting, metrics.kv_usage, metrics.adapters_max) == (2, 0, 0.5, 0)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"<html>",
        TEXT.replace(b"vllm:", b"other:"),
        b"vllm:num_requests_running NaN\nvllm:num_requests_waiting 1",
        b"vllm:num_requests_running 1\n",
        b" vllm:num_requests_running 1\nvllm:num_requests_waiting x\n",
    ],
)
def test_what_is_no_reading_is_none(text: bytes) -> None:
    assert parse(text, 0.0, 0) is None


@given(st.binary(max_size=300), st.integers(0, len(TEXT)))
def test_any_bytes_are_read_without_an_error(noise: bytes, at: int) -> None:
    parse(TEXT[:at] + noise + TEXT[at:], 0.0, 0)


def test_bad_news_counts_at_once_and_good_news_by_and_by() -> None:
    times = PeakEwma()
    assert times.value(5.0) == 0
    times.observe(0.1, 5.0)
    times.observe(2.0, 6.0)
    assert times.value(6.0) == 2.0
    times.observe(0.1, 6.0)
    assert times.value(6.0) == 2.0  # no time has passed
    times.observe(0.1, 6.0 + TAU_S)
    assert times.value(6.0 + TAU_S) == pytest.approx(0.1 + 1.9 / math.e)
    assert times.value(6.0 + 30 * TAU_S) < 1e-6
