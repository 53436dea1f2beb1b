"""Whether an object is one that Kubernetes takes: strictly, by its own schemas of several versions, and for kinds of
other projects by schemas of ours that say what we use of them.

Those follow Istio's ``networking/v1`` and ``security/v1`` reference, the Gateway API Inference Extension's
InferencePool v1, and KEDA's ScaledObject; fields that we don't write are left out, and so refused.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import jsonschema
from kubernetes_validate.utils import schema_contents
from referencing import Registry, Resource

VERSIONS = ("1.28", "1.31", "1.34", "1.37")


def _object(required: str = "", **properties: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": False}
    return found | ({"required": required.split()} if required else {})


def _list(items: Any, **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, **more}


STRING: dict[str, Any] = {"type": "string", "minLength": 1}
COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
PORT: dict[str, Any] = {"type": "integer", "minimum": 1, "maximum": 65535}
PERCENT: dict[str, Any] = {"type": "integer", "minimum": 0, "maximum": 100}
DURATION: dict[str, Any] = {"type": "string", "pattern": r"^[1-9]\d*(ms|s|m|h)$"}
"""Istio's own rule: 1 ms at least."""
LABELS: dict[str, Any] = {"type": "object", "additionalProperties": {"type": "string", "maxLength": 63}}
LABEL: dict[str, Any] = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"}
MODE: dict[str, Any] = {"enum": ["UNSET", "DISABLE", "PERMISSIVE", "STRICT"]}

SPECS: dict[tuple[str, str], dict[str, Any]] = {
    ("security.istio.io/v1", "PeerAuthentication"): _object(
        selector=_object(matchLabels=LABELS),
        mtls=_object(mode=MODE),
        portLevelMtls={
            "type": "object", "propertyNames": {"pattern": r"^\d+$"}, "additionalProperties": _object(mode=MODE),
        },
    ),
    ("networking.istio.io/v1", "DestinationRule"): _object(
        "host",
        host=STRING,
        trafficPolicy=_object(
            loadBalancer=_object(simple={"enum": ["ROUND_ROBIN", "LEAST_REQUEST", "RANDOM", "PASSTHROUGH"]}),
            outlierDetection=_object(
                consecutive5xxErrors=COUNT, consecutiveGatewayErrors=COUNT, interval=DURATION,
                baseEjectionTime=DURATION, maxEjectionPercent=PERCENT, minHealthPercent=PERCENT,
            ),
        ),
        subsets=_list(_object("name", name=LABEL, labels=LABELS)),
    ),
    ("networking.istio.io/v1", "VirtualService"): _object(
        "hosts http",
        hosts=_list(STRING, minItems=1),
        http=_list(
            _object(
                "route",
                route=_list(
                    _object("destination", destination=_object("host", host=STRING, subset=LABEL), weight=PERCENT),
                    minItems=1,
                ),
                timeout=DURATION,
                retries=_object("attempts", attempts=COUNT, retryOn=STRING, perTryTimeout=DURATION),
            ),
            minItems=1,
        ),
    ),
    ("inference.networking.k8s.io/v1", "InferencePool"): _object(
        "selector targetPorts endpointPickerRef",
        selector=_object("matchLabels", matchLabels=LABELS),
        targetPorts=_list(_object("number", number=PORT), minItems=1, maxItems=8),
        endpointPickerRef=_object(
            "name",
            group={"type": "string"}, kind=STRING, name=STRING, port=_object("number", number=PORT),
            failureMode={"enum": ["FailOpen", "FailClose"]},
        ),
    ),
    ("keda.sh/v1alpha1", "ScaledObject"): _object(
        "scaleTargetRef triggers",
        scaleTargetRef=_object("name", apiVersion=STRING, kind=STRING, name=STRING),
        pollingInterval=COUNT,
        minReplicaCount=COUNT,
        maxReplicaCount=COUNT,
        advanced=_object(horizontalPodAutoscalerConfig=_object(behavior={"type": "object"})),
        triggers=_list(
            _object(
                "type metadata",
                type={"enum": ["external", "external-push"]},
                metricType={"enum": ["AverageValue", "Value", "Utilization"]},
                metadata={"type": "object", "additionalProperties": {"type": "string"}, "required": ["scalerAddress"]},
                authenticationRef=_object("name", name=STRING, kind=STRING),
            ),
            minItems=1,
        ),
    ),
}  # fmt: skip


@cache
def _validator(api_version: str, kind: str) -> jsonschema.Draft202012Validator:
    metadata = _object(
        "name namespace",
        name={"type": "string", "maxLength": 253, "pattern": r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"}, namespace=LABEL,
        labels=LABELS, annotations={"type": "object", "additionalProperties": {"type": "string"}},
        ownerReferences=_list({"type": "object", "required": ["apiVersion", "kind", "name", "uid"]}),
    )  # fmt: skip
    schema = _object("apiVersion kind metadata spec", apiVersion={"const": api_version}, kind={"const": kind},
                     metadata=metadata, spec=SPECS[api_version, kind])  # fmt: skip
    return jsonschema.Draft202012Validator(schema)


@cache
def _definitions(version: str) -> Resource[Any]:
    name = f"kubernetes-json-schema/v{version}.0-local-strict/_definitions.json"
    return Resource.from_contents(schema_contents(name, version))


@cache
def _official(version: str, api_version: str, kind: str) -> jsonschema.Draft202012Validator:
    """What ``kubernetes_validate.validate`` makes anew for each call, for a quarter of a second."""
    group, _, number = api_version.rpartition("/")
    where = f"{group.partition('.')[0]}-{number}" if group else number
    name = f"kubernetes-json-schema/v{version}.0-local-strict/{kind.lower()}-{where}.json"
    schema = schema_contents(name, version)
    registry: Registry[Any] = Resource.from_contents(schema) @ Registry()
    return jsonschema.Draft202012Validator(schema, registry=_definitions(version) @ registry)


def validate(manifest: dict[str, Any], versions: tuple[str, ...] = VERSIONS) -> None:
    """Raises ValidationError for what an API server would refuse by its schema."""
    if (manifest["apiVersion"], manifest["kind"]) in SPECS:
        _validator(manifest["apiVersion"], manifest["kind"]).validate(manifest)
        return
    for version in versions:
        _official(version, manifest["apiVersion"], manifest["kind"]).validate(manifest)
