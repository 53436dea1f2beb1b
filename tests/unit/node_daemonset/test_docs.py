"""docs/kubernetes.md: every YAML on it is one that Kubernetes or the chart takes; what it names is there."""

from __future__ import annotations

import re
from typing import Any

import kubernetes_validate
import pytest
import yaml

from csi import attributes
from helios.cli.main import COMMANDS
from helios.config import Config
from helios.node_labels import cached_key
from tests.support.chart import DAEMONSET, ROOT, Chart
from tests.unit.node_daemonset.test_chart import VERSIONS

PAGE = (ROOT / "docs" / "kubernetes.md").read_text()
BLOCKS = [list(yaml.safe_load_all(text)) for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]
OBJECTS = [each for block in BLOCKS for each in block if "apiVersion" in each]
VALUES = [each for block in BLOCKS for each in block if "apiVersion" not in each]
DRIVER = "csi.helios.dev"


@pytest.mark.parametrize("version", VERSIONS)
def test_objects_on_the_page_are_ones_that_kubernetes_takes(version: str):
    kinds = set()
    for each in OBJECTS:
        kinds.add(each["kind"])
        if each["kind"] != "Kustomization":
            kubernetes_validate.validate(each, version, strict=True)
    assert kinds == {"Pod", "StorageClass", "PersistentVolumeClaim", "Kustomization"}


@pytest.mark.parametrize("number", range(len(VALUES)))
def test_values_on_the_page_are_ones_that_the_chart_takes(chart: Chart, number: int):
    assert len(VALUES) == 5
    assert chart.objects(VALUES[number])


def test_the_small_registry_of_the_page_is_one_that_the_chart_takes(chart: Chart):
    (text,) = re.findall(r"A registry for a try: `(registry: .*?)`,", PAGE)
    (stateful,) = [each for each in chart.objects(VALUES[0] | yaml.safe_load(text)) if each["kind"] == "StatefulSet"]
    assert stateful["spec"]["replicas"] == 1
    assert stateful["spec"]["volumeClaimTemplates"]


def attribute_sets() -> list[dict[str, Any]]:
    found = []
    for each in OBJECTS:
        if each["kind"] == "StorageClass":
            assert each["provisioner"] == DRIVER
            found.append(each["parameters"])
        for volume in each["spec"].get("volumes", []) if each["kind"] == "Pod" else []:
            if "csi" in volume:
                assert volume["csi"]["driver"] == DRIVER
                found.append(volume["csi"]["volumeAttributes"])
    return found


def test_volumes_on_the_page_are_ones_that_the_driver_takes():
    read = [attributes.read(each, where="the page") for each in attribute_sets()]
    assert [each.form for each in read] == ["model", "model", "hub", "model"]
    assert {str(each.repo) for each in read} == {"models/org/name"}


def test_the_label_on_the_page_is_the_one_of_the_model_that_its_pod_mounts():
    (pod,) = [each for each in OBJECTS if each.get("metadata", {}).get("name") == "near-its-model"]
    terms = pod["spec"]["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    (expression,) = terms[0]["preference"]["matchExpressions"]
    mounted = attributes.read(pod["spec"]["volumes"][0]["csi"]["volumeAttributes"], where="the page")
    assert mounted.commit is not None
    assert expression["key"] == cached_key(mounted.repo, mounted.commit)


def test_pods_and_claims_on_the_page_fit_together():
    classes = {each["metadata"]["name"] for each in OBJECTS if each["kind"] == "StorageClass"}
    claims = {each["metadata"]["name"]: each for each in OBJECTS if each["kind"] == "PersistentVolumeClaim"}
    assert {claim["spec"]["storageClassName"] for claim in claims.values()} <= classes
    for pod in (each for each in OBJECTS if each["kind"] == "Pod"):
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        for container in pod["spec"]["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
            paths = {mount["mountPath"] for mount in container["volumeMounts"]}
            for variable in container.get("env", []):
                assert not variable["value"].startswith("/") or variable["value"] in paths
        for volume in volumes.values():
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims


def test_the_kustomization_on_the_page_replaces_images_of_the_manifests():
    (own,) = [each for each in OBJECTS if each["kind"] == "Kustomization"]
    base = yaml.safe_load((DAEMONSET / "manifests" / "kustomization.yaml").read_text())
    assert [each["name"] for each in own["images"]] == [each["name"] for each in base["images"]]


def test_alerts_values_commands_and_files_on_the_page_are_there():
    alerts = (DAEMONSET / "chart" / "alerts.yaml").read_text()
    for name in re.findall(r"`(Helios\w+)`", PAGE):
        assert f"alert: {name}\n" in alerts, name
    values = yaml.safe_load((DAEMONSET / "chart" / "values.yaml").read_text())
    sections = "|".join(values)
    for dotted in re.findall(rf"`((?:{sections})\.[\w.]+)`", PAGE):
        if dotted.endswith(".yaml"):  # a file
            continue
        here: Any = values
        dotted, _, setting = dotted.partition(".config.")
        for part in dotted.split("."):
            assert part in here, dotted
            here = here[part]
        # Below ``config`` are the program's settings; a worker's are of several sections.
        its: Any = Config() if dotted == "worker" else getattr(Config(), dotted, None)
        for part in filter(None, setting.split(".")):
            assert hasattr(its, part), f"{dotted}.config.{setting}"
            its = getattr(its, part)
    for command in re.findall(r"`helios (\w+)", PAGE):
        assert command in COMMANDS, command
    for path in re.findall(r"node-daemonset/[\w./-]+\w", PAGE):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\(([\w-]+\.md)", PAGE):
        assert (ROOT / "docs" / link).exists(), link


def test_anchors_on_the_page_are_headings_of_the_pages_that_they_lead_to():
    for page, anchor in re.findall(r"\]\(([\w-]*(?:\.md)?)#([\w-]+)\)", PAGE):
        text = PAGE if not page else (ROOT / "docs" / page).read_text()
        titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
        assert anchor in anchors, f"{page}#{anchor}"
