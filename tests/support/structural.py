"""Whether a schema is structural, by Kubernetes' own documentation: "Extend the Kubernetes API with
CustomResourceDefinitions", "Specifying a structural schema", and what list types and validation rules ask for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

KNOWN = {
    "additionalProperties", "allOf", "anyOf", "default", "description", "enum", "exclusiveMaximum", "exclusiveMinimum",
    "format", "items", "maxItems", "maxLength", "maximum", "maxProperties", "minItems", "minLength", "minimum",
    "minProperties", "multipleOf", "not", "nullable", "oneOf", "pattern", "properties", "required", "title", "type",
    "uniqueItems", "x-kubernetes-embedded-resource", "x-kubernetes-int-or-string", "x-kubernetes-list-map-keys",
    "x-kubernetes-list-type", "x-kubernetes-map-type", "x-kubernetes-preserve-unknown-fields",
    "x-kubernetes-validations",
}  # fmt: skip
INT_OR_STRING = [{"type": "integer"}, {"type": "string"}]
REASONS = {"FieldValueRequired", "FieldValueForbidden", "FieldValueInvalid", "FieldValueDuplicate"}
NOT_BELOW_LOGIC = ("type", "default", "description", "title", "nullable", "additionalProperties")


def problems(schema: dict[str, Any], path: str = "$") -> Iterator[str]:
    """What keeps it from being structural; nothing, if it is."""
    root = path == "$"
    yield from (f"{path}: {key} is not known" for key in schema.keys() - KNOWN)
    kind, ints = schema.get("type"), schema.get("x-kubernetes-int-or-string")
    free = schema.get("x-kubernetes-preserve-unknown-fields")
    if not kind and not ints and not free:
        yield f"{path}: has no type"
    if root and kind != "object":
        yield f"{path}: is no object"
    if root and "additionalProperties" in schema:
        yield f"{path}: additionalProperties at the root"
    if ints and (kind or free or schema.get("anyOf") != INT_OR_STRING):
        yield f"{path}: int-or-string with a type of its own"
    if schema.get("additionalProperties") and schema.get("properties"):
        yield f"{path}: additionalProperties beside properties"
    if schema.get("uniqueItems"):
        yield f"{path}: uniqueItems may not be set"
    if kind == "array" and not isinstance(schema.get("items"), dict):
        yield f"{path}: items have no schema"
    yield from _logic(schema, path)
    yield from _lists(schema, path)
    yield from _rules(schema, path)
    if "pattern" in schema and re.search(r"\(\?[=!<]|\\[1-9ZzG]", schema["pattern"]):
        yield f"{path}: a pattern that RE2 does not know"
    for name in schema.get("required", []):
        if name not in schema.get("properties", {}):
            yield f"{path}: requires {name}, which is not there"
    for name, each in schema.get("properties", {}).items():
        if root and name == "metadata":
            if each != {"type": "object"}:
                yield f"{path}.metadata: says more than that there is one"
            continue
        yield from problems(each, f"{path}.{name}")
    if isinstance(schema.get("items"), dict):
        yield from problems(schema["items"], f"{path}[]")
    if isinstance(schema.get("additionalProperties"), dict):
        yield from problems(schema["additionalProperties"], f"{path}{{}}")


def _logic(schema: dict[str, Any], path: str) -> Iterator[str]:
    for junctor in ("allOf", "anyOf", "oneOf"):
        if junctor == "anyOf" and schema.get("x-kubernetes-int-or-string"):
            continue
        for each in schema.get(junctor, []):
            yield from (f"{path}: {key} below {junctor}" for key in NOT_BELOW_LOGIC if key in each)
    yield from (f"{path}: {key} below not" for key in NOT_BELOW_LOGIC if key in schema.get("not", {}))


def _lists(schema: dict[str, Any], path: str) -> Iterator[str]:
    kind, keys = schema.get("x-kubernetes-list-type"), schema.get("x-kubernetes-list-map-keys", [])
    if kind is None and not keys:
        return
    if schema.get("type") != "array" or kind not in ("atomic", "set", "map"):
        yield f"{path}: a list type {kind} that can't be"
    item = schema.get("items", {})
    if (kind == "map") != bool(keys):
        yield f"{path}: keys and the list type map belong together"
    for key in keys:
        its = item.get("properties", {}).get(key, {})
        if its.get("type") in (None, "object", "array") or its.get("nullable"):
            yield f"{path}: the key {key} is no scalar"
        if key not in item.get("required", []) and "default" not in its:
            yield f"{path}: the key {key} may be missing"
    if kind == "set" and item.get("type") in ("object", "array"):
        yield f"{path}: a set of what is no scalar"


def _rules(schema: dict[str, Any], path: str) -> Iterator[str]:
    seen = set()
    for rule in schema.get("x-kubernetes-validations", []):
        if not rule.get("rule", "").strip() or not rule.get("message", "").strip() or "\n" in rule["message"]:
            yield f"{path}: a rule without a text or a message of one line"
        if rule.get("reason", "FieldValueInvalid") not in REASONS or rule["rule"] in seen:
            yield f"{path}: a rule twice, or with a reason that there is not"
        seen.add(rule["rule"])
        here = schema
        for name in rule.get("fieldPath", "").split(".")[1:]:
            if name not in here.get("properties", {}):
                yield f"{path}: a rule is about {rule['fieldPath']}, which is not there"
                break
            here = here["properties"][name]


def unbounded(schema: dict[str, Any], path: str = "$") -> Iterator[str]:
    """Texts, lists and maps without a longest length: the cost of rules is reckoned by these."""
    longest = {"string": "maxLength", "array": "maxItems"}.get(schema.get("type", ""))
    if longest and longest not in schema and "enum" not in schema:
        yield path
    if isinstance(schema.get("additionalProperties"), dict) and "maxProperties" not in schema:
        yield path
    for name, each in schema.get("properties", {}).items():
        if path != "$" or name in ("spec", "status"):
            yield from unbounded(each, f"{path}.{name}")
    for below in ("items", "additionalProperties"):
        if isinstance(schema.get(below), dict):
            yield from unbounded(schema[below], f"{path}[]")
