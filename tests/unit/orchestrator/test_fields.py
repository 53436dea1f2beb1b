"""No field of a resource is there for nothing: what may be said is read, what is shown is set."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from orchestrator.api.common import EnvironmentVariable, Part, Toleration
from orchestrator.api.crds import definitions
from orchestrator.api.model import ModelSpec, ModelStatus
from orchestrator.api.service import ServiceSpec, ServiceStatus

ROOT = Path(__file__).parents[3]
PASSED_ON = (EnvironmentVariable, Toleration)
"""Go into pods as they are."""


def parts(kind: type[Part]) -> set[type[Part]]:
    """The part and all below it."""
    found = {kind}
    for hint in get_type_hints(kind).values():
        for below in _parts_in(hint):
            found |= parts(below)
    return found


def _parts_in(hint: Any) -> Iterator[type[Part]]:
    if isinstance(hint, type) and issubclass(hint, Part):
        yield hint
    for each in get_args(hint):
        yield from _parts_in(each)


def code() -> list[ast.AST]:
    """Of the operator, but for the resources themselves."""
    files = [file for file in (ROOT / "orchestrator").rglob("*.py") if file.parent.name != "api"]
    return [node for file in files for node in ast.walk(ast.parse(file.read_text()))]


NODES = code()


def fields(kind: type[Part], but: Iterable[type[Part]] = ()) -> set[tuple[str, str]]:
    return {(each.__name__, name) for each in parts(kind) - set(but) for name in each.__struct_fields__}


@pytest.mark.parametrize("spec", [ModelSpec, ServiceSpec])
def test_whatever_may_be_said_is_read(spec: type[Part]) -> None:
    read = {node.attr for node in NODES if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    read |= {node.value for node in NODES if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert {field for field in fields(spec, PASSED_ON) if field[1] not in read} == set()


@pytest.mark.parametrize("status", [ModelStatus, ServiceStatus])
def test_whatever_is_shown_is_set(status: type[Part]) -> None:
    said = {node.arg for node in NODES if isinstance(node, ast.keyword)}
    positional = {"type", "status", "reason", "message", "commit", "weight", "ready", "since", "last_transition_time"}
    assert {field for field in fields(status) if field[1] not in said | positional} == set()


def test_columns_and_the_scale_subresource_are_of_fields_that_there_are() -> None:
    for definition in definitions().values():
        (version,) = definition["spec"]["versions"]
        schema = version["schema"]["openAPIV3Schema"]
        paths = [column["jsonPath"] for column in version["additionalPrinterColumns"]]
        paths += version["subresources"].get("scale", {}).values()
        for path in paths:
            below = schema
            for step in path.split("[", 1)[0].lstrip(".").split("."):
                if step == "metadata":
                    break
                below = below["properties"][step]
