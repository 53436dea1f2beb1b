"""Schemas of objects: Kubernetes' own (from the package kubernetes-validate) and those of CRDs, walked alike.

A list is ``atomic`` (a value as a whole), a ``set``, or a ``map`` with keys; a map may be atomic. Source:
kubernetes.io/docs/reference/using-api/server-side-apply, "Merge strategy": without a mark lists are atomic in what is
declared by a structural schema, and the built-in types carry their marks in the published OpenAPI.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
from dataclasses import dataclass
from typing import Any

import jsonschema_rs

VERSION = "1.36"
ATOMIC, SET, MAP = "atomic", "set", "map"
META = {"$ref": "#/$defs/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"}
DIALECT = "https://json-schema.org/draft/2020-12/schema"


@functools.cache
def definitions() -> dict[str, Any]:
    """Kubernetes' definitions by name."""
    root = importlib.resources.files("kubernetes_validate").joinpath("kubernetes-json-schema")
    text = root.joinpath(f"v{VERSION}.0-local", "_definitions.json").read_text()
    found: dict[str, Any] = json.loads(text)["$defs"]
    return found


@functools.cache
def builtin(group: str, version: str, kind: str) -> Schema:
    """The schema of a built-in kind."""
    wanted = {"group": group, "version": version, "kind": kind}
    for name, one in definitions().items():
        if wanted in one.get("x-kubernetes-group-version-kind", ()):
            return Schema({"$ref": f"#/$defs/{name}"})
    raise KeyError(wanted)


@dataclass(frozen=True)
class Schema:
    """A node of a schema; ``raw`` may be a reference into ``definitions``. What is found of it is kept: a definition
    that changes brings new ones."""

    raw: dict[str, Any]

    @functools.cached_property
    def node(self) -> dict[str, Any]:
        reference = self.raw.get("$ref")
        return self.raw if reference is None else definitions()[reference.rsplit("/", 1)[1]]

    def marked(self, mark: str) -> Any:
        """``x-kubernetes-<mark>`` of the field, or else of its type."""
        return self.raw.get(f"x-kubernetes-{mark}", self.node.get(f"x-kubernetes-{mark}"))

    @functools.cached_property
    def open(self) -> bool:
        """Whether any field may be in it."""
        if self.marked("preserve-unknown-fields"):
            return True
        is_object = "object" in self.node.get("type", "object")  # without a type: JSON, as JSONSchemaPropsOrArray
        return is_object and "properties" not in self.node and not self.node.get("additionalProperties")

    def field(self, name: str) -> Schema | None:
        """The schema of a field; None: there is no such field. In what is ``open`` any is, of any kind."""
        return self._fields.get(name, self._more)

    @functools.cached_property
    def _fields(self) -> dict[str, Schema]:
        return {name: Schema(raw) for name, raw in (self.node.get("properties") or {}).items()}

    @functools.cached_property
    def _more(self) -> Schema | None:
        """Of fields that have no name."""
        more = self.node.get("additionalProperties")
        if isinstance(more, dict):
            return Schema(more)
        return ANYTHING if self.open or more is True else None

    @functools.cached_property
    def element(self) -> Schema:
        return Schema(self.node["items"]) if self.node.get("items") else ANYTHING

    @functools.cached_property
    def rules(self) -> list[dict[str, Any]]:
        """In CEL, of this node."""
        return list(self.marked("validations") or ())

    @functools.cached_property
    def ruled(self) -> bool:
        """Whether there may be rules, here or below."""
        if self.rules or "$ref" in self.raw:
            return True
        inner = [*self._fields.values(), *(Schema(one) for one in self._inner if isinstance(one, dict))]
        return any(one.ruled for one in inner)

    @property
    def _inner(self) -> tuple[Any, Any]:
        return self.node.get("items"), self.node.get("additionalProperties")

    @functools.cached_property
    def list_type(self) -> str:
        return str(self.marked("list-type") or ATOMIC)

    @functools.cached_property
    def keys(self) -> tuple[str, ...]:
        return tuple(self.marked("list-map-keys") or ())

    @functools.cached_property
    def atomic_map(self) -> bool:
        return self.marked("map-type") == ATOMIC

    def key(self, element: Any) -> tuple[tuple[str, Any], ...]:
        """The key of an element of a ``map`` list; a key field that is missing has its default."""
        fields = self.element.node.get("properties") or {}
        found = []
        for name in self.keys:
            default = fields.get(name, {}).get("default", "TCP" if name == "protocol" else None)
            found.append((name, element.get(name, default)))
        return tuple(found)


ANYTHING = Schema({"x-kubernetes-preserve-unknown-fields": True})


def validator(raw: dict[str, Any]) -> jsonschema_rs.Validator:
    """Compiled, with Kubernetes' definitions where it has references into them."""
    whole = {"$schema": DIALECT, **raw}
    if "#/$defs/" in json.dumps(raw):
        whole["$defs"] = definitions()
    return jsonschema_rs.validator_for(whole)


def prune(value: Any, schema: Schema, path: str = "") -> list[str]:
    """Remove, in place, the fields that the schema does not have; their paths."""
    unknown: list[str] = []
    if isinstance(value, dict):
        for name in list(value):
            here = f"{path}.{name}" if path else name
            inner = schema.field(name)
            if inner is None and schema.marked("embedded-resource") and name in ("apiVersion", "kind", "metadata"):
                continue
            if inner is None:
                del value[name]
                unknown.append(here)
            else:
                unknown += prune(value[name], inner, here)
    elif isinstance(value, list):
        for at, one in enumerate(value):
            unknown += prune(one, schema.element, f"{path}[{at}]")
    return unknown


def drop_nulls(value: Any) -> None:
    """Built-in types are decoded into structures, where null is as good as nothing; in place."""
    if isinstance(value, dict):
        for name in [name for name, one in value.items() if one is None]:
            del value[name]
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        drop_nulls(one)
