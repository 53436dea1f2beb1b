"""Puts the tables together, and says where they and the application differ."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import version
from typing import Final

import msgspec
from starlette.routing import BaseRoute, Route

from helios.errors import InvalidInput
from registry.api.openapi import content, hub, hub_uploads, names, operations, xet
from registry.api.openapi.describe import FIELDS, NAMES, Answer, Operation, Schema
from registry.hub.api import HubRoute
from registry.hub.paths import TENANTS, parse

GROUPS: Final = {
    "names": names.OPERATIONS,
    "content": content.OPERATIONS,
    "operations": operations.OPERATIONS,
    "hub": hub.OPERATIONS,
    "hub uploads": hub_uploads.OPERATIONS,
    "xet": xet.OPERATIONS,
}
REFS: Final = "#/components/schemas/"
ERROR: Final[Schema] = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"anyOf": [{"type": "string"}, {"type": "object", "required": ["code", "message"]}]}},
}
"""Of the native API an object, of the Hub API a text."""
PATH_NAMES: Final = {
    "key": "Key", "org": "Part", "name": "Part", "kind": "Kind", "revision": "RevisionName", "path": "Path",
    "what": "Text", "push": "Text", "file": "Sha256", "xorb": "Sha256", "spool": "Text", "grant": "Text",
}  # fmt: skip
SAMPLES: Final = {"kind": "models", "org": "o", "name": "n", "revision": "main", "path": "p", "grant": "g", "what": "w"}

_HOLE = re.compile(r"\{([a-z]+)\}")
_CONVERTED = re.compile(r"\{([a-z]+):[a-z]+\}")


def document(routes: Iterable[BaseRoute]) -> Schema:
    """The document of an application that has these routes."""
    served, known = set(_served(routes)), {_named(op) for table in GROUPS.values() for op in table}
    out: Schema = {
        "openapi": "3.1.0",
        "info": {
            "title": "Helios registry",
            "version": version("helios-llm"),
            "description": "docs/native-api.md and docs/hub-api.md say what the calls mean. Every GET answers HEAD.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [
            {"url": "/"},
            {"url": f"/{TENANTS}/{{tenant}}", "variables": {"tenant": {"default": "tenant"}}},
        ],
        "security": [{}, {"token": []}],
        "paths": {},
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": {**NAMES, **_structs()[1]},
        },
    }
    for tag, table in GROUPS.items():
        for op in table:
            if _named(op) in served:
                out["paths"].setdefault(op.path, {})[op.method.lower()] = _operation(tag, op)
    if undocumented := sorted(f"{method} {path}" for method, path in served - known):
        out["x-helios-undocumented"] = undocumented
    if missing := sorted(f"{method} {path}" for method, path in known - served):
        out["x-helios-missing"] = missing
    return out


def _named(op: Operation) -> tuple[str, str]:
    """The call, as the application knows it: a route's path, or a call of the Hub API."""
    return op.method, op.path if op.verb is None else f"hub:{op.verb}"


def _served(routes: Iterable[BaseRoute]) -> Iterator[tuple[str, str]]:
    for route in routes:
        match route:
            case HubRoute():
                yield from ((method, f"hub:{verb}") for verb, method in route.calls())
            case Route() if not route.path.startswith(f"/{TENANTS}/"):
                path = _CONVERTED.sub(r"{\1}", route.path)
                yield from ((method, path) for method in route.methods or () if method != "HEAD")


def misread() -> list[str]:
    """Paths of the Hub API in the tables that the parser of its paths takes for another call, or for none."""
    out = []
    for table in GROUPS.values():
        for op in table:
            if op.verb is not None:
                path = _HOLE.sub(lambda hole: SAMPLES[hole[1]], op.path)
                try:
                    found = parse(path)
                except InvalidInput:
                    found = []
                if not found or found[0].verb != op.verb:
                    out.append(f"{op.method} {op.path}")
    return out


def _operation(tag: str, op: Operation) -> Schema:
    holes = [
        {"name": name, "in": "path", "required": True, "schema": {"$ref": REFS + PATH_NAMES[name]}}
        for name in _HOLE.findall(op.path)
    ]
    out: Schema = {
        "tags": [tag],
        "summary": op.says,
        "operationId": re.sub(r"[^a-z0-9]+", "_", f"{op.method} {op.path}".lower()).strip("_"),
        "x-helios-needs": op.needs,
        "responses": {str(status): _answer(answer) for status, answer in op.answers.items()},
    }
    if parameters := [*holes, *(param.encode() for param in op.params)]:
        out["parameters"] = parameters
    if op.body is not None:
        out["requestBody"] = {"required": True, "content": {op.media: {"schema": _schema(op.body)}}}
    out["responses"].setdefault("4XX", _answer(Answer("Refused: what was wrong, and what to do.", holds=ERROR)))
    return out


def _answer(answer: Answer) -> Schema:
    out: Schema = {"description": answer.says}
    if answer.holds is not None:
        out["content"] = {answer.media: {"schema": _schema(answer.holds)}}
    return out


def _schema(of: type | Schema) -> Schema:
    return of if isinstance(of, dict) else _structs()[0][of]


@cache
def _structs() -> tuple[dict[type, Schema], Schema]:
    """A reference to each struct in the tables; and their schemas, where texts are named by ``FIELDS``."""
    found: dict[type, None] = {}
    for op in (op for table in GROUPS.values() for op in table):
        found |= {each: None for each in (op.body, *(a.holds for a in op.answers.values())) if isinstance(each, type)}
    refs, components = msgspec.json.schema_components(list(found), ref_template=REFS + "{name}")
    for component in components.values():
        for name, schema in component.get("properties", {}).items():
            if name in FIELDS and schema.get("type") == "string":
                component["properties"][name] = {"$ref": REFS + FIELDS[name]}
    assert not NAMES.keys() & components.keys(), "a struct is called like a name"
    return dict(zip(found, refs, strict=True)), components
