"""The CustomResourceDefinitions of Model and InferenceService, made of the types; `scripts/chart.py` writes them down.

One version, served and stored. A second one is added beside it, with ``storage: true`` moved to it once every operator
reads it; while both have the same fields ``conversion: None`` is enough, and from then on a webhook converts.
"""

from __future__ import annotations

from typing import Any, Final

from orchestrator.api.common import API_VERSION, GROUP, VERSION, Part
from orchestrator.api.model import ModelSpec, ModelStatus
from orchestrator.api.rules import NAMED
from orchestrator.api.schema import Schema, schema_of
from orchestrator.api.service import ServiceSpec, ServiceStatus

Definition = dict[str, Any]
_READY: Final = '.status.conditions[?(@.type=="Ready")]'


def _column(name: str, path: str, text: str, kind: str = "string", *, wide: bool = False) -> dict[str, Any]:
    """A column of `kubectl get`; a ``wide`` one is shown with `-o wide` alone."""
    return {"name": name, "type": kind, "jsonPath": path, "description": text, "priority": int(wide)}


def _definition(
    kind: str,
    plural: str,
    short: str,
    text: str,
    spec: type[Part],
    status: type[Part],
    columns: list[dict[str, Any]],
    scale: dict[str, str] | None = None,
) -> Definition:
    schema: Schema = {
        "type": "object",
        "description": text,
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string", "description": f"{API_VERSION}."},
            "kind": {"type": "string", "description": f"{kind}."},
            "metadata": {"type": "object"},
            "spec": schema_of(spec),
            "status": schema_of(status, defaults=False),
        },
        "x-kubernetes-validations": [NAMED.written()],
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{GROUP}", "labels": {"app.kubernetes.io/name": "helios"}},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": kind,
                "listKind": f"{kind}List",
                "plural": plural,
                "singular": kind.lower(),
                "shortNames": [short],
                "categories": ["helios"],
            },
            "conversion": {"strategy": "None"},
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": schema},
                    "subresources": {"status": {}} | ({"scale": scale} if scale else {}),
                    "additionalPrinterColumns": [
                        *columns,
                        _column("Reason", f"{_READY}.reason", "Why it is ready, or not."),
                        _column("Age", ".metadata.creationTimestamp", "Since when there is one.", "date"),
                        _column("Message", f"{_READY}.message", "What is waited for, or is to be done.", wide=True),
                    ],
                }
            ],
        },
    }


def model() -> Definition:
    """``models.helios.dev``."""
    return _definition(
        "Model",
        "models",
        "hm",
        "A repository of the registry at a commit, and how it is kept near the pods that need it.",
        ModelSpec,
        ModelStatus,
        [
            _column("Repo", ".spec.source.repo", "Its repository at the registry."),
            _column("Revision", ".spec.revision.revision", "The branch, tag or commit that is wanted."),
            _column("Commit", ".status.shortCommit", "The commit that counts."),
            _column("Ready", f"{_READY}.status", "Whether services can use it."),
            _column("Size", ".status.sizeBytes", "Bytes of its files.", "integer", wide=True),
            _column("Nodes", ".status.nodesCached", "Nodes that have all of it.", "integer", wide=True),
        ],
    )


def inference_service() -> Definition:
    """``inferenceservices.helios.dev``. `kubectl scale` sets ``spec.replicas``, which stops scaling: the number that
    somebody has said counts, until it is taken out. The bounds of scaling are ``spec.scaling``'s."""
    return _definition(
        "InferenceService",
        "inferenceservices",
        "hsvc",
        "A Model that answers requests.",
        ServiceSpec,
        ServiceStatus,
        [
            _column("Model", ".spec.model.name", "The Model that it serves."),
            _column("Ready", f"{_READY}.status", "Whether it answers requests, or can be woken by one."),
            _column("Replicas", ".status.replicas", "Workers of the decode or only role.", "integer"),
            _column("Up", ".status.readyReplicas", "Those of them that answer requests.", "integer"),
            _column("Revision", ".status.shortCommit", "The commit that has requests, or most of them."),
            _column("Rollout", '.status.conditions[?(@.type=="Progressing")].reason', "How changes go."),
        ],
        {
            "specReplicasPath": ".spec.replicas",
            "statusReplicasPath": ".status.replicas",
            "labelSelectorPath": ".status.selector",
        },
    )


def definitions() -> dict[str, Definition]:
    """Both, by the names of their files."""
    return {"models.yaml": model(), "inferenceservices.yaml": inference_service()}
