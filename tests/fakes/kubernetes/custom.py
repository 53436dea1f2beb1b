"""Custom resources: what a CustomResourceDefinition must be, and how its schema treats objects.

Source: kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions: structural schemas,
pruning, defaulting, validation.
"""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import dataclass, field
from typing import Any

import jsonschema_rs

from helios.kube.kinds import Kind
from tests.fakes.kubernetes import cel
from tests.fakes.kubernetes.errors import invalid
from tests.fakes.kubernetes.schema import META, Schema, builtin, validator

CRD = "CustomResourceDefinition.apiextensions.k8s.io"


@dataclass
class Served:
    """A kind that the server knows. ``scale``: paths of the scale subresource, if there is one."""

    kind: Kind
    schema: Schema
    status: bool = True
    scale: dict[str, str] | None = None
    custom: bool = False
    validator: jsonschema_rs.Validator | None = field(default=None, repr=False)

    @property
    def full_name(self) -> str:
        """As errors name it: ``Deployment.apps``."""
        return f"{self.kind.kind}.{self.kind.group}" if self.kind.group else self.kind.kind

    def checked(self, one: dict[str, Any]) -> None:
        """Raise Refusal (422) where a value is not what the schema says."""
        if self.validator is None:
            self.validator = validator(_json_schema(self.schema.raw)) if self.custom else builtin_validator(self.kind)
        causes = []
        for error in self.validator.iter_errors(one):
            path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.instance_path)
            causes.append((path.lstrip("."), f"Invalid value: {json.dumps(error.instance)[:80]}: {error.message}"))
        if causes:
            raise invalid(self.full_name, one["metadata"].get("name", ""), causes)


@functools.cache
def builtin_validator(kind: Kind) -> jsonschema_rs.Validator:
    return validator(builtin(kind.group, kind.version, kind.kind).raw)


def served_by(crd: dict[str, Any]) -> list[Served]:
    """The kinds that a definition brings, one for each served version. Raises Refusal for what is no definition."""
    name, spec, causes = crd["metadata"]["name"], crd["spec"], []
    names, group = spec["names"], spec["group"]
    if name != f"{names['plural']}.{group}":
        causes.append(("metadata.name", f"Invalid value: {name!r}: must be spec.names.plural+'.'+spec.group"))
    if sum(bool(one.get("storage")) for one in spec["versions"]) != 1:
        causes.append(("spec.versions", "Invalid value: must have exactly one version marked as storage version"))
    found = []
    for at, version in enumerate(spec["versions"]):
        where = f"spec.versions[{at}].schema.openAPIV3Schema"
        raw = (version.get("schema") or {}).get("openAPIV3Schema")
        if raw is None:
            causes.append((where, "Required value: schemas are required"))
            continue
        causes += _structural(raw, where)
        schema = Schema(_with_metadata(raw))
        for path, rule in cel.rules_of(schema):
            try:
                cel.compiled(rule["rule"])
                if "messageExpression" in rule:
                    cel.compiled(rule["messageExpression"])
            except ValueError as error:
                causes.append((f"{where}:{path}", f"Invalid value: compilation failed: {error}"))
        sub = version.get("subresources") or {}
        kind = Kind(group, version["name"], names["kind"], names["plural"], spec["scope"] == "Namespaced")
        if version["served"]:
            found.append(Served(kind, schema, "status" in sub, sub.get("scale"), custom=True))
    if causes:
        raise invalid(CRD, name, causes)
    return found


def _structural(raw: dict[str, Any], path: str, *, root: bool = True) -> list[tuple[str, str]]:
    causes = []
    free = raw.get("x-kubernetes-int-or-string") or raw.get("x-kubernetes-preserve-unknown-fields")
    if "type" not in raw and not free:
        causes.append((f"{path}.type", "Required value: must not be empty for specified object fields"))
    if root and raw.get("type") != "object":
        causes.append((f"{path}.type", 'Invalid value: must be "object" at the root'))
    if raw.get("properties") and raw.get("additionalProperties"):
        causes.append((path, "Forbidden: additionalProperties and properties are mutual exclusive"))
    if raw.get("x-kubernetes-list-type") == "map" and not raw.get("x-kubernetes-list-map-keys"):
        causes.append((path, "Required value: must not be empty if x-kubernetes-list-type is map"))
    if raw.get("type") == "array" and "items" not in raw:
        causes.append((f"{path}.items", "Required value: must be specified"))
    for name, inner in (raw.get("properties") or {}).items():
        causes += _structural(inner, f"{path}.properties[{name}]", root=False)
    for part in ("items", "additionalProperties"):
        if isinstance(raw.get(part), dict):
            causes += _structural(raw[part], f"{path}.{part}", root=False)
    return causes


def _with_metadata(raw: dict[str, Any]) -> dict[str, Any]:
    """With what every object has, whether its definition says so or not."""
    found = copy.deepcopy(raw)
    text = {"type": "string"}
    found["properties"] = {**found.get("properties", {}), "apiVersion": text, "kind": text, "metadata": META}
    return found


def _json_schema(raw: Any) -> Any:
    """A structural schema as JSON Schema says it."""
    if isinstance(raw, list):
        return [_json_schema(one) for one in raw]
    if not isinstance(raw, dict) or "$ref" in raw:
        return raw
    found = {}
    for name, one in raw.items():
        if name == "properties" or name == "dependencies":
            found[name] = {key: _json_schema(inner) for key, inner in one.items()}
        elif name in ("enum", "default", "required", "example"):
            found[name] = one
        elif not name.startswith("x-kubernetes-") and name not in ("nullable", "format", "example"):
            found[name] = _json_schema(one)
    if raw.get("exclusiveMinimum") is True:
        found["exclusiveMinimum"] = found.pop("minimum")
    if raw.get("exclusiveMaximum") is True:
        found["exclusiveMaximum"] = found.pop("maximum")
    for name in ("exclusiveMinimum", "exclusiveMaximum"):
        if found.get(name) is False:
            del found[name]
    if raw.get("x-kubernetes-int-or-string"):
        found["type"] = ["integer", "string"]
    if raw.get("nullable") and "type" in found:
        found["type"] = [found["type"], "null"] if isinstance(found["type"], str) else [*found["type"], "null"]
        if "enum" in found:
            found["enum"] = [*found["enum"], None]
    return found


def defaulted(value: Any, schema: Schema) -> None:
    """Fill in, in place, what the schema has defaults for; null where there must be none counts as missing."""
    if isinstance(value, dict):
        for name, raw in (schema.node.get("properties") or {}).items():
            if "default" in raw and (name not in value or (value[name] is None and not raw.get("nullable"))):
                value[name] = copy.deepcopy(raw["default"])
        for name in list(value):
            inner = schema.field(name)
            if value[name] is None and inner is not None and not inner.raw.get("nullable") and inner.node.get("type"):
                del value[name]
            elif inner is not None:
                defaulted(value[name], inner)
    elif isinstance(value, list):
        for one in value:
            defaulted(one, schema.element)
