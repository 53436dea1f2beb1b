"""What Kubernetes' own controllers, scheduler and kubelets do, in a few lines, beside the fake API server.

Deployments get the pods that their replicas say, within quotas; pods get a node, start and get ready, unless a test has
trouble for their commit. The garbage collector is the fake's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from helios import worker_labels
from tests.fakes.kubernetes import ApiServer
from tests.fakes.kubernetes.errors import Refusal

Manifest = dict[str, Any]
READY: Manifest = {
    "phase": "Running",
    "conditions": [{"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": "True"}],
}
UNSCHEDULABLE: Manifest = {
    "phase": "Pending",
    "conditions": [{
        "type": "PodScheduled", "status": "False", "reason": "Unschedulable",
        "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
    }],
}  # fmt: skip
NO_IMAGE: Manifest = {
    "phase": "Pending",
    "conditions": [{"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": "False"}],
    "containerStatuses": [
        {"name": "worker", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "not found"}}}
    ],
}


class Controllers:
    """``run`` it beside the server. ``statuses``: of pods by their service's name, instead of ``READY``; ``changed`` is
    told of each Deployment's number of pods when it is another one."""

    def __init__(self, server: ApiServer) -> None:
        self._server = server
        self.statuses: dict[str, Manifest] = {}
        self.changed: Callable[[str, int], None] = lambda name, pods: None
        self._numbers: dict[str, int] = {}

    async def run(self) -> None:
        while True:
            changed = self._server.cluster.store.changed
            self.step()
            try:
                async with asyncio.timeout(0.2):
                    await changed.wait()
            except TimeoutError:
                pass
            await asyncio.sleep(0.02)

    def step(self) -> None:
        pods: dict[str, list[Manifest]] = {}
        for pod in self._server.all("pods"):
            for owner in pod["metadata"].get("ownerReferences") or ():
                if owner["kind"] == "Deployment":
                    pods.setdefault(owner["uid"], []).append(pod)
        for deployment in self._server.all("deployments"):
            self._scale(deployment, pods.get(deployment["metadata"]["uid"], []))

    def _scale(self, deployment: Manifest, pods: list[Manifest]) -> None:
        metadata, wanted = deployment["metadata"], deployment["spec"].get("replicas", 1)
        names = {pod["metadata"]["name"] for pod in pods}
        if self._numbers.get(metadata["name"]) != wanted:
            self._numbers[metadata["name"]] = wanted
            self.changed(metadata["name"], wanted)
        for number in range(wanted):
            name = f"{metadata['name']}-{number}"
            if name not in names and not self._made(deployment, name):
                return
        for pod in pods:
            name = pod["metadata"]["name"]
            if int(name.rpartition("-")[2]) >= wanted:
                self._server.delete("pods", name, metadata["namespace"])
            else:
                self._tell(pod)

    def _made(self, deployment: Manifest, name: str) -> bool:
        metadata, template = deployment["metadata"], deployment["spec"]["template"]
        reference = {
            "apiVersion": "apps/v1", "kind": "Deployment", "name": metadata["name"], "uid": metadata["uid"],
            "controller": True,
        }  # fmt: skip
        pod = {
            "apiVersion": "v1", "kind": "Pod", "spec": template["spec"],
            "metadata": {**template["metadata"], "name": name, "ownerReferences": [reference]},
        }  # fmt: skip
        cluster = self._server.cluster
        try:
            cluster.create(self._server.served("pods"), metadata["namespace"], pod, manager="kube", strict=True)
        except Refusal as refusal:
            failure = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": refusal.message}
            self._put("deployments", deployment, {"conditions": [failure]})
            return False
        self._put("deployments", deployment, {"conditions": []})
        return True

    def _tell(self, pod: Manifest) -> None:
        labels = pod["metadata"]["labels"]
        self._put("pods", pod, self.statuses.get(labels["helios.dev/service"], READY))

    def _put(self, plural: str, one: Manifest, status: Manifest) -> None:
        if (one.get("status") or {}) != status and (status != {"conditions": []} or one.get("status")):
            self._server.put(plural, {**one, "status": status})


def commit_of(pod: Manifest) -> str:
    return str(pod["metadata"]["labels"][worker_labels.REVISION])
