"""The driver's node at a real Kubernetes API server, with the rights that the chart gives: its taint and its labels.

The fake of tests/fakes/kubernetes_nodes.py has faults that no real one can be told to have; this says that patches and
answers are as a real one's.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from kubernetes import client, config

from csi.api_server import ApiServer
from csi.calls import Calls
from csi.node_labels import NodeLabels
from csi.untaint import remove
from helios.errors import Forbidden, NotFound
from helios.metrics import CsiMetrics
from helios.names import RepoId
from helios.node_labels import cached_key
from tests.support.control_plane import ControlPlane

MANIFEST = Path(__file__).parents[2] / "node-daemonset" / "manifests" / "csi-node.yaml"
NAMESPACE, ACCOUNT = "helios", "helios-csi-node"
TAINT, DRIVER = "helios.dev/agent-not-ready", "csi.helios.dev"
COMMIT = "52673c5d519832a792278d18ec54d7b67782710e"
LABELS = {"kubernetes.io/hostname": "n", "helios.dev/pool": "gpu"}


@pytest.fixture
def core(cluster: ControlPlane, tmp_path: Path) -> Iterator[client.CoreV1Api]:
    """The administrator; there are a node with our taint and another one, and its CSINode without any driver."""
    api = config.new_client_from_config(str(cluster.kubeconfig(tmp_path / "admin")))
    core, storage = client.CoreV1Api(api), client.StorageV1Api(api)
    taints = [{"key": "another", "effect": "NoSchedule"}, {"key": TAINT, "effect": "NoExecute"}]
    core.create_node({"metadata": {"name": "n", "labels": LABELS}, "spec": {"taints": taints}})
    # The answer has null for an empty list, which the client's models refuse.
    none: dict[str, Any] = {"metadata": {"name": "n"}, "spec": {"drivers": []}}
    storage.create_csi_node(none, _preload_content=False)
    yield core
    core.delete_node("n")
    storage.delete_csi_node("n", _preload_content=False)


@pytest.fixture
def nodes(
    cluster: ControlPlane, core: client.CoreV1Api, tmp_path: Path, wait_for: Callable[..., None]
) -> Iterator[ApiServer]:
    """As the driver's pod has it: a token of its service account, with the ClusterRole of the manifests."""
    parts = {each["kind"]: each for each in yaml.safe_load_all(MANIFEST.read_text()) if each}
    rbac = client.RbacAuthorizationV1Api(core.api_client)
    once(core.create_namespace, {"metadata": {"name": NAMESPACE}})
    once(rbac.create_cluster_role, parts["ClusterRole"])
    once(rbac.create_cluster_role_binding, parts["ClusterRoleBinding"])
    once(core.create_namespaced_service_account, NAMESPACE, parts["ServiceAccount"])
    token = core.create_namespaced_service_account_token(ACCOUNT, NAMESPACE, {"spec": {}}).status.token
    account = tmp_path / "serviceaccount"
    account.mkdir()
    (account / "token").write_text(token)
    shutil.copy(cluster.root / "certs" / "apiserver.crt", account / "ca.crt")
    at = urlsplit(cluster.url)
    environ = {"KUBERNETES_SERVICE_HOST": str(at.hostname), "KUBERNETES_SERVICE_PORT": str(at.port)}
    with closing(ApiServer(account, environ)) as found:
        wait_for(lambda: may(found), 20, "the rights being known to the API server")
        yield found


def may(nodes: ApiServer) -> bool:
    try:
        return bool(nodes.labels("n"))
    except Forbidden:
        return False


def once(make: Callable[..., Any], *what: Any) -> None:
    """Make an object unless an earlier test of this module has."""
    try:
        make(*what)
    except client.ApiException as error:
        if error.status != 409:
            raise


def test_the_taint_goes_when_the_kubelet_knows_the_driver(core: client.CoreV1Api, nodes: ApiServer) -> None:
    storage, pauses = client.StorageV1Api(core.api_client), []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        body = {"spec": {"drivers": [{"name": DRIVER, "nodeID": "n", "topologyKeys": []}]}}
        await asyncio.to_thread(storage.patch_csi_node, "n", body)

    before = {each.key for each in core.read_node("n").spec.taints}
    assert asyncio.run(remove(nodes, Calls(), "n", DRIVER, TAINT, sleep=sleep))
    assert len(pauses) == 1
    assert {each.key for each in core.read_node("n").spec.taints} == before - {TAINT}


def test_labels_come_and_go_and_others_stay(core: client.CoreV1Api, nodes: ApiServer) -> None:
    models: list[dict[str, Any]] = [{"repo": "models/org/name", "commit": COMMIT, "weights": "whole", "idle_s": 1.0}]

    class Mount:
        def call(self, method: str, path: str, *, timeout_s: float) -> object:
            return {"models": models}

    labels = NodeLabels(Mount(), nodes, Calls(), "n", CsiMetrics())
    asyncio.run(labels.step())
    key = cached_key(RepoId.parse("org/name"), COMMIT)
    assert core.read_node("n").metadata.labels == {**LABELS, key: "whole"}
    core.patch_node("n", {"metadata": {"labels": {"zone": "a"}}})
    models.clear()
    asyncio.run(labels.step())
    assert core.read_node("n").metadata.labels == {**LABELS, "zone": "a"}


def test_what_the_role_does_not_give_is_refused(
    core: client.CoreV1Api, nodes: ApiServer, wait_for: Callable[..., None]
) -> None:
    with pytest.raises(NotFound):
        nodes.labels("another")
    client.RbacAuthorizationV1Api(core.api_client).delete_cluster_role_binding(ACCOUNT)
    wait_for(lambda: not may(nodes), 20, "the rights being gone")
    with pytest.raises(Forbidden, match="403"):
        nodes.set_labels("n", {cached_key(RepoId.parse("org/name"), COMMIT): "whole"})
