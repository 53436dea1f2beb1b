"""docs/operator.md: its resources are ones that can be written, and what it says is made is what is made."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from orchestrator.api.parse import model_spec, service_spec
from orchestrator.reconcile import model, rollout, service, service_status
from orchestrator.reconcile.kinds import INFERENCE_SERVICE, MODEL
from orchestrator.reconcile.observed import Answer, Wanted
from orchestrator.reconcile.reconcilers import Models, Services
from tests.support.kube_schemas import validate
from tests.support.reconciled import Cluster, Known, settle
from tests.unit.orchestrator.reconcile.test_objects import ALL

PAGE = (Path(__file__).parents[4] / "docs" / "operator.md").read_text()
RESOURCES = [
    one for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) for one in yaml.safe_load_all(text) if one
]


@pytest.mark.parametrize("resource", RESOURCES, ids=lambda one: one["metadata"]["name"])
def test_resources_on_the_page_are_ones_that_can_be_written_and_that_come_up(resource: dict):
    if resource["kind"] == "Model":
        assert model_spec(resource)
        return
    assert service_spec(resource)
    cluster, known = Cluster(), Known()
    cluster.check = validate
    (its_model,) = [one for one in RESOURCES if one["kind"] == "Model"]
    cluster.put(MODEL, its_model)
    known.answers[its_model["spec"]["source"]["repo"], "main"] = Answer("a" * 40, 1.0)
    known.by_role = {role: Wanted(1) for role in ("both", "prefill", "decode")}
    settle(cluster, Models(ALL, known, known), "llama", 1000.0)
    cluster.put(INFERENCE_SERVICE, resource)
    settle(cluster, Services(ALL, known), resource["metadata"]["name"], 1000.0)
    found = cluster.get(INFERENCE_SERVICE, "models", resource["metadata"]["name"])
    assert found is not None
    assert {one["type"]: one["status"] for one in found["status"]["conditions"]}["Ready"] == "True"


def test_every_kind_that_is_made_is_on_the_page():
    table = PAGE.split("## What is made")[1].split("- **Pods**")[0]
    for kind in (*service.OWNS, *model.OWNS):
        assert kind.kind in table, kind


def test_every_condition_and_every_word_that_is_told_is_on_the_page():
    said = PAGE.split("## What is the case")[1]
    for word in (*service_status.TOLD, *model.TOLD):
        assert f"`{word}`" in said, word
    source = Path(rollout.__file__).read_text() + Path(service.__file__).read_text() + Path(model.__file__).read_text()
    for word in re.findall(r'(?:Note|Emit)\("\w+", "(\w+)"', source):
        assert f"`{word}`" in said, word


def test_the_time_until_routers_have_heard_is_on_the_page():
    assert rollout.HEARD_S == 10
    assert "ten seconds later" in PAGE
