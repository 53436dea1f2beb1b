"""The whole operator with the official client, beside the fake API server, controllers in a few lines and a real
registry."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from helios.config import Config, OperatorSettings, RegistrySettings, SignalsSettings
from helios.metrics import OperatorMetrics
from helios.names import RepoId
from helios.publish import publish
from helios.registry_client import RegistryClient
from orchestrator.api.crds import definitions
from orchestrator.assembly import whole
from orchestrator.operator import Operator, client_of
from tests.fakes.kubernetes import ApiServer, kubeconfig
from tests.support.controllers import Controllers
from tests.support.operators import FAST

Manifest = dict[str, Any]
NAMESPACE = "models"
MADE = (
    "deployments", "services", "poddisruptionbudgets", "horizontalpodautoscalers", "networkpolicies", "pods",
    "persistentvolumeclaims", "persistentvolumes",
)  # fmt: skip
"""Kinds of what the operator makes, or others make of it."""


class Cluster:
    """An API server with our definitions, and controllers."""

    def __init__(self, root: Path, **options: Any) -> None:
        """``options``: of the API server."""
        self.server, self.file = ApiServer(**options), root / "kubeconfig"
        self.controllers = Controllers(self.server)

    async def open(self) -> None:
        await self.server.open()
        self.file.write_text(kubeconfig(self.server))
        self.define()

    def define(self) -> None:
        """Our definitions, and a namespace."""
        self.server.put("namespaces", {"metadata": {"name": NAMESPACE}})
        for definition in definitions().values():
            self.server.cluster.create(
                self.server.served("customresourcedefinitions"), "", definition, manager="admin", strict=True
            )

    def apply(self, kind: str, name: str, spec: Manifest) -> None:
        """What people do, through admission: create it, or replace its spec."""
        plural = f"{kind.lower()}s"
        served = self.server.served(plural)
        one = {"apiVersion": "helios.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec}
        if self.find(plural, name) is None:
            self.server.cluster.create(served, NAMESPACE, one, manager="kubectl", strict=True)
        else:
            self.server.cluster.replace(served, NAMESPACE, name, one, manager="kubectl", strict=True)

    def model(self, name: str = "llama", repo: str = "org/llama", **spec: Any) -> None:
        self.apply("Model", name, {"source": {"repo": repo}, **spec})

    def service(self, name: str = "chat", model: str = "llama", **spec: Any) -> None:
        its = spec if {"aggregated", "prefill"} & set(spec) else {"aggregated": {}, **spec}
        self.apply("InferenceService", name, {"model": {"name": model}, **its})

    def delete(self, plural: str, name: str) -> None:
        self.server.cluster.delete(self.server.served(plural), NAMESPACE, name, {})

    def find(self, plural: str, name: str) -> Manifest | None:
        return next((one for one in self.server.all(plural) if one["metadata"]["name"] == name), None)

    def condition(self, plural: str, name: str, kind: str = "Ready") -> tuple[str, str]:
        """Its status and reason."""
        status = (self.find(plural, name) or {}).get("status") or {}
        found = [one for one in status.get("conditions") or () if one["type"] == kind]
        return (found[0]["status"], found[0]["reason"]) if found else ("", "")

    def ready(self, name: str = "chat") -> tuple[str, str]:
        return self.condition("inferenceservices", name)

    def replicas(self, service: str = "chat") -> dict[str, int]:
        """By the first digits of the commit."""
        return {
            one["metadata"]["labels"]["helios.dev/revision"][:10]: one["spec"]["replicas"]
            for one in self.server.all("deployments")
            if one["metadata"]["labels"]["app.kubernetes.io/instance"] == service
        }

    def weights(self, name: str = "chat") -> dict[str, int]:
        status = (self.find("inferenceservices", name) or {}).get("status") or {}
        return {one["commit"]: one.get("weight", 0) for one in status.get("revisions") or ()}

    def left(self) -> list[str]:
        return [f"{plural}/{one['metadata']['name']}" for plural in MADE for one in self.server.all(plural)]


@asynccontextmanager
async def cluster(root: Path) -> AsyncIterator[Cluster]:
    found = Cluster(root)
    await found.open()
    running = asyncio.create_task(found.controllers.run())
    try:
        yield found
    finally:
        running.cancel()
        (ended,) = await asyncio.gather(running, return_exceptions=True)
        await found.server.close()
        assert isinstance(ended, asyncio.CancelledError), ended
        assert found.server.complaints == [], found.server.complaints


@asynccontextmanager
async def operator(
    here: Cluster, registry: str, signals: SignalsSettings | None = None, **options: Any
) -> AsyncIterator[Operator]:
    """One in this process."""
    said = {"look_s": 0.3, "lease_s": 8.0, "renew_s": 6.0, "retry_s": 0.3, **options}
    settings = OperatorSettings(kubeconfig=str(here.file), signals=signals or SignalsSettings(), **said)
    config, metrics = Config(operator=settings, registry=RegistrySettings(urls=[registry])), OperatorMetrics()
    with whole(config, metrics) as work:
        one = Operator(settings, work, lambda: client_of(settings), metrics, limits=FAST, backoff_s=(0.01, 0.1))
        running = asyncio.create_task(one.run())
        try:
            yield one
            assert not running.done(), running
        finally:
            running.cancel()
            (ended,) = await asyncio.gather(running, return_exceptions=True)
            assert isinstance(ended, asyncio.CancelledError), ended


def push(client: RegistryClient, root: Path, text: str, repo: str = "org/llama", branch: str = "main") -> str:
    """A commit on a branch."""
    directory = root / "pushed"
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(text)
    return publish(client, directory, RepoId.parse(repo), branch).commit


async def until(look: Callable[[], Any], wanted: Any = True, seconds: float = 120.0) -> None:
    """Wait until it is what is wanted."""
    found = None
    try:
        async with asyncio.timeout(seconds):
            while (found := look()) != wanted:
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"{found} instead of {wanted}") from None
