"""A cluster in memory for pure reconcilers: it performs what they answer, and checks it as an API server would.

Beside it stand controllers in a few lines: Deployments get pods, which become ready; autoscalers hold their least.
What the runtime does with a real API server is tested with the runtime.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from helios.kube.kinds import AUTOSCALER, DEPLOYMENT, PERSISTENT_VOLUME, PERSISTENT_VOLUME_CLAIM, POD, Kind
from orchestrator.actions import (
    OWNER_LABEL,
    Apply,
    Delete,
    Emit,
    Key,
    Manifest,
    Outcome,
    PatchStatus,
    Problem,
    Ref,
    RemoveFinalizer,
    Scale,
    SetFinalizer,
)
from orchestrator.reconcile.kinds import INFERENCE_SERVICE, MODEL
from orchestrator.reconcile.observed import Answer, Facts, Health, Wanted

UNCHANGEABLE = (POD, PERSISTENT_VOLUME, PERSISTENT_VOLUME_CLAIM)
"""Kinds of whose spec next to nothing can be changed."""
Place = tuple[Kind, str, str]


class Cluster:
    """A ``View``, and what performs outcomes."""

    def __init__(self, *, without: Iterable[Kind] = ()) -> None:
        self.objects: dict[Place, Manifest] = {}
        self.events: list[Emit] = []
        self.without = frozenset(without)
        self.check: Callable[[Manifest], None] = lambda manifest: None
        self.dead: set[str] = set()
        """Commits whose workers never get ready."""
        self._version = 0
        self.writes = 0

    # --- View ---

    def get(self, kind: Kind, namespace: str, name: str) -> Manifest | None:
        return self.objects.get((kind, namespace, name))

    def all(self, kind: Kind, namespace: str | None = None) -> list[Manifest]:
        return [one for (k, ns, _), one in sorted(self.objects.items()) if k == kind and namespace in (None, ns)]

    def owned(self, kind: Kind, uid: str) -> Sequence[Manifest]:
        return [one for one in self.all(kind) if _owner(one) == uid]

    def served(self, kind: Kind) -> bool:
        return kind not in self.without

    # --- what people and other programs do ---

    def put(self, kind: Kind, manifest: Manifest) -> Manifest:
        metadata = manifest["metadata"]
        place = (kind, metadata.get("namespace", ""), metadata["name"])
        before = self.objects.get(place, {"metadata": {}})
        self._version += 1
        stamped = {
            "uid": before["metadata"].get("uid") or f"uid-{self._version}", "resourceVersion": str(self._version),
            "generation": before["metadata"].get("generation", 0) + (before.get("spec") != manifest.get("spec")),
        }  # fmt: skip
        self.objects[place] = {**copy.deepcopy(manifest), "metadata": {**copy.deepcopy(metadata), **stamped}}
        return self.objects[place]

    def change(self, kind: Kind, name: str, change: Mapping[str, Any], namespace: str = "models") -> None:
        """Replace fields of the spec."""
        found = copy.deepcopy(self.objects[kind, namespace, name])
        found["spec"] = {**found["spec"], **change}
        self.put(kind, found)

    def delete(self, kind: Kind, name: str, namespace: str = "models") -> None:
        place = (kind, namespace, name)
        found = self.objects[place]
        if found["metadata"].get("finalizers"):
            found["metadata"]["deletionTimestamp"] = "2026-12-01T12:00:00Z"
            return
        del self.objects[place]
        for other, one in list(self.objects.items()):
            references = one["metadata"].get("ownerReferences") or ()
            if any(reference["uid"] == found["metadata"]["uid"] for reference in references):
                self.delete(other[0], other[2], other[1])

    def controllers(self, ready: bool = True) -> None:
        """Pods come and go as Deployments say; with ``ready`` they get ready."""
        for autoscaler in self.all(AUTOSCALER):
            spec, namespace = autoscaler["spec"], autoscaler["metadata"]["namespace"]
            target = self.objects.get((DEPLOYMENT, namespace, spec["scaleTargetRef"]["name"]))
            if target is not None and target["spec"]["replicas"]:
                within = max(spec["minReplicas"], min(spec["maxReplicas"], target["spec"]["replicas"]))
                target["spec"]["replicas"] = within
        owners = {one["metadata"]["uid"]: one for one in self.all(DEPLOYMENT)}
        for pod in self.all(POD):
            owner = owners.get(_owner(pod) or "")
            number = int(pod["metadata"]["name"].rpartition("-")[2]) if "-w-" in pod["metadata"]["name"] else -1
            if number >= 0 and (owner is None or number >= owner["spec"]["replicas"]):
                self.delete(POD, pod["metadata"]["name"], pod["metadata"]["namespace"])
        for owner in owners.values():
            self._pods(owner, ready)

    def _pods(self, owner: Manifest, ready: bool) -> None:
        metadata, template = owner["metadata"], owner["spec"]["template"]
        for number in range(owner["spec"]["replicas"]):
            name = f"{metadata['name']}-w-{number}"
            place = (POD, metadata["namespace"], name)
            if place not in self.objects:
                reference = {"uid": metadata["uid"], "controller": True}
                described = {"name": name, "namespace": metadata["namespace"], "labels": template["metadata"]["labels"]}
                self.put(POD, {"metadata": {**described, "ownerReferences": [reference]}, "spec": template["spec"]})
            if ready and template["metadata"]["labels"]["helios.dev/revision"] not in self.dead:
                self.objects[place]["status"] = {"conditions": [{"type": "Ready", "status": "True"}]}

    # --- what an outcome does ---

    def perform(self, outcome: Outcome, owner: Ref, most: int | None = None) -> int:
        """Its actions, or only the first; how many of them changed anything."""
        before = self.writes
        for action in list(outcome.actions)[:most]:
            getattr(self, f"_{type(action).__name__}")(action, owner)
        return self.writes - before

    def _Apply(self, action: Apply, owner: Ref) -> None:
        manifest, ref = action.manifest, action.ref
        assert _owner(manifest) == owner.uid, "nobody owns it"
        assert "status" not in manifest
        assert self.served(action.kind), f"{action.kind.kind} is not known here"
        assert (ref.namespace == "") == (not action.kind.namespaced)
        place = (action.kind, ref.namespace, ref.name)
        there = self.objects.get(place)
        assert there is None or _owner(there) == owner.uid, "it is somebody else's"
        new = copy.deepcopy(manifest)
        if action.kind == DEPLOYMENT:
            assert "replicas" not in manifest["spec"]
            new["spec"]["replicas"] = 1 if there is None else there["spec"]["replicas"]
            if there is not None:
                assert there["spec"]["selector"] == new["spec"]["selector"], "it can't be changed"
        if there is not None:
            if "status" in there:
                new["status"] = there["status"]
            new["metadata"] |= {key: there["metadata"][key] for key in ("uid", "resourceVersion", "generation")}
            if new == there:
                return
            if action.kind in UNCHANGEABLE:
                assert new["spec"] == there["spec"], "it can't be changed"
        self.check(manifest)
        self.put(action.kind, new)
        self.writes += 1

    def _Delete(self, action: Delete, owner: Ref) -> None:
        place = (action.ref.kind, action.ref.namespace, action.ref.name)
        there = self.objects.get(place)
        if there is not None:
            assert _owner(there) == owner.uid
            assert there["metadata"]["resourceVersion"] == action.resource_version
            self.delete(action.ref.kind, action.ref.name, action.ref.namespace)
            self.writes += 1

    def _PatchStatus(self, action: PatchStatus, owner: Ref) -> None:
        there = self.objects[action.ref.kind, action.ref.namespace, action.ref.name]
        if there.get("status") != action.status:
            there["status"] = copy.deepcopy(action.status)
            self.writes += 1

    def _Scale(self, action: Scale, owner: Ref) -> None:
        there = self.objects[action.ref.kind, action.ref.namespace, action.ref.name]
        if there["spec"]["replicas"] != action.replicas:
            there["spec"]["replicas"] = action.replicas
            self.writes += 1

    def _Emit(self, action: Emit, owner: Ref) -> None:
        self.events.append(action)

    def _SetFinalizer(self, action: SetFinalizer, owner: Ref) -> None:
        there = self.objects[action.ref.kind, action.ref.namespace, action.ref.name]
        there["metadata"].setdefault("finalizers", []).append(action.name)
        self.writes += 1

    def _RemoveFinalizer(self, action: RemoveFinalizer, owner: Ref) -> None:
        there = self.objects[action.ref.kind, action.ref.namespace, action.ref.name]
        there["metadata"]["finalizers"].remove(action.name)
        self.writes += 1
        if there["metadata"].get("deletionTimestamp"):
            self.delete(action.ref.kind, action.ref.name, action.ref.namespace)


def _owner(manifest: Manifest) -> str | None:
    metadata = manifest["metadata"]
    controllers = [one["uid"] for one in metadata.get("ownerReferences") or () if one.get("controller")]
    return controllers[0] if controllers else (metadata.get("labels") or {}).get(OWNER_LABEL)


class Known:
    """A ``Registry`` and a ``Scaling`` that say what a test has put into them."""

    def __init__(self) -> None:
        self.answers: dict[tuple[str, str], Answer] = {}
        self.of_commits: dict[tuple[str, str], Facts] = {}
        self.by_role: dict[str, Wanted] = {}
        self.by_commit: dict[str, Health] = {}
        self.expected: int | None = 0

    def answer(self, repo: str, revision: str, pull: bool, every_s: float) -> Answer | None:
        return self.answers.get((repo, revision))

    def facts(self, repo: str, commit: str) -> Facts | None:
        return self.of_commits.get((repo, commit))

    def wanted(self, namespace: str, service: str) -> Mapping[str, Wanted]:
        return self.by_role

    def health(self, namespace: str, service: str) -> Mapping[str, Health]:
        return self.by_commit

    def state(self, namespace: str, service: str) -> str:
        return "opaque"

    def prefetch(self, namespace: str, model: str) -> int | None:
        return self.expected


def turn(
    cluster: Cluster, reconciler: Any, name: str, now: float, most: int | None = None, problems: Sequence[Problem] = ()
) -> Outcome | None:
    """One look, and what follows from it; None where the object is gone."""
    key = Key("models", name)
    seen = reconciler.observe(cluster, key, now, problems)
    if seen is None:
        return None
    outcome: Outcome = reconciler.reconcile(seen)
    assert reconciler.reconcile(seen) == outcome
    cluster.perform(outcome, seen.object.ref, most)
    return outcome


def settle(cluster: Cluster, reconciler: Any, name: str, now: float, turns: int = 30) -> None:
    """Turns until nothing is written any more. Fails where that does not come."""
    for _ in range(turns):
        before = cluster.writes
        turn(cluster, reconciler, name, now)
        cluster.controllers()
        if cluster.writes == before and turn(cluster, reconciler, name, now) is not None and cluster.writes == before:
            return
        if cluster.get(reconciler.kind, "models", name) is None:
            return
    raise AssertionError("it never comes to rest")


def model(name: str = "llama", repo: str = "org/llama", **spec: Any) -> Manifest:
    return {
        "apiVersion": MODEL.api_version, "kind": "Model", "metadata": {"name": name, "namespace": "models"},
        "spec": {"source": {"repo": repo}, **spec},
    }  # fmt: skip


def inference_service(name: str = "chat", **spec: Any) -> Manifest:
    if not {"aggregated", "prefill"} & set(spec):
        spec["aggregated"] = {}
    return {
        "apiVersion": INFERENCE_SERVICE.api_version, "kind": "InferenceService",
        "metadata": {"name": name, "namespace": "models"}, "spec": {"model": {"name": "llama"}, **spec},
    }  # fmt: skip


def volumes(cluster: Cluster) -> list[str]:
    return [one["metadata"]["name"] for one in cluster.all(PERSISTENT_VOLUME)]
