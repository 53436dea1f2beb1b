"""OpenAPI v3 schemas of the resources' types, structural as CustomResourceDefinitions need them.

Everything that the API server checks by itself comes from the types: names, bounds, patterns, defaults, descriptions
(the text below a field). What a type can't say is in ``orchestrator.api.rules``. Source of what "structural" means:
Kubernetes' documentation, "Extend the Kubernetes API with CustomResourceDefinitions", "Specifying a structural schema".
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import re
import textwrap
from typing import Any, Final

import msgspec
from msgspec.inspect import (
    BoolType,
    DictType,
    Field,
    IntType,
    ListType,
    LiteralType,
    Metadata,
    StrType,
    StructType,
    UnionType,
    type_info,
)

from helios.decoding import json_decoder
from orchestrator.api.common import Part
from orchestrator.api.rules import rules_of

Schema = dict[str, Any]
INT_OR_STRING: Final = "x-kubernetes-int-or-string"
FREE: Final = "x-kubernetes-preserve-unknown-fields"


@functools.cache
def schema_of(kind: type[Part], *, defaults: bool = True, described: bool = True) -> Schema:
    """The schema of a part and all below it; the same object each time, so nobody changes it.

    ``defaults``: with what the API server fills in. A status has none: what is not said there is not known.
    ``described``: with descriptions and rules, which nothing but a definition needs; reads the types' source.
    """
    json_decoder(kind)  # describes the type, under the one lock for that
    return _Writer(defaults=defaults, described=described).part(_struct(type_info(kind)))


def pattern_of(text: str) -> str:
    """A type's pattern as the API server's RE2 has it: there ``$`` is the end of the text, and not before a line's."""
    return text.replace(r"\Z", "$")


def fields_of(kind: type[Part]) -> tuple[Field, ...]:
    """A part's fields, as msgspec describes them."""
    return _struct(type_info(kind)).fields


def _struct(described: Any) -> StructType:
    if not isinstance(described, StructType):
        raise TypeError(f"{described!r} is no structure")
    return described


@functools.cache
def descriptions(kind: type[Part]) -> dict[str, str]:
    """What stands below each field of a class, by the field's name. Names of its fields are as Kubernetes has them."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        if not issubclass(one, Part) or one is Part:
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(one))).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in zip(tree.body, [*tree.body[1:], None], strict=True):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                found[field.target.id] = str(below.value.value)
    written = dict(zip(kind.__struct_fields__, kind.__struct_encode_fields__, strict=True))
    return {
        name: tidy(re.sub(r"``(\w+)", lambda found: "``" + written.get(found[1], found[1]), text))
        for name, text in found.items()
    }


def text_of(kind: type) -> str:
    """What a part is."""
    return tidy(kind.__doc__)


def tidy(text: str | None) -> str:
    """A docstring as one paragraph, with single quotation marks for code: what `kubectl explain` shows."""
    return re.sub(r"\s+", " ", (text or "").replace("``", "'")).strip()


class _Writer:
    def __init__(self, *, defaults: bool, described: bool) -> None:
        self._defaults = defaults
        self._described = described

    def part(self, kind: StructType) -> Schema:
        schema: Schema = {"type": "object"}
        texts = descriptions(kind.cls) if self._described else {}
        if self._described:
            schema["description"] = text_of(kind.cls)
        required = [field.encode_name for field in kind.fields if field.required]
        if required:
            schema["required"] = required
        schema["properties"] = {field.encode_name: self._field(field, texts.get(field.name)) for field in kind.fields}
        rules = rules_of(kind.cls) if self._described else ()
        if rules:
            schema["x-kubernetes-validations"] = [rule.written() for rule in rules]
        return schema

    def _field(self, field: Field, text: str | None) -> Schema:
        schema = self._any(field.type)
        if text:
            schema["description"] = text
        if self._defaults and not field.required:
            given = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
            if given is not None:
                schema["default"] = _filled(msgspec.to_builtins(given), schema)
        return schema

    def _any(self, kind: Any) -> Schema:
        match kind:
            case Metadata(type=inner, extra_json_schema=more):
                schema = self._any(inner)
                if more and more.get(INT_OR_STRING):
                    return _int_or_string(schema)
                return {**schema, **(more or {})}
            case UnionType(types=types):
                (only,) = (each for each in types if not isinstance(each, msgspec.inspect.NoneType))
                return self._any(only)
            case StructType():
                return self.part(kind)
            case BoolType():
                return {"type": "boolean"}
            case IntType(ge=ge, le=le):
                fits = le is not None and le < 1 << 31
                schema = {"type": "integer", "format": "int32" if fits else "int64"}
                return schema | _without_none(minimum=ge, maximum=le if fits else None)
            case LiteralType(values=values):
                return {"type": "string", "enum": list(values)}
            case StrType(min_length=least, max_length=most, pattern=pattern):
                written = None if pattern is None else pattern_of(pattern)
                return {"type": "string"} | _without_none(minLength=least, maxLength=most, pattern=written)
            case ListType(item_type=item, min_length=least, max_length=most):
                return {"type": "array", "items": self._any(item)} | _without_none(minItems=least, maxItems=most)
            case DictType(value_type=msgspec.inspect.AnyType()):
                return {"type": "object", FREE: True}
            case DictType(value_type=value, max_length=most):
                return {"type": "object", "additionalProperties": self._any(value)} | _without_none(maxProperties=most)
        raise TypeError(f"nothing says how a schema has {kind!r}")


def _filled(value: Any, schema: Schema) -> Any:
    """A default with the defaults of all below it: the API server looks at each default by itself, rules included."""
    if isinstance(value, dict):
        for name, each in schema.get("properties", {}).items():
            if name in value or "default" in each:
                value[name] = _filled(value.get(name, copy.deepcopy(each.get("default"))), each)
    return value


def _without_none(**given: Any) -> Schema:
    return {key: value for key, value in given.items() if value is not None}


def _int_or_string(text: Schema) -> Schema:
    """A text that may be written as a number that is not negative."""
    rest = {key: value for key, value in text.items() if key != "type"}
    return {"anyOf": [{"type": "integer"}, {"type": "string"}], INT_OR_STRING: True, "minimum": 0, **rest}
