"""x-kubernetes-list-type: nothing is in a set twice, and no two elements of a list that is a map have one key."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tests.fakes.kubernetes.schema import MAP, SET, Schema


def doubles(value: Any, schema: Schema, path: str = "") -> Iterator[tuple[str, str]]:
    """What is in a set twice, or under the same key in a list that is a map."""
    if isinstance(value, dict):
        for name, one in value.items():
            inner = schema.field(name)
            if inner is not None:
                yield from doubles(one, inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        keys = [_mark(one, schema) for one in value]
        for at, one in enumerate(value):
            if keys[at] is not None and keys[at] in keys[:at]:
                yield f"{path}[{at}]", f"Duplicate value: {json.dumps(one)[:80]}"
            yield from doubles(one, schema.element, f"{path}[{at}]")


def _mark(one: Any, schema: Schema) -> Any:
    if schema.list_type == MAP:
        return schema.key(one) if isinstance(one, dict) else None
    return one if schema.list_type == SET else None
