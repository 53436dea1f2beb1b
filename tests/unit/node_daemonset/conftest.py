"""Sets of values for the chart, and what it is rendered to with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.chart import Chart

IMAGES = {"images": {"repository": "registry.example/helios"}}

Render = Callable[[dict[str, Any]], list[dict[str, Any]]]

VALUES: dict[str, dict[str, Any]] = {
    "nodes-alone": {**IMAGES, "registryUrls": ["http://registry.example:8470", "https://second.example"]},
    "one-of-everything": {
        **IMAGES,
        "registry": {"enabled": True, "replicas": 1, "home": {"persistent": True, "storageClass": "fast"}},
        "router": {"enabled": True, "replicas": 1, "antiAffinity": "preferred", "resolve": False},
        "networkPolicy": {"enabled": False},
        "priorityClass": {"create": False, "name": "system-node-critical"},
        "csi": {"nodeLabels": True},
    },
    "everything": {
        "images": {"repository": "registry.example/helios", "tag": "7", "keeperTag": "5", "pullSecrets": ["pull"]},
        "registryToken": {"secret": "node-token"},
        "logLevel": "debug",
        "node": {
            "root": "/mnt/nvme/helios/",
            "kubelet": "/var/lib/k0s/kubelet",
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        },
        "keeper": {"hostPID": True, "stallSeconds": 2.5},
        "worker": {
            "tiers": {"l1": {"path": "/nvme/models", "limitGiB": 800.5}, "l2": {"path": "/ssd/models", "minFree": 0.1}},
            "config": {"mount": {"pool_mib": 256, "shadow_percent": 1.5}, "registry": {"offline": True}},
        },
        "csi": {
            "authorise": "token",
            "audience": "models",
            "cluster": "east-1",
            "driver": "models.example.com",
            "startupTaint": "helios.dev/agent-not-ready",
            "nodeLabels": True,
        },
        "storageClasses": [
            {"name": "a", "model": "org/name", "revision": "v1", "format": "hub", "prefetch": "*.json"},
            {"name": "b", "model": "gpt2", "reclaimPolicy": "Retain"},
        ],
        "registry": {
            "enabled": True,
            "store": "/store",
            "storeClaim": "models",
            "database": "postgresql://helios@db:5432/helios?sslmode=require",
            "environmentSecret": "environment",
            "adminTokens": {"secret": "admins"},
            "nodeTokens": {"secret": "nodes"},
            "config": {
                "gc_every_s": 3600,
                "tenants": {"acme": {"owns": ["acme/*"], "namespaces": ["acme", "acme-*"]}},
                "quotas": [{"repo": "acme/*", "stored_gib": 500}],
            },
        },
        "router": {
            "enabled": True,
            "processes": 2,
            "workers": {"namespace": "models", "slices": "app=vllm,tier!=test", "pods": ""},
            "keys": {"secret": "keys"},
            "adminTokens": {"secret": "admins"},
            "demandTokens": {"secret": "demand-sums"},
            "registrars": {"secret": "registrars"},
            "config": {
                "policy": "prefix-index",
                "drain_s": 90,
                "discovery": {"hold": True, "kubernetes": {"silence_s": 80}},
                "admission": {"queue": {"per_worker": 64}, "shared": {"url": "redis://valkey:6379/0"}},
            },
        },
        "picker": {
            "enabled": True,
            "namespaces": ["models"],
            "tls": {"secret": "picker-tls"},
            "keys": {"secret": "keys"},
            "demandTokens": {"secret": "demand-sums"},
            "config": {"policy": "queue-depth", "picker": {"endpoints": 2}, "admission": {"hold": True}},
        },
        "operator": {
            "enabled": True,
            "replicas": 3,
            "namespace": "models",
            "writes": {"istio": True, "keda": True, "gateway": True},
            "config": {"workers": 16, "resync_s": 300, "signals": {"poll_s": 2}},
            "signals": {"token": {"secret": "demand"}},
            "scaler": {"enabled": True},
            "externalMetrics": {"enabled": True, "secret": "external", "caBundle": "QQ=="},
        },
        "networkPolicy": {"monitoring": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}},
        "monitoring": {"monitors": True, "rules": True, "dashboard": True, "labels": {"release": "prometheus"}},
    },
    "no-nodes": {
        **IMAGES,
        "node": {"enabled": False},
        "registry": {"enabled": True, "store": "s3://models/helios", "database": "postgresql://helios@db/helios"},
        "operator": {"enabled": True},
        "monitoring": {"monitors": True},
    },
}


@pytest.fixture(scope="session")
def chart() -> Iterator[Chart]:
    pytest.importorskip("helm_python", reason="helm-python-sdk has no wheel for this machine")
    chart = Chart()
    yield chart
    chart.close()


@pytest.fixture(params=VALUES)
def objects(request: pytest.FixtureRequest, chart: Chart) -> list[dict[str, Any]]:
    """What is rendered with each set of values."""
    return chart.objects(VALUES[request.param])


@pytest.fixture
def everything(chart: Chart) -> list[dict[str, Any]]:
    return chart.objects(VALUES["everything"])
