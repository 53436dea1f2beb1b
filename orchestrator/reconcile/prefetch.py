"""Models on nodes before a pod needs them: which nodes, and the pods that bring and keep them there.

A pod that does nothing has the model's volume with ``prefetch``: the CSI driver fetches all of it, keeps it while the
pod is there (docs/csi.md), and labels the node when it has it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Final

import msgspec

from helios.kube.kinds import POD
from helios.names import RepoId
from helios.node_labels import WHOLE, cached_key
from orchestrator.actions import Apply, Delete, Manifest, Ref
from orchestrator.api.common import FreeForm
from orchestrator.api.model import Prefetch
from orchestrator.reconcile import names
from orchestrator.reconcile.deployment import metadata
from orchestrator.reconcile.observed import ModelSeen, NodeSeen
from orchestrator.reconcile.pod import USER, volume_attributes
from orchestrator.reconcile.site import Site

NODE: Final = f"{names.PREFETCH}-node"
"""Annotation: the node that a pod is for."""


class Order(msgspec.Struct, frozen=True):
    """A node that is to have a commit."""

    repo: str
    commit: str
    node: str


def cached(nodes: Sequence[NodeSeen], repo: str, commit: str) -> set[str]:
    """Nodes that say they have all of it."""
    key = cached_key(RepoId.parse(repo), commit)
    return {one.name for one in nodes if one.labels.get(key) == WHOLE}


def asked(nodes: Sequence[NodeSeen], said: Prefetch, expected: int | None, ordered: Collection[str]) -> Prefetch:
    """What is asked for, raised to what the forecast would have as far as there are nodes. ``expected`` None: nobody
    knows yet, so nodes that were ordered before stay."""
    fit = len(_fit(nodes, said))
    return msgspec.structs.replace(
        said, nodes=max(said.nodes, min(fit, len(ordered) if expected is None else expected))
    )


def _fit(nodes: Sequence[NodeSeen], said: Prefetch) -> list[str]:
    return [one.name for one in nodes if one.usable and said.selector.items() <= one.labels.items()]


def orders(
    nodes: Sequence[NodeSeen], prefetch: Prefetch, repo: str, commit: str, ordered: Collection[str] = ()
) -> list[Order]:
    """Where it is to be, as many as there are of those that are asked for.

    ``ordered``: nodes that were chosen before; they stay, then come those that have it, then by a hash of commit and
    node (rendezvous hashing), which spreads models over nodes and moves few when a node comes or goes."""
    have = cached(nodes, repo, commit)
    fit = _fit(nodes, prefetch)

    def rank(node: str) -> tuple[bool, bool, bytes]:
        return node not in ordered, node not in have, hashlib.sha256(f"{commit}@{node}".encode()).digest()

    return [Order(repo, commit, node) for node in sorted(fit, key=rank)[: prefetch.nodes]]


def pods(
    owner: Ref, model: ModelSeen, wanted: Sequence[Order], children: Sequence[tuple[Ref, Manifest]], site: Site
) -> tuple[list[Apply], list[Delete]]:
    """Those that there should be, and those that should not: of other commits and nodes, and ones that have ended."""
    made = {pod["metadata"]["name"]: pod for pod in (_pod(owner, model, one, site) for one in wanted)}
    there: Mapping[str, tuple[Ref, Manifest]] = {ref.name: (ref, pod) for ref, pod in children if ref.kind == POD}
    gone = [
        Delete(ref, pod["metadata"].get("resourceVersion", ""))
        for name, (ref, pod) in there.items()
        if (name not in made or ended(pod)) and not pod["metadata"].get("deletionTimestamp")
    ]
    applied = [
        Apply(POD, pod)
        for name, pod in made.items()
        if name not in there or not (ended(there[name][1]) or there[name][1]["metadata"].get("deletionTimestamp"))
    ]
    return applied, gone


def ended(pod: Manifest) -> bool:
    return (pod.get("status") or {}).get("phase") in ("Failed", "Succeeded")


def _pod(owner: Ref, model: ModelSeen, order: Order, site: Site) -> FreeForm:
    labels = {**names.labels(model.name, "prefetch", "model"), names.PREFETCH: "true"}
    term = {"matchFields": [{"key": "metadata.name", "operator": "In", "values": [order.node]}]}
    attributes = volume_attributes(model, order.commit)
    spec: FreeForm = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 1,
        "affinity": {
            "nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}},
        },
        "tolerations": [{"operator": "Exists", "effect": "NoSchedule"}],
        "securityContext": {
            "runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER, "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "name": "keep",
                "image": site.pause_image,
                "resources": {"requests": {"cpu": "1m", "memory": "8Mi"}, "limits": {"memory": "32Mi"}},
                "securityContext": {
                    "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                },
                "volumeMounts": [{"name": "model", "mountPath": "/model", "readOnly": True}],
            }
        ],
        "volumes": [
            {
                "name": "model",
                "csi": {"driver": site.csi_driver, "readOnly": True, "volumeAttributes": attributes},
            }
        ],
    }  # fmt: skip
    if site.pull_secrets:
        spec["imagePullSecrets"] = [{"name": one} for one in site.pull_secrets]
    described = metadata(owner, names.of_prefetch(model.name, spec), labels) | {"annotations": {NODE: order.node}}
    return {"apiVersion": POD.api_version, "kind": POD.kind, "metadata": described, "spec": spec}
