"""A Kubernetes API server that is driven by the real client over HTTP, checks what it is told, and fails when told to.

``ApiServer`` (server.py) is HTTP: lists in pages at one version, watches with bookmarks and 410, patches, subresources.
``Cluster`` (cluster.py) is what happens to objects: admission by schemas, rules and quotas, versions and generations,
managers of fields, finalizers, garbage. What a real API server would refuse without an answer that tests look at is
kept in ``complaints``. The same scenarios run against a real one (tests/cluster).
"""

from tests.fakes.kubernetes.faults import Call, Fault
from tests.fakes.kubernetes.samples import endpoint, endpoint_slice, kubeconfig, pod, service
from tests.fakes.kubernetes.server import ApiServer
from tests.fakes.kubernetes.watching import line, selector

__all__ = [
    "ApiServer", "Call", "Fault", "endpoint", "endpoint_slice", "kubeconfig", "line", "pod", "selector", "service",
]  # fmt: skip
