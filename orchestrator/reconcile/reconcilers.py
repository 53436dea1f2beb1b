"""The two reconcilers as the runtime calls them: what they see in the caches, and whose turn a change there is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from helios.errors import InvalidInput
from helios.kube.kinds import NODE, POD, Kind
from helios.names import RepoId
from helios.node_labels import PREFIX, cached_key
from orchestrator.actions import Key, Manifest, Outcome, Problem, Ref, View, ref_of
from orchestrator.api import parse
from orchestrator.api.model import ModelSpec
from orchestrator.reconcile import model, names, service
from orchestrator.reconcile.kinds import INFERENCE_POOL, INFERENCE_SERVICE, ISTIO, MODEL, SCALED_OBJECT
from orchestrator.reconcile.observed import (
    Capabilities,
    Facts,
    ModelObserved,
    ModelSeen,
    NodeSeen,
    Registry,
    Scaling,
    ServiceObserved,
    object_of,
    pod_seen,
)
from orchestrator.reconcile.site import Site

Maps = Mapping[Kind, Callable[[View, Manifest], Iterable[Key]]]
Spec = TypeVar("Spec")


class Models:
    """A ``Reconciler`` of Models."""

    kind = MODEL
    owns: Sequence[Kind] = model.OWNS

    def __init__(self, site: Site, registry: Registry, scaling: Scaling) -> None:
        self._site, self._registry, self._scaling, self._reader = site, registry, scaling, parse.Reader()
        self.maps: Maps = {INFERENCE_SERVICE: _models_of, NODE: _on_nodes}

    def observe(self, view: View, key: Key, now: float, problems: Sequence[Problem]) -> ModelObserved | None:
        found = view.get(MODEL, key.namespace, key.name)
        if found is None:
            return None
        its = object_of(_ref(MODEL, key, found), found)
        spec, wrong = _spec(found, self._reader.model_spec)
        users = [one for one in view.all(INFERENCE_SERVICE, key.namespace) if _model_name(one) == key.name]
        running = [one["commit"] for user in users for one in (user.get("status") or {}).get("revisions") or ()]
        answer, facts = None, {}
        nodes: tuple[NodeSeen, ...] = ()
        if spec is not None:
            source = spec.source
            revision, every_s = spec.revision.revision, float(spec.revision.check_seconds)
            answer = self._registry.answer(source.repo, revision, source.pull == "IfMissing", every_s)
            facts = self._facts(spec, {answer.commit if answer else None, self._reader.model_status(found).commit})
            nodes = tuple(map(_node, view.all(NODE)))
        return ModelObserved(
            its, spec, wrong, answer, facts, tuple(sorted(one["metadata"]["name"] for one in users)),
            frozenset(running), nodes, self._scaling.prefetch(key.namespace, key.name),
            _children(view, model.OWNS, its.ref.uid), problems, now,
        )  # fmt: skip

    def _facts(self, spec: ModelSpec, commits: Iterable[str | None]) -> dict[str, Facts]:
        found = {}
        for commit in {*commits, spec.revision.approved} - {None}:
            facts = self._registry.facts(spec.source.repo, commit or "")
            if facts is not None:
                found[commit or ""] = facts
        return found

    def reconcile(self, observed: ModelObserved) -> Outcome:
        return model.reconcile(observed, self._site)


class Services:
    """A ``Reconciler`` of InferenceServices."""

    kind = INFERENCE_SERVICE
    owns: Sequence[Kind] = service.OWNS

    def __init__(self, site: Site, scaling: Scaling) -> None:
        self._site, self._scaling, self._reader = site, scaling, parse.Reader()
        self.maps: Maps = {MODEL: _services_of, POD: _service_of}

    def observe(self, view: View, key: Key, now: float, problems: Sequence[Problem]) -> ServiceObserved | None:
        found = view.get(INFERENCE_SERVICE, key.namespace, key.name)
        if found is None:
            return None
        its = object_of(_ref(INFERENCE_SERVICE, key, found), found)
        spec, wrong = _spec(found, self._reader.service_spec)
        pods = [
            pod_seen(pod)
            for pod in view.all(POD, key.namespace)
            if (pod["metadata"].get("labels") or {}).get(names.SERVICE) == key.name
        ]
        capabilities = Capabilities(
            istio=all(map(view.served, ISTIO)),
            inference_pool=view.served(INFERENCE_POOL),
            keda=view.served(SCALED_OBJECT),
        )
        return ServiceObserved(
            its, spec, wrong, None if spec is None else _model(view, self._reader, key.namespace, spec.model.name),
            _children(view, service.OWNS, its.ref.uid), tuple(sorted(pods, key=lambda pod: pod.name)),
            self._scaling.wanted(key.namespace, key.name), self._scaling.health(key.namespace, key.name),
            self._scaling.state(key.namespace, key.name), capabilities, problems, now,
        )  # fmt: skip

    def reconcile(self, observed: ServiceObserved) -> Outcome:
        return service.reconcile(observed, self._site)


def _ref(kind: Kind, key: Key, manifest: Manifest) -> Ref:
    return Ref(kind, key.namespace, key.name, manifest["metadata"].get("uid", ""))


def _spec(manifest: Manifest, read: Callable[[Manifest], Spec]) -> tuple[Spec | None, str]:
    """The spec, or why there is none: what was written before a rule refused it, or by a newer version."""
    try:
        return read(manifest), ""
    except InvalidInput as error:
        return None, error.message


def _children(view: View, kinds: Iterable[Kind], uid: str) -> tuple[tuple[Ref, Manifest], ...]:
    return tuple((ref_of(kind, one), one) for kind in kinds if view.served(kind) for one in view.owned(kind, uid))


def _model(view: View, reader: parse.Reader, namespace: str, name: str) -> ModelSeen | None:
    found = view.get(MODEL, namespace, name)
    if found is None:
        return None
    spec, wrong = _spec(found, reader.model_spec)
    if spec is None:
        return ModelSeen(name, ModelSpec(source=model.NOWHERE), None, "Invalid", f"Model {name}: {wrong}")
    status = reader.model_status(found)
    ready = next((one for one in status.conditions if one.type == "Ready"), None)
    if ready is None:
        return ModelSeen(name, spec, status.commit, "Resolving", f"Model {name} is looked at")
    return ModelSeen(name, spec, status.commit, ready.reason, f"Model {name}: {ready.message}")


def _node(node: Manifest) -> NodeSeen:
    metadata, status = node["metadata"], node.get("status") or {}
    ready = any(one.get("type") == "Ready" and one.get("status") == "True" for one in status.get("conditions") or ())
    usable = ready and not (node.get("spec") or {}).get("unschedulable") and not metadata.get("deletionTimestamp")
    return NodeSeen(metadata["name"], metadata.get("labels") or {}, usable)


def _model_name(manifest: Mapping[str, Any]) -> str:
    return str(((manifest.get("spec") or {}).get("model") or {}).get("name", ""))


def _models_of(view: View, manifest: Manifest) -> Iterable[Key]:
    return [Key(manifest["metadata"]["namespace"], _model_name(manifest))]


def _services_of(view: View, manifest: Manifest) -> Iterable[Key]:
    metadata = manifest["metadata"]
    return [
        Key(metadata["namespace"], one["metadata"]["name"])
        for one in view.all(INFERENCE_SERVICE, metadata["namespace"])
        if _model_name(one) == metadata["name"]
    ]


def _service_of(view: View, manifest: Manifest) -> Iterable[Key]:
    name = (manifest["metadata"].get("labels") or {}).get(names.SERVICE)
    return [Key(manifest["metadata"]["namespace"], name)] if name else []


def _on_nodes(view: View, manifest: Manifest) -> Iterable[Key]:
    """A node has come, gone or got a label: that counts for Models that are to be on nodes, for people or for what is
    expected, and for those that it has."""
    labels: Mapping[str, str] = manifest["metadata"].get("labels") or {}
    has = {key for key in labels if key.startswith(PREFIX)}
    for one in view.all(MODEL):
        metadata = one["metadata"]
        asked = ((one.get("spec") or {}).get("prefetch") or {}).get("nodes")
        if asked or (has and _label(one) in has) or view.owned(POD, metadata.get("uid", "")):
            yield Key(metadata["namespace"], metadata["name"])


def _label(manifest: Manifest) -> str:
    """Of nodes that have the commit of a Model; empty: none counts yet."""
    repo, commit = manifest["spec"].get("source", {}).get("repo", ""), (manifest.get("status") or {}).get("commit")
    try:
        return cached_key(RepoId.parse(repo), commit) if commit else ""
    except InvalidInput:
        return ""
