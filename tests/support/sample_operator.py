"""A small operator for tests of the runtime: a Greeting owns a ConfigMap and a Deployment, and cleans up a Secret."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from helios.kube.kinds import CONFIG_MAP, DEPLOYMENT, Kind
from orchestrator.actions import (
    OWNER_LABEL,
    Action,
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
    View,
    owner_reference,
    ref_of,
)
from orchestrator.conditions import Condition, conditions

GREETING = Kind("tests.helios.dev", "v1", "Greeting", "greetings")
FINALIZER = "tests.helios.dev/clean"

CRD: Manifest = {
    "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
    "metadata": {"name": "greetings.tests.helios.dev"},
    "spec": {
        "group": GREETING.group, "scope": "Namespaced",
        "names": {"plural": "greetings", "singular": "greeting", "kind": "Greeting", "listKind": "GreetingList"},
        "versions": [{
            "name": "v1", "served": True, "storage": True,
            "subresources": {
                "status": {}, "scale": {"specReplicasPath": ".spec.replicas", "statusReplicasPath": ".status.replicas"},
            },
            "schema": {"openAPIV3Schema": {
                "type": "object", "required": ["spec"],
                "properties": {
                    "spec": {
                        "type": "object", "required": ["text"],
                        "properties": {
                            "text": {"type": "string", "minLength": 1, "maxLength": 60},
                            "replicas": {"type": "integer", "minimum": 0, "default": 1},
                            "deploy": {"type": "boolean", "default": True},
                            "store": {"type": "string", "x-kubernetes-validations": [
                                {"rule": "self == oldSelf", "message": "the store can't be changed"},
                            ]},
                            "parts": {
                                "type": "array",
                                "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"],
                                "items": {"type": "object", "required": ["name"], "properties": {
                                    "name": {"type": "string"}, "weight": {"type": "integer", "default": 1},
                                }},
                            },
                        },
                        "x-kubernetes-validations": [{
                            "rule": "self.deploy || self.replicas <= 1", "fieldPath": ".replicas",
                            "message": "more than one replica needs deploy",
                        }],
                    },
                    "status": {
                        "type": "object", "x-kubernetes-preserve-unknown-fields": True,
                        "properties": {"replicas": {"type": "integer"}},
                    },
                },
            }},
        }],
    },
}  # fmt: skip


def greeting(name: str, text: str = "hello", namespace: str = "ns", **spec: Any) -> Manifest:
    return {
        "apiVersion": GREETING.api_version, "kind": "Greeting", "metadata": {"name": name, "namespace": namespace},
        "spec": {"text": text, **spec},
    }  # fmt: skip


class Seen(msgspec.Struct, frozen=True):
    ref: Ref
    greeting: Manifest
    deployment: Manifest | None
    problems: Sequence[Problem]
    now: float


class Greeter:
    """``reconcile`` makes the ConfigMap before the Deployment, and goes by neither's absence for long."""

    kind = GREETING
    owns = (CONFIG_MAP, DEPLOYMENT)
    maps: dict[Kind, Any] = {}  # noqa: RUF012

    def observe(self, view: View, key: Key, now: float, problems: Sequence[Problem]) -> Seen | None:
        found = view.get(GREETING, key.namespace, key.name)
        if found is None:
            return None
        return Seen(ref_of(GREETING, found), found, view.get(DEPLOYMENT, key.namespace, key.name), problems, now)

    def reconcile(self, observed: Seen) -> Outcome:
        spec, ref, live = observed.greeting["spec"], observed.ref, observed.deployment
        metadata = observed.greeting["metadata"]
        if metadata.get("deletionTimestamp"):
            return Outcome((RemoveFinalizer(ref, FINALIZER),))
        actions: list[Action] = [SetFinalizer(ref, FINALIZER), Apply(CONFIG_MAP, config_map(ref, spec["text"]))]
        if spec["deploy"]:
            actions.append(Apply(DEPLOYMENT, deployment(ref, spec["text"])))
            actions.append(Scale(Ref(DEPLOYMENT, ref.namespace, ref.name), spec["replicas"]))
        elif live is not None:
            actions.append(Delete(ref_of(DEPLOYMENT, live), live["metadata"]["resourceVersion"]))
        said = [f"{one.reason} of {one.ref.kind.kind}" for one in observed.problems]
        ready = Condition("Ready", "False" if said else "True", "Failed" if said else "Made", "; ".join(said))
        before = (observed.greeting.get("status") or {}).get("conditions")
        status = {
            "observedGeneration": metadata["generation"], "replicas": spec["replicas"],
            "conditions": conditions(before, [ready], observed.now, metadata["generation"]),
        }  # fmt: skip
        actions.append(PatchStatus(ref, status))
        if said:
            actions.append(Emit("Warning", "Failed", ready.message))
        return Outcome(actions)


def config_map(owner: Ref, text: str) -> Manifest:
    return {
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {
            "name": owner.name, "namespace": owner.namespace, "ownerReferences": [owner_reference(owner)],
        },
        "data": {"text": text},
    }  # fmt: skip


def deployment(owner: Ref, text: str) -> Manifest:
    labels = {"app": owner.name}
    return {
        "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {
            "name": owner.name, "namespace": owner.namespace, "ownerReferences": [owner_reference(owner)],
            "labels": {OWNER_LABEL: owner.uid},
        },
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": {"containers": [{
                    "name": "main", "image": "greeter:1", "env": [{"name": "TEXT", "value": text}],
                    "ports": [{"name": "http", "containerPort": 8000}],
                    "resources": {"requests": {"cpu": "1000m", "memory": "1024Mi"}},
                }]},
            },
        },
    }  # fmt: skip
