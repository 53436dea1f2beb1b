"""What the operator makes for Istio, KEDA and gateways, and what the docs show for them, at those projects' own
definitions in a real API server: no field that they don't know, no value that they or their rules refuse.

``OTHERS_CRDS`` is a directory with the definitions, one or more in a file, as the projects publish them: istio/api
``kubernetes/customresourcedefinitions.gen.yaml``, kedacore/keda ``config/crd/bases``, gateway-api
``config/crd/standard``, gateway-api-inference-extension ``config/crd/bases``.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException

from orchestrator.reconcile.kinds import INFERENCE_POOL, ISTIO, SCALED_OBJECT
from tests.support.control_plane import ControlPlane
from tests.unit.orchestrator.reconcile.test_objects import ALL, SPECS, made

NAMESPACE = "models"
PAGES = Path(__file__).parents[2] / "docs"
TLS = msgspec.structs.replace(ALL, mesh="permissive", scaler_tls=True, keda_authentication="helios-scaler")
PLURALS = {kind.kind: kind.plural for kind in (*ISTIO, INFERENCE_POOL, SCALED_OBJECT)} | {"HTTPRoute": "httproutes"}
HEADERS = {"Accept": "application/json", "Content-Type": "application/json"}


class Others:
    def __init__(self, plane: ControlPlane, root: Path) -> None:
        self._client = config.new_client_from_config(str(plane.kubeconfig(root / "admin")))
        client.CoreV1Api(self._client).create_namespace({"metadata": {"name": NAMESPACE}})

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Raises ApiException."""
        return self._client.call_api(
            path, "POST", header_params=dict(HEADERS), body=body, auth_settings=["BearerToken"],
            _return_http_data_only=True, response_types_map={201: "object"},
        )  # fmt: skip

    def takes(self, manifest: dict[str, Any]) -> None:
        """It would be stored, as it is."""
        path = f"/apis/{manifest['apiVersion']}/namespaces/{NAMESPACE}/{PLURALS[manifest['kind']]}"
        manifest = {**manifest, "metadata": {**manifest["metadata"], "namespace": NAMESPACE}}
        try:
            self.post(f"{path}?dryRun=All&fieldValidation=Strict", manifest)
        except ApiException as refused:
            pytest.fail(f"{manifest['kind']}: {json.loads(refused.body)['message']}")


@pytest.fixture(scope="module")
def others(cluster: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Others:
    where = os.environ.get("OTHERS_CRDS", "")
    if not where:
        pytest.skip("OTHERS_CRDS names no directory with the definitions of Istio, KEDA and the Gateway API")
    found = Others(cluster, tmp_path_factory.mktemp("others"))
    there = client.ApiextensionsV1Api(found._client)
    for file in sorted(Path(where).glob("*.yaml")):
        for each in yaml.safe_load_all(file.read_text()):
            if each and each["kind"] == "CustomResourceDefinition" and each["spec"]["names"]["kind"] in PLURALS:
                found.post("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", each)
    for _ in range(600):
        kinds = there.list_custom_resource_definition().items
        ready = {
            one.spec.names.kind for one in kinds
            if any(c.type == "Established" and c.status == "True" for c in one.status.conditions or ())
        }  # fmt: skip
        if ready == set(PLURALS):
            return found
    pytest.fail(f"not established: {set(PLURALS) - ready}")


def shown() -> Iterator[dict[str, Any]]:
    """Those of our kinds on pages of the docs."""
    for page in sorted(PAGES.glob("*.md")):
        for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            with_kinds = [one for one in yaml.safe_load_all(block.replace("…", "")) if isinstance(one, dict)]
            yield from (one for one in with_kinds if one.get("kind") in PLURALS)


@pytest.mark.parametrize("name", SPECS)
def test_what_the_operator_makes_is_what_they_take(name: str, others: Others):
    seen = set()

    def check(manifest: dict[str, Any]) -> None:
        if manifest["kind"] in PLURALS:
            seen.add(manifest["kind"])
            others.takes(manifest)

    for site, scaling in itertools.product((ALL, TLS), ({}, {"by": "KEDA", "minReplicas": 0})):
        made(site, check=check, **{**SPECS[name], **({"scaling": scaling} if scaling else {})})
    assert seen == set(PLURALS) - {"HTTPRoute"}


def test_what_the_docs_show_is_what_they_take(others: Others):
    manifests = list(shown())
    assert {one["kind"] for one in manifests} >= {"InferencePool", "HTTPRoute", "DestinationRule"}
    for one in manifests:
        others.takes(one)
