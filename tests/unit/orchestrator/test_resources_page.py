"""docs/operator-resources.md: its examples are ones that the definitions take, and it has every field."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.api import parse
from orchestrator.api.crds import definitions
from orchestrator.api.rules import RULES
from tests.support.admission import Admission

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "operator-resources.md").read_text()
EXAMPLES = [each for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) for each in yaml.safe_load_all(text)]
DEFINITIONS = list(definitions().values())
ADMISSION = {each["spec"]["names"]["kind"]: Admission(each) for each in DEFINITIONS}


@pytest.mark.parametrize("manifest", EXAMPLES, ids=lambda each: f"{each['kind']} {each['metadata']['name']}")
def test_examples_are_ones_that_the_definitions_take_and_the_operator_reads(manifest: dict[str, Any]):
    stored = ADMISSION[manifest["kind"]].admit(manifest)
    {"Model": parse.model_spec, "InferenceService": parse.service_spec}[manifest["kind"]](stored)
    assert manifest["apiVersion"] == "helios.dev/v1alpha1"


def test_services_of_the_examples_name_models_of_the_examples():
    models = {each["metadata"]["name"] for each in EXAMPLES if each["kind"] == "Model"}
    services = [each for each in EXAMPLES if each["kind"] == "InferenceService"]
    assert {each["spec"]["model"]["name"] for each in services} <= models
    assert len(services) == 3


def test_every_field_is_on_the_page():
    def names(schema: dict[str, Any]) -> set[str]:
        found = set(schema.get("properties", {}))
        below = [*schema.get("properties", {}).values(), schema.get("items"), schema.get("additionalProperties")]
        return found.union(*(names(each) for each in below if isinstance(each, dict)))

    for definition in DEFINITIONS:
        schema = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
        for part in ("spec", "status"):
            for name in names(schema["properties"][part]):
                assert f"| `{name}` |" in PAGE


def test_what_the_page_quotes_is_said():
    (message,) = re.findall(r"is invalid: spec\.decode: Required value: (.*)", PAGE)
    assert message in {rule.message for rules in RULES.values() for rule in rules}
    short = [name for each in DEFINITIONS for name in each["spec"]["names"]["shortNames"]]
    assert f"Short names: `{short[0]}` and `{short[1]}`" in PAGE
    for line, definition in zip(re.findall(r"^NAME .*", PAGE, re.MULTILINE), DEFINITIONS, strict=True):
        columns = definition["spec"]["versions"][0]["additionalPrinterColumns"]
        assert line.split()[1:] == [each["name"].upper() for each in columns if not each["priority"]]


def test_links_lead_to_pages_and_headings_that_there_are():
    for page, anchor in re.findall(r"\]\(([\w-]*(?:\.md)?)#([\w-]+)\)", PAGE):
        text = PAGE if not page else (ROOT / "docs" / page).read_text()
        titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        assert anchor in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, anchor
