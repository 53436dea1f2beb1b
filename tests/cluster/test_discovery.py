"""Workers of a real Kubernetes API server: what docs/router-discovery.md promises, with the rights it asks for.

The fake API server of tests/unit has faults that no real one can be told to have; this says that it lists and watches
as a real one does.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop
import yaml
from kubernetes import client, config

from helios.config import KubernetesSettings
from helios.kube.following import PAGE
from helios.metrics import RouterMetrics
from router.discovery.kubernetes import KubernetesSource
from router.discovery.source import Teller
from tests.support.control_plane import ControlPlane

NAMESPACE = "models"
DOCS = Path(__file__).parents[2] / "docs" / "router-discovery.md"
LABELS = {"app": "vllm"}


class Cluster:
    """What the administrator, a kubelet and the controllers would write."""

    def __init__(self, plane: ControlPlane, root: Path) -> None:
        self.plane = plane
        api = config.new_client_from_config(str(plane.kubeconfig(root / "admin")))
        self.core, self.slices = client.CoreV1Api(api), client.DiscoveryV1Api(api)
        self._rbac = client.RbacAuthorizationV1Api(api)

    def rights(self, root: Path) -> Path:
        """A service account with the documented role; a kubeconfig with a token of it."""
        found = re.search(r"```yaml\n(apiVersion: rbac.*?)```", DOCS.read_text(), re.S)
        assert found is not None
        role = yaml.safe_load(found[1])
        name = role["metadata"]["name"]
        assert role["metadata"]["namespace"] == NAMESPACE
        self.core.create_namespace({"metadata": {"name": NAMESPACE}})
        self._rbac.create_namespaced_role(NAMESPACE, role)
        self.core.create_namespaced_service_account(NAMESPACE, {"metadata": {"name": name}})
        self._rbac.create_namespaced_role_binding(NAMESPACE, {
            "metadata": {"name": name},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name},
            "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": NAMESPACE}],
        })  # fmt: skip
        token = self.core.create_namespaced_service_account_token(name, NAMESPACE, {"spec": {}}).status.token
        return self.plane.kubeconfig(root / "router", token, NAMESPACE)

    def pod(self, name: str, ip: str, **annotations: str) -> dict[str, Any]:
        """A pod that runs and is ready; returns a reference to it."""
        said = {f"helios.dev/{key}": value for key, value in {"models": "org/m", **annotations}.items()}
        made = self.core.create_namespaced_pod(NAMESPACE, {
            "metadata": {"name": name, "labels": LABELS, "annotations": said},
            "spec": {"nodeName": "n", "containers": [
                {"name": "v", "image": "i", "ports": [{"name": "http", "containerPort": 8000}]}
            ]},
        })  # fmt: skip
        self.core.patch_namespaced_pod_status(name, NAMESPACE, {"status": {
            "phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "conditions": [{"type": "Ready", "status": "True"}]
        }})  # fmt: skip
        return {"kind": "Pod", "namespace": NAMESPACE, "name": name, "uid": made.metadata.uid}

    def slice(self, name: str, *endpoints: tuple[str, dict[str, Any], dict[str, bool]]) -> None:
        """Create or replace one."""
        body = {
            "metadata": {"name": name, "labels": LABELS}, "addressType": "IPv4",
            "ports": [{"name": "http", "port": 8000, "protocol": "TCP"}],
            "endpoints": [{"addresses": [ip], "targetRef": pod, "conditions": said} for ip, pod, said in endpoints],
        }  # fmt: skip
        known = self.slices.list_namespaced_endpoint_slice(NAMESPACE, field_selector=f"metadata.name={name}").items
        if known:
            self.slices.replace_namespaced_endpoint_slice(name, NAMESPACE, body)
        else:
            self.slices.create_namespaced_endpoint_slice(NAMESPACE, body)

    def empty(self) -> None:
        self.core.delete_collection_namespaced_pod(NAMESPACE, grace_period_seconds=0)
        self.slices.delete_collection_namespaced_endpoint_slice(NAMESPACE)


class Router:
    """The source with the router's rights, and what it told last."""

    def __init__(self, file: Path) -> None:
        self.file, self.metrics = file, RouterMetrics()
        self.told: dict[str, bool] | None = None
        """URL -> whether it is cordoned."""
        self.task: asyncio.Task[None]

    @asynccontextmanager
    async def follows(self, **options: Any) -> AsyncIterator[None]:
        settings = KubernetesSettings(
            kubeconfig=str(self.file), slices="app=vllm", pods="app=vllm", **{"silence_s": 75.0, **options}
        )
        source = KubernetesSource(
            settings, Teller("kubernetes", self._told, self.metrics), backoff_s=(0.05, 0.5), settle_s=0.01
        )
        self.task = asyncio.create_task(source.run())
        try:
            yield
        finally:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)

    def _told(self, _name: str, workers: Any) -> None:
        self.told = {one.url: one.cordoned for one in workers}

    async def sees(self, expected: dict[str, bool]) -> None:
        try:
            async with asyncio.timeout(60):
                while self.told != expected:
                    assert not self.task.done(), self.task
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"{self.told}, not {expected}") from None

    def failures(self, reason: str) -> float:
        labels = {"source": "kubernetes", "reason": reason}
        return self.metrics.registry.get_sample_value("helios_router_discovery_failures_total", labels) or 0


@pytest.fixture(scope="module")
def administered(cluster: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> tuple[Cluster, Path]:
    root = tmp_path_factory.mktemp("kubeconfigs")
    admin = Cluster(cluster, root)
    return admin, admin.rights(root)


@pytest.fixture
def site(administered: tuple[Cluster, Path]) -> tuple[Cluster, Router]:
    admin, file = administered
    admin.empty()
    return admin, Router(file)


Scenario = Callable[[Cluster, Router], Awaitable[None]]


def url(number: int) -> str:
    return f"http://10.1.{number // 250}.{number % 250 + 1}:8000"


def ip(number: int) -> str:
    return f"10.1.{number // 250}.{number % 250 + 1}"


UP = {"ready": True, "serving": True, "terminating": False}
UNREADY = {"ready": False, "serving": False, "terminating": False}
ENDING = {"ready": False, "serving": True, "terminating": True}


def scenario(run: Scenario) -> Any:
    def test(site: tuple[Cluster, Router]) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # as the router has
            runner.run(run(*site))  # type: ignore[arg-type]

    test.__name__ = run.__name__  # type: ignore[attr-defined]
    return test


@scenario
async def test_pods_and_slices_come_are_cordoned_and_go(admin: Cluster, router: Router) -> None:
    one, two = admin.pod("a", ip(1)), admin.pod("b", ip(2))
    admin.slice("s", (ip(1), one, UP), (ip(2), two, UP))
    async with router.follows():
        await router.sees({url(1): False, url(2): False})
        admin.slice("s", (ip(1), one, UNREADY), (ip(2), two, UP))
        await router.sees({url(1): True, url(2): False})
        admin.slice("s", (ip(1), one, ENDING), (ip(2), two, UP))
        await router.sees({url(2): False})
        admin.core.delete_namespaced_pod("b", NAMESPACE, grace_period_seconds=30)  # no kubelet: it stays, and ends
        await router.sees({})
    assert not any(router.failures(reason) for reason in ("list", "watch", "connection", "gone", "silent"))


@scenario
async def test_a_list_of_several_pages_is_followed_whole(admin: Cluster, router: Router) -> None:
    count = PAGE + 20
    pods = [await asyncio.to_thread(admin.pod, f"p{number}", ip(number)) for number in range(count)]
    for begin in range(0, count, 90):
        some = range(begin, min(begin + 90, count))
        admin.slice(f"s{begin}", *((ip(number), pods[number], UP) for number in some))
    async with router.follows():
        await router.sees({url(number): False for number in range(count)})


@scenario
async def test_an_api_server_that_says_nothing_is_noticed_and_nothing_is_missed(admin: Cluster, router: Router) -> None:
    one = admin.pod("a", ip(1))
    admin.slice("s", (ip(1), one, UP))
    async with router.follows(silence_s=3.0):
        await router.sees({url(1): False})
        with admin.plane.frozen():
            async with asyncio.timeout(60):
                while not router.failures("silent"):
                    await asyncio.sleep(0.05)
            assert router.told == {url(1): False}, "what was known counts"
        admin.slice("s", (ip(1), one, UNREADY))
        await router.sees({url(1): True})


@scenario
async def test_an_api_server_that_is_replaced(admin: Cluster, router: Router) -> None:
    one, two = admin.pod("a", ip(1)), admin.pod("b", ip(2))
    admin.slice("s", (ip(1), one, UP))
    async with router.follows():
        await router.sees({url(1): False})
        await asyncio.to_thread(admin.plane.stop_api_server)
        await asyncio.sleep(1)
        assert router.told == {url(1): False}, "what was known counts"
        await asyncio.to_thread(admin.plane.start_api_server)
        admin.slice("s", (ip(1), one, UP), (ip(2), two, UP))
        await router.sees({url(1): False, url(2): False})


@scenario
async def test_a_version_that_etcd_has_forgotten(admin: Cluster, router: Router) -> None:
    one, two = admin.pod("a", ip(1)), admin.pod("b", ip(2))
    admin.slice("s", (ip(1), one, UP), (ip(2), two, UP))
    async with router.follows():
        await router.sees({url(1): False, url(2): False})
        await asyncio.to_thread(admin.plane.stop_api_server)
        admin.plane.compact()
        await asyncio.to_thread(admin.plane.start_api_server)
        admin.slice("s", (ip(2), two, UP))
        await router.sees({url(2): False})


@scenario
async def test_rights_that_are_not_there_are_said(admin: Cluster, router: Router) -> None:
    router.file = admin.plane.kubeconfig(router.file.with_name("nobody"), "no-token", NAMESPACE)
    async with router.follows():
        async with asyncio.timeout(60):
            while not router.failures("list"):
                await asyncio.sleep(0.05)
    assert router.told is None


def test_the_documented_role_allows_nothing_else(administered: tuple[Cluster, Path]) -> None:
    _, file = administered
    core = client.CoreV1Api(config.new_client_from_config(str(file)))
    for refused in (
        lambda: core.list_namespaced_secret(NAMESPACE),
        lambda: core.list_pod_for_all_namespaces(),
        lambda: core.delete_namespaced_pod("a", NAMESPACE),
    ):
        with pytest.raises(client.ApiException) as caught:
            refused()
        assert caught.value.status == 403
