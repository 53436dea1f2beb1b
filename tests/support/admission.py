"""What an API server does with an object of a CustomResourceDefinition before it stores it: fields that the schema does
not have are refused or pruned, nulls dropped, defaults filled in; then schema, list types and CEL rules are checked.

The order and the messages' shape are Kubernetes' (apiextensions-apiserver, registry/customresource/strategy.go); the
schema is checked by jsonschema, the rules by Google's own CEL (cel-expr-python), neither of which is Helios' code."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jsonschema
from cel_expr_python import cel
from cel_expr_python.ext import ext_strings

Schema = dict[str, Any]
FREE = "x-kubernetes-preserve-unknown-fields"


class Refused(Exception):
    """Why an object is not stored: one line for each field. ``fields``: the paths alone."""

    def __init__(self, errors: list[tuple[str, str]]) -> None:
        super().__init__("\n".join(f"{path}: {text}" for path, text in errors))
        self.fields = [path for path, _ in errors]


class Admission:
    """Of one definition, in its first version."""

    def __init__(self, definition: Mapping[str, Any]) -> None:
        (version,) = definition["spec"]["versions"]
        self.schema: Schema = version["schema"]["openAPIV3Schema"]
        self._checker = _Validator(self.schema)

    def admit(self, new: dict[str, Any], old: Any = None, *, strict: bool = True) -> dict[str, Any]:
        """The object as it is stored. ``strict``: unknown fields are refused, as kubectl asks for. Raises Refused."""
        new = copy.deepcopy(new)
        unknown = [(path, "unknown field") for path in _pruned(new, self.schema, "")]
        if strict and unknown:
            raise Refused(unknown)
        _filled(new, self.schema)
        errors = [(_path(each.absolute_path), each.message) for each in self._checker.iter_errors(new)]
        errors += list(_doubles(new, self.schema, ""))
        errors = errors or list(
            _broken(new, old, self.schema, "")
        )  # as Kubernetes: rules see what fits the schema alone
        if errors:
            raise Refused(errors)
        return new


def _pattern(_: Any, pattern: str, instance: Any, __: Schema) -> Iterator[jsonschema.ValidationError]:
    """RE2's ``$``, which is the end of the text alone."""
    if isinstance(instance, str) and not re.search(re.sub(r"\$\Z", r"\\Z", pattern), instance, re.ASCII):
        yield jsonschema.ValidationError(f"{instance!r} does not match {pattern!r}")


_Validator = jsonschema.validators.extend(jsonschema.Draft202012Validator, {"pattern": _pattern})


def _path(parts: Any) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")


def _children(value: Any, schema: Schema, path: str) -> Iterator[tuple[Any, Any, Schema, str]]:
    """(key, value, schema, path) of what lies in it and has a schema."""
    if isinstance(value, dict):
        others = schema.get("additionalProperties")
        for key, each in list(value.items()):
            its = schema.get("properties", {}).get(key, others)
            if isinstance(its, dict):
                yield key, each, its, f"{path}.{key}".lstrip(".")
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        for number, each in enumerate(value):
            yield number, each, schema["items"], f"{path}[{number}]"


def _pruned(value: Any, schema: Schema, path: str) -> Iterator[str]:
    """Take out what the schema does not have; the paths of it."""
    if isinstance(value, dict) and not schema.get(FREE) and "additionalProperties" not in schema and schema != METADATA:
        for key in [key for key in value if key not in schema.get("properties", {})]:
            del value[key]
            yield f"{path}.{key}".lstrip(".")
    for _, each, its, where in _children(value, schema, path):
        yield from _pruned(each, its, where)


METADATA: Schema = {"type": "object"}


def _filled(value: Any, schema: Schema) -> None:
    """Drop nulls of fields that can't be null, and give defaults to what is not there."""
    if isinstance(value, dict):
        for key, its in schema.get("properties", {}).items():
            if key in value and value[key] is None and not its.get("nullable"):
                del value[key]
            if key not in value and "default" in its:
                value[key] = copy.deepcopy(its["default"])
    for _, each, its, _ in _children(value, schema, ""):
        _filled(each, its)


def _doubles(value: Any, schema: Schema, path: str) -> Iterator[tuple[str, str]]:
    kind, keys = schema.get("x-kubernetes-list-type"), schema.get("x-kubernetes-list-map-keys", [])
    if isinstance(value, list) and kind in ("set", "map"):
        seen: list[Any] = []
        for number, each in enumerate(value):
            key = each if kind == "set" else {name: each.get(name) for name in keys if isinstance(each, dict)}
            if key in seen:
                yield f"{path}[{number}]", f"Duplicate value: {key!r}"
            seen.append(key)
    for _, each, its, where in _children(value, schema, path):
        yield from _doubles(each, its, where)


def _broken(value: Any, old: Any, schema: Schema, path: str) -> Iterator[tuple[str, str]]:
    for rule in schema.get("x-kubernetes-validations", []):
        compares = "oldSelf" in rule["rule"]
        if compares and old is None:
            continue
        data = {"self": value, **({"oldSelf": old} if compares else {})}
        answer = program(rule["rule"]).eval(data=data).plain_value()
        if answer is not True:
            said = rule["message"] if answer is False else f"rule could not be evaluated: {answer}"
            yield (path + rule.get("fieldPath", "")).lstrip("."), said
    for key, each, its, where in _children(value, schema, path):
        before = old.get(key) if isinstance(old, dict) else None  # items of lists are compared with nothing here
        yield from _broken(each, before, its, where)


def _summed(values: Any) -> int:
    return sum(each.plain_value() if isinstance(each, cel.Value) else each for each in values)


@functools.cache
def _environment() -> Any:
    """CEL with what Kubernetes has beside it (its libraries of lists and strings) as far as rules here use it."""
    total = cel.Overload("list_sum", cel.Type.INT, [cel.Type.LIST], is_member=True, impl=_summed)
    return cel.NewEnv(
        variables={"self": cel.Type.DYN, "oldSelf": cel.Type.DYN},
        extensions=[ext_strings.ExtStrings()],
        functions=[cel.FunctionDecl("sum", [total])],
    )


@functools.cache
def program(rule: str) -> Any:
    """A rule, compiled. Raises for what is no CEL."""
    return _environment().compile(rule)
