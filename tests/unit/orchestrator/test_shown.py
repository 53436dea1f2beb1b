"""What the operator's metrics show of services."""

from __future__ import annotations

from typing import Any

from prometheus_client import generate_latest

from helios.metrics import OperatorMetrics
from orchestrator.reconcile.kinds import INFERENCE_SERVICE
from orchestrator.shown import roles
from tests.support.reconciled import Cluster, inference_service


def lines(metrics: OperatorMetrics) -> list[str]:
    text = generate_latest(metrics.registry).decode()
    return [line for line in text.splitlines() if line.startswith("helios_operator_replicas{")]


def test_workers_of_services_are_shown_as_their_status_says_and_go_with_them() -> None:
    cluster, metrics = Cluster(), OperatorMetrics()
    metrics.services.states = lambda: roles(cluster)
    assert lines(metrics) == []
    status: dict[str, Any] = {
        "roles": {"prefill": {"desired": 2, "ready": 1, "replicas": 2}, "decode": {"desired": 3, "forecast": 5}}
    }
    cluster.put(INFERENCE_SERVICE, {**inference_service(), "status": status})
    whose = 'inference_namespace="models",inference_service="chat"'
    assert sorted(lines(metrics)) == [
        f'helios_operator_replicas{{{whose},role="decode",state="forecast"}} 5.0',
        f'helios_operator_replicas{{{whose},role="decode",state="ready"}} 0.0',
        f'helios_operator_replicas{{{whose},role="decode",state="wanted"}} 3.0',
        f'helios_operator_replicas{{{whose},role="prefill",state="ready"}} 1.0',
        f'helios_operator_replicas{{{whose},role="prefill",state="wanted"}} 2.0',
    ]
    cluster.objects.clear()
    assert lines(metrics) == []
