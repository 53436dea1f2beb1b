"""The CustomResourceDefinitions: structural, valid for Kubernetes, bounded, complete."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import kubernetes_validate
import pytest

from orchestrator.api.crds import definitions
from orchestrator.api.rules import NAMED, RULES
from tests.fakes.kubernetes import cel
from tests.fakes.kubernetes.schema import Schema
from tests.fakes.kubernetes.schema import validator as schema_validator
from tests.support import structural

VERSIONS = ("1.28", "1.31", "1.34", "1.37")
DEFINITIONS = definitions()


def schema_of(definition: dict[str, Any]) -> dict[str, Any]:
    return definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


@pytest.fixture(params=DEFINITIONS)
def definition(request: pytest.FixtureRequest) -> dict[str, Any]:
    return copy.deepcopy(DEFINITIONS[request.param])


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_them(definition: dict[str, Any], version: str):
    kubernetes_validate.validate(definition, version, strict=True)


def test_they_are_structural_and_everything_in_them_has_a_longest_length(definition: dict[str, Any]):
    schema = schema_of(definition)
    assert list(structural.problems(schema)) == []
    assert list(structural.unbounded(schema)) == []


SPEC = ("properties", "spec")
SCALING = (*SPEC, "properties", "scaling")


@pytest.mark.parametrize(
    ("at", "change", "message"),
    [
        (SPEC, {"type": None}, "$.spec: has no type"),
        ((), {"additionalProperties": {"type": "string"}}, "at the root"),
        (SCALING, {"additionalProperties": {"type": "string"}}, "beside properties"),
        (SCALING, {"anyOf": [{"type": "object"}]}, "type below anyOf"),
        (SCALING, {"x-kubernetes-validations": [{"rule": "true", "message": "no", "fieldPath": ".x"}]}, "about .x"),
        (SCALING, {"required": ["nothing"]}, "requires nothing"),
        (SCALING, {"nulable": True}, "not known"),
        ((*SPEC, "properties", "traffic"), {"x-kubernetes-list-map-keys": []}, "belong together"),
        ((*SPEC, "properties", "traffic"), {"x-kubernetes-list-map-keys": ["wait"]}, "the key wait"),
        ((*SPEC, "properties", "traffic"), {"items": None}, "no schema"),
        ((*SPEC, "properties", "traffic"), {"x-kubernetes-list-type": "set"}, "a set of"),
        ((*SPEC, "properties", "model", "properties", "name"), {"pattern": "(?!x)"}, "RE2"),
        ((*SPEC, "properties", "aggregated", "properties", "cpu"), {"type": "string"}, "int-or-string"),
    ],
)
def test_the_check_of_structure_sees_what_is_wrong(at: tuple[str, ...], change: dict[str, Any], message: str):
    schema = copy.deepcopy(schema_of(DEFINITIONS["inferenceservices.yaml"]))
    there = schema
    for step in at:
        there = there[step]
    there.update(change)
    if there.get("type", 1) is None:
        del there["type"]
    assert any(message in each for each in structural.problems(schema))


def described(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """(path, description) of everything in it."""
    for name, each in schema.get("properties", {}).items():
        if (path, name) != ("", "metadata"):
            yield f"{path}.{name}", each.get("description", "")
            yield from described(each, f"{path}.{name}")
    for below in ("items", "additionalProperties"):
        if isinstance(schema.get(below), dict):
            yield from described(schema[below], path + "[]")


def test_everything_is_described_in_the_names_that_people_write(definition: dict[str, Any]):
    found = dict(described(schema_of(definition)))
    assert [path for path, text in found.items() if not text] == []
    pythonic = {path: text for path, text in found.items() if re.search(r"'\w+_\w+'", text)}
    assert set(pythonic) <= {".spec.engine.image"}, "a setting of the operator"


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema in it."""
    yield path, schema
    for name, each in schema.get("properties", {}).items():
        yield from nodes(each, f"{path}.{name}")
    for below in ("items", "additionalProperties"):
        if isinstance(schema.get(below), dict):
            yield from nodes(schema[below], path + "[]")


def test_each_default_is_by_itself_what_its_schema_and_rules_allow(definition: dict[str, Any]):
    """A real API server refuses definitions with others; it fills nothing in before it looks."""
    found = 0
    for path, schema in nodes(schema_of(definition)):
        if "default" in schema:
            found += 1
            assert list(cel.wrong(schema["default"], cel.MISSING, Schema(schema))) == [], path
            assert schema_validator(schema).is_valid(schema["default"]), path
            for name, each in schema.get("properties", {}).items():
                assert ("default" in each) <= (name in schema["default"]), f"{path}.{name}"
    assert found > 10


def test_columns_and_paths_lead_to_fields_that_there_are(definition: dict[str, Any]):
    version = definition["spec"]["versions"][0]
    scale = version["subresources"].get("scale", {})
    paths = [each["jsonPath"] for each in version["additionalPrinterColumns"]]
    types = {each["jsonPath"]: each["type"] for each in version["additionalPrinterColumns"]}
    for path in [*paths, *scale.values()]:
        if path.startswith(".metadata"):
            continue
        schema = schema_of(definition)
        for name in re.sub(r"\[\?[^]]*]", ".[]", path).split(".")[1:]:
            schema = schema["items"] if name == "[]" else schema["properties"][name]
        assert schema["type"] == types.get(path, schema["type"])
    assert version["subresources"]["status"] == {}
    names = [each["name"] for each in version["additionalPrinterColumns"]]
    assert {"Ready", "Reason", "Age"} < set(names)
    assert (definition["spec"]["names"]["kind"] == "InferenceService") == bool(scale)


def test_rules_are_cel_and_no_two_kinds_of_part_are_without_theirs():
    rules = [rule for each in RULES.values() for rule in each] + [NAMED]
    for rule in rules:
        cel.compiled(rule.cel)
    written = str([schema_of(each) for each in DEFINITIONS.values()])
    assert all(repr(rule.message)[1:-1] in written or rule.message in written for rule in rules)


def test_short_names_are_different_ones():
    short = [name for each in DEFINITIONS.values() for name in each["spec"]["names"]["shortNames"]]
    assert len(set(short)) == len(short) == 2
    assert {each["spec"]["names"]["categories"][0] for each in DEFINITIONS.values()} == {"helios"}
