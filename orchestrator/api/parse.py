"""From what the API server has to the types, and what is wrong with it, by the field's path.

The API server refuses what is invalid when it is written. What it has may be older than the rules, or be written past
them (other definitions, validation ratcheting), so it is looked at again where it is read; a reconciler shows the
error as the condition ``Invalid``.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, TypeVar, cast

import msgspec

from helios.decoding import converted
from helios.errors import InvalidInput
from orchestrator.api.common import Part
from orchestrator.api.model import ModelSpec, ModelStatus
from orchestrator.api.rules import misnamed, violations
from orchestrator.api.schema import FREE, INT_OR_STRING, Schema, schema_of
from orchestrator.api.service import ServiceSpec, ServiceStatus

PartT = TypeVar("PartT", bound=Part)

_WHERE = re.compile(r" - at `\$(.*)`\Z")


MOST: Final = 5000
"""Specs and statuses that are remembered."""


class InvalidResource(InvalidInput):
    """A resource that is stored is not one that could be written: the message has a line for each field."""

    code = "Invalid"


def model_spec(manifest: Mapping[str, Any]) -> ModelSpec:
    """What is wanted of a Model. Raises InvalidResource."""
    return _spec(ModelSpec, manifest)


def service_spec(manifest: Mapping[str, Any]) -> ServiceSpec:
    """What is wanted of an InferenceService. Raises InvalidResource."""
    return _spec(ServiceSpec, manifest)


def model_status(manifest: Mapping[str, Any]) -> ModelStatus:
    """What was said of a Model last; see ``service_status``."""
    return _status(ModelStatus, manifest)


def service_status(manifest: Mapping[str, Any]) -> ServiceStatus:
    """What was said of an InferenceService last. Fields of a later version are passed over; a status that can't be read
    is as none, because all of it is worked out again."""
    return _status(ServiceStatus, manifest)


class Reader:
    """Reads objects that come again and again, as the functions above do: of each object what was read last is kept
    with its JSON, and read anew when that is another one. Used in one thread."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, type[Part]], tuple[bytes, Part]] = OrderedDict()

    def model_spec(self, manifest: Mapping[str, Any]) -> ModelSpec:
        return self._read(ModelSpec, manifest, "spec", _spec)

    def service_spec(self, manifest: Mapping[str, Any]) -> ServiceSpec:
        return self._read(ServiceSpec, manifest, "spec", _spec)

    def model_status(self, manifest: Mapping[str, Any]) -> ModelStatus:
        return self._read(ModelStatus, manifest, "status", _status)

    def _read(
        self, kind: type[PartT], manifest: Mapping[str, Any], part: str,
        read: Callable[[type[PartT], Mapping[str, Any]], PartT],
    ) -> PartT:  # fmt: skip
        key = str(manifest.get("metadata", {}).get("uid", "")), kind
        content = msgspec.json.encode(manifest.get(part))
        known = self._known.get(key)
        if known is not None and known[0] == content:
            self._known.move_to_end(key)
            return cast(PartT, known[1])
        found = read(kind, manifest)
        if key[0]:
            self._known[key] = content, found
            self._known.move_to_end(key)
            while len(self._known) > MOST:
                self._known.popitem(last=False)
        return found


def _spec(kind: type[PartT], manifest: Mapping[str, Any]) -> PartT:
    given = manifest.get("spec")
    if not isinstance(given, Mapping):
        raise InvalidResource("spec: is missing; say what is wanted")
    schema = schema_of(kind, described=False)
    try:
        found = converted(admitted(given, schema), kind)
    except msgspec.ValidationError as error:
        raise InvalidResource(_said(str(error))) from None
    name = manifest.get("metadata", {}).get("name", "")
    wrong = [*(misnamed(name) if name else ()), *_doubles(given, schema, "spec"), *violations(found, "spec")]
    if wrong:
        raise InvalidResource("\n".join(wrong))
    return found


def _status(kind: type[PartT], manifest: Mapping[str, Any]) -> PartT:
    schema = schema_of(kind, defaults=False, described=False)
    try:
        return converted(admitted(manifest.get("status") or {}, schema, unknown=False), kind)
    except msgspec.ValidationError:
        return kind()


def _said(message: str) -> str:
    """msgspec's message with the path in front, as the API server has it."""
    found = _WHERE.search(message)
    path, text = (found[1], message[: found.start()]) if found else ("", message)
    return f"spec{path}: {text[0].lower()}{text[1:]}"


def _doubles(value: Any, schema: Schema, path: str) -> Iterator[str]:
    """What stands twice in a list that the schema has as a set or a map."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            if key in schema.get("properties", {}):
                yield from _doubles(each, schema["properties"][key], f"{path}.{key}")
    elif isinstance(value, list):
        keys = schema.get("x-kubernetes-list-map-keys", ())
        marks = [tuple(each[key] for key in keys) if keys else each for each in value]
        for number, each in enumerate(value):
            if schema.get("x-kubernetes-list-type") in ("set", "map") and marks[number] in marks[:number]:
                yield f"{path}[{number}]: is there twice: take one of the two out"
            yield from _doubles(each, schema["items"], f"{path}[{number}]")


def admitted(value: Any, schema: Schema, *, unknown: bool = True) -> Any:
    """A copy as the API server stores it, but for defaults: without nulls, and quantities as text. ``unknown``: with
    fields that the schema does not have, so that somebody complains of them."""
    if schema.get(INT_OR_STRING):
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if schema.get(FREE):
        return value
    if isinstance(value, Mapping):
        named: Mapping[str, Schema] = schema.get("properties", {})
        others: Schema | None = schema.get("additionalProperties")
        found = {}
        for key, each in value.items():
            its = named.get(key, others)
            if its is not None and each is not None:
                found[key] = admitted(each, its, unknown=unknown)
            elif its is None and unknown:
                found[key] = each
        return found
    if isinstance(value, list) and "items" in schema:
        return [admitted(each, schema["items"], unknown=unknown) for each in value]
    return value
