"""The reference in docs/operator-resources.md, made of the resources' types; scripts/chart.py writes it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msgspec import inspect

from orchestrator.api.common import Part
from orchestrator.api.model import ModelSpec, ModelStatus
from orchestrator.api.schema import descriptions, fields_of, schema_of, text_of
from orchestrator.api.service import ServiceSpec, ServiceStatus

PAGE = Path(__file__).resolve().parent.parent / "docs" / "operator-resources.md"
BEGIN, END = "<!-- reference -->\n", "<!-- end of the reference -->\n"
ROOTS: dict[str, type[Part]] = {
    "Model: spec": ModelSpec,
    "Model: status": ModelStatus,
    "InferenceService: spec": ServiceSpec,
    "InferenceService: status": ServiceStatus,
}


def page() -> str:
    """The page with its reference as the types are now."""
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    return before + BEGIN + reference() + END + rest.split(END)[1]


def reference() -> str:
    """One table for each part; a part that several have stands once."""
    titles = {kind: title for title, kind in ROOTS.items()}
    lines = []
    for kind in _parts():
        lines += [
            f"### {titles.get(kind, kind.__name__)}",
            "",
            text_of(kind),
            "",
            "| field | what may be said | default | |",
        ]
        lines += ["|---|---|---|---|", *_rows(kind), ""]
    return "\n".join(lines)


def _parts() -> Iterator[type[Part]]:
    """The roots, each with what is in it behind it."""
    seen: list[type[Part]] = []

    def visit(kind: type[Part]) -> None:
        if kind not in seen:
            seen.append(kind)
            for field in fields_of(kind):
                for below in _below(field.type):
                    visit(below)

    for root in ROOTS.values():
        visit(root)
    return iter(seen)


def _below(described: Any) -> Iterator[type[Part]]:
    match described:
        case inspect.StructType(cls=cls):
            yield cls
        case inspect.Metadata(type=inner) | inspect.ListType(item_type=inner) | inspect.DictType(value_type=inner):
            yield from _below(inner)
        case inspect.UnionType(types=types):
            for each in types:
                yield from _below(each)


def _rows(kind: type[Part]) -> Iterator[str]:
    texts = descriptions(kind)
    schema = schema_of(kind)
    for field in fields_of(kind):
        its = schema["properties"][field.encode_name]
        if field.required:
            default = "**needed**"
        elif "default" not in its:
            default = ""
        else:
            given = its["default"]
            default = "`{…}`" if isinstance(given, dict) and given else f"`{json.dumps(given)}`"
        parts = list(_below(field.type))
        said = f"[{parts[0].__name__}](#{parts[0].__name__.lower()})" if parts else _said(its)
        if parts and its["type"] == "array":
            said = f"list of {said}"
        elif parts and "additionalProperties" in its:
            said = f"names with {said}"
        text = texts.get(field.name) or (text_of(parts[0]) if parts else "")
        yield f"| `{field.encode_name}` | {said} | {default} | {text.replace('|', chr(92) + '|')} |"


def _said(schema: dict[str, Any]) -> str:
    """What a value may be, for people."""
    if "enum" in schema:
        return ", ".join(f"`{each}`" for each in schema["enum"])
    if schema.get("x-kubernetes-int-or-string"):
        return "quantity"
    match schema["type"]:
        case "boolean":
            return "`true`, `false`"
        case "integer":
            most = schema.get("maximum")
            return f"{schema['minimum']} or more" if most is None else f"{schema['minimum']} to {most}"
        case "array":
            return f"list of {_said(schema['items'])}, at most {schema['maxItems']}"
        case "object":
            return "as in Kubernetes" if "additionalProperties" not in schema else "names with texts"
    return f"text, at most {schema['maxLength']}"
