"""The administration in OpenAPI 3.1."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Final

import msgspec

from helios.demand import Demand, Line
from router.admin_access import Right
from router.discovery.registration import Registration

Schema = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Operation:
    """A call; ``name`` is that of the method that answers it."""

    name: str
    method: str
    path: str
    needs: Right
    summary: str


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "required": list(properties), "properties": properties}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


TEXT: Final[Schema] = {"type": "string"}
COUNT: Final[Schema] = {"type": "integer", "minimum": 0}
NUMBER: Final[Schema] = {"type": "number"}
FLAG: Final[Schema] = {"type": "boolean"}
MAYBE_TEXT: Final[Schema] = {"type": ["string", "null"]}
MAYBE_NUMBER: Final[Schema] = {"type": ["number", "null"]}

WORKER: Final = _object(
    id=TEXT, url=TEXT, models=_list(TEXT), adapters=_list(TEXT), role={"enum": ["both", "prefill", "decode"]},
    revision=TEXT, weight=NUMBER, health={"enum": ["unknown", "up", "down"]}, reason=MAYBE_TEXT, since_s=NUMBER,
    in_flight=COUNT, cordoned=FLAG, unready=FLAG, draining=FLAG,
    breaker={"enum": ["closed", "half_open", "open"]}, ejected_s=MAYBE_NUMBER, lease_s=MAYBE_NUMBER,
)  # fmt: skip
MODEL: Final = _object(model=TEXT, workers=COUNT, up=COUNT, cordoned=COUNT, in_flight=COUNT)
AWAITED: Final = _object(
    model=TEXT, phase=TEXT, done=COUNT, total=COUNT, reason=MAYBE_TEXT, retry_after_s=COUNT, waited_s=NUMBER
)
PUBLISHER: Final = _object(
    worker=TEXT, endpoint=TEXT, replay=MAYBE_TEXT, connected=FLAG, followed=FLAG, blocks=COUNT, behind=COUNT,
    lag_s=NUMBER, gaps=COUNT,
)  # fmt: skip
PART: Final = {**_object(name=TEXT), "additionalProperties": True}
POLICY: Final = _object(name=MAYBE_TEXT, filters=_list(PART), scorers=_list(PART), picker=PART)
INDEX: Final = _object(blocks=COUNT, max_blocks=COUNT, publishers=_list(PUBLISHER), shared=_list(TEXT))
ERROR: Final = _object(error=_object(code=TEXT, message=TEXT, hint=MAYBE_TEXT))
ANSWERS: Final[dict[str, Schema]] = {
    "workers": _object(workers=_list(WORKER)),
    "worker": WORKER,
    "register": _object(id=TEXT, url=TEXT, lease_s=NUMBER),
    "deregister": _object(everywhere=FLAG),
    "cordon": _object(in_flight=COUNT, everywhere=FLAG),
    "uncordon": _object(in_flight=COUNT, everywhere=FLAG),
    "drain": _object(in_flight=COUNT, drained=FLAG, everywhere=FLAG),
    "policies": _object(
        policy=POLICY,
        known=_object(policies=_list(TEXT), filters=_list(TEXT), scorers=_list(TEXT), pickers=_list(TEXT)),
    ),
    "state": _object(
        status={"enum": ["ready", "draining"]}, uptime_s=NUMBER, policy=POLICY, workers=_list(WORKER),
        models=_list(MODEL), awaited=_list(AWAITED), index={"anyOf": [INDEX, {"type": "null"}]},
    ),
    "demand": {"$ref": "#/components/schemas/Demand"},
    "watch": {"$ref": "#/components/schemas/Line"},
    "openapi": {"type": "object"},
}  # fmt: skip
JSON: Final = "application/json"
TYPES: Final = {"watch": "application/x-ndjson"}
"""What is answered with another type than JSON: here each line has the schema."""
REFUSALS: Final[dict[str, tuple[str, ...]]] = {
    "worker": ("404",),
    "register": ("400", "409", "503"),
    "deregister": ("404",),
    "cordon": ("404",),
    "uncordon": ("404",),
    "drain": ("400", "404"),
    "watch": ("503",),
}
WAIT: Final[Schema] = {
    "name": "wait_s", "in": "query", "schema": {"type": "number", "minimum": 0, "maximum": 600, "default": 0},
    "description": "Longest wait, in seconds.",
}  # fmt: skip
ID: Final[Schema] = {
    "name": "id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1},
    "description": "What the worker registered as, or its URL without the scheme.",
}  # fmt: skip


def document(operations: Iterable[Operation]) -> Schema:
    """The document of these calls."""
    paths: dict[str, Schema] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _described(operation)
    _, schemas = msgspec.json.schema_components(
        (Registration, Demand, Line), ref_template="#/components/schemas/{name}"
    )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Helios router administration",
            "version": version("helios-llm"),
            "description": "docs/router.md says what the calls mean.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": {"Error": ERROR, **schemas},
        },
    }


def _described(operation: Operation) -> Schema:
    refused = {"description": "Refused.", "content": _json({"$ref": "#/components/schemas/Error"})}
    codes = REFUSALS.get(operation.name, ())
    if operation.needs is not Right.NONE:
        codes = (*codes, "401", "403")
    out: Schema = {
        "operationId": operation.name,
        "summary": operation.summary,
        "security": [] if operation.needs is Right.NONE else [{"token": []}],
        "x-helios-needs": operation.needs.name.lower(),
        "responses": {
            "200": {
                "description": "Done.",
                "content": {TYPES.get(operation.name, JSON): {"schema": ANSWERS[operation.name]}},
            },
            **dict.fromkeys(sorted(codes), refused),
        },
    }
    parameters = [ID] if "{id}" in operation.path else []
    if operation.name == "drain":
        parameters = [*parameters, WAIT]
    if parameters:
        out["parameters"] = parameters
    if operation.name == "register":
        out["requestBody"] = {"required": True, "content": _json({"$ref": "#/components/schemas/Registration"})}
    return out


def _json(schema: Schema) -> Schema:
    return {JSON: {"schema": schema}}
