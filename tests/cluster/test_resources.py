"""The operator's resources at a real API server: what the fake and the types say of them is what it does.

The tables are those of tests/unit/orchestrator/test_admission.py; here Kubernetes' own code decides.
"""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException

from helios.kube.kinds import Kind
from orchestrator.api import parse
from orchestrator.api.rules import NAMED, RULES
from tests.support.control_plane import ControlPlane, assets
from tests.unit.orchestrator.test_admission import ADMISSION, BAD, COMMIT, GOOD, model, named, service

CRDS = Path(__file__).parents[2] / "node-daemonset" / "chart" / "crds"
MANIFESTS = Path(__file__).parents[2] / "node-daemonset" / "manifests"
NAMESPACE = "models"
RULES_SAY = "\n".join([rule.message for rules in RULES.values() for rule in rules] + [NAMED.message])
KINDS = {
    "Model": Kind("helios.dev", "v1alpha1", "Model", "models"),
    "InferenceService": Kind("helios.dev", "v1alpha1", "InferenceService", "inferenceservices"),
}
ACCOUNT = "system:serviceaccount:helios:helios-operator"


class Api:
    """The administrator's requests, as they are."""

    def __init__(self, plane: ControlPlane, root: Path) -> None:
        self.kubeconfig = plane.kubeconfig(root / "admin")
        self._cache = root / "cache"
        self.client = config.new_client_from_config(str(self.kubeconfig))

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        """Raises ApiException."""
        sent = {"Accept": "application/json", "Content-Type": "application/json", **headers}
        return self.client.call_api(
            path, method, header_params=sent, body=body, auth_settings=["BearerToken"], _return_http_data_only=True,
            response_types_map={200: "object", 201: "object"},
        )  # fmt: skip

    def create(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """The object as it would be stored: nothing is."""
        path = KINDS[manifest["kind"]].path(NAMESPACE)
        return self.call("POST", f"{path}?dryRun=All&fieldValidation=Strict", in_namespace(manifest))

    def kubectl(self, *words: str) -> str:
        """With nothing remembered: what it knows of kinds may be older than the definitions."""
        shutil.rmtree(self._cache, ignore_errors=True)
        program = shutil.which("kubectl", path=str(assets())) or "kubectl"
        command = [program, "--kubeconfig", str(self.kubeconfig), "--cache-dir", str(self._cache)]
        command += ["--namespace", NAMESPACE, *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout


def in_namespace(manifest: dict[str, Any]) -> dict[str, Any]:
    found = copy.deepcopy(manifest)
    found["metadata"]["namespace"] = NAMESPACE
    return found


@pytest.fixture(scope="module")
def api(cluster: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Api:
    api = Api(cluster, tmp_path_factory.mktemp("resources"))
    for name in (NAMESPACE, "helios"):
        client.CoreV1Api(api.client).create_namespace({"metadata": {"name": name}})
    api.kubectl("apply", "--server-side", "--filename", str(CRDS))
    names = [f"crd/{kind.resource}" for kind in KINDS.values()]
    api.kubectl("wait", "--for=condition=Established", "--timeout=60s", *names)
    return api


@pytest.mark.parametrize("manifest", GOOD)
def test_what_may_be_written_is_stored_as_the_fake_stores_it(api: Api, manifest: dict[str, Any]):
    stored = api.create(manifest)
    assert stored["spec"] == ADMISSION[manifest["kind"]].admit(manifest)["spec"]


@pytest.mark.parametrize(("manifest", "field", "message"), BAD)
def test_what_may_not_is_refused_with_its_field(api: Api, manifest: dict[str, Any], field: str, message: str):
    with pytest.raises(ApiException) as refused:
        api.create(manifest)
    said = json.loads(refused.value.body)["message"]
    assert refused.value.status in (400, 422)
    assert field in said
    if message in RULES_SAY:
        assert message in said


def test_a_model_keeps_its_repository_and_its_status_is_a_thing_of_its_own(api: Api):
    path = KINDS["Model"].path(NAMESPACE)
    api.call("POST", path, in_namespace(named(model(), "kept")))
    with pytest.raises(ApiException, match="repo can't be changed"):
        api.call("PATCH", f"{path}/kept", {"spec": {"source": {"repo": "org/other"}}}, **MERGE)
    ready = {"type": "Ready", "status": "True", "reason": "Served", "message": "", "lastTransitionTime": STAMP}
    status = {"commit": COMMIT, "shortCommit": COMMIT[:12], "conditions": [ready]}
    head = {"apiVersion": "helios.dev/v1alpha1", "kind": "Model", "metadata": {"name": "kept"}}
    manager = "fieldManager=helios-operator&force=true"
    api.call("PATCH", f"{path}/kept/status?{manager}", {**head, "status": status}, **APPLY)
    found = api.call("GET", f"{path}/kept")
    assert parse.model_status(found).short_commit == COMMIT[:12]
    assert found["spec"]["source"]["repo"] == "org/name"
    version = found["metadata"]["resourceVersion"]
    again = api.call("PATCH", f"{path}/kept/status?{manager}", {**head, "status": status}, **APPLY)
    assert again["metadata"]["resourceVersion"] == version, "the same again is no write"
    lines = api.kubectl("get", "helios").splitlines()
    assert lines[0].split() == ["NAME", "REPO", "REVISION", "COMMIT", "READY", "REASON", "AGE"]
    assert lines[1].split()[1:6] == ["org/name", "main", COMMIT[:12], "True", "Served"]


MERGE = {"Content-Type": "application/merge-patch+json"}
APPLY = {"Content-Type": "application/apply-patch+yaml"}
STAMP = "2026-01-01T00:00:00Z"


def test_kubectl_scale_says_how_many_and_not_more_than_there_may_be(api: Api):
    path = KINDS["InferenceService"].path(NAMESPACE)
    api.call("POST", path, in_namespace(named(service(), "kept")))
    with pytest.raises(ApiException, match="does not exist"):
        api.call("GET", f"{path}/kept/scale")
    api.kubectl("scale", "hsvc/kept", "--replicas=3")
    assert api.call("GET", f"{path}/kept")["spec"]["replicas"] == 3
    assert api.call("GET", f"{path}/kept/scale")["spec"]["replicas"] == 3
    with pytest.raises(AssertionError, match=r"replicas is more than scaling\.maxReplicas"):
        api.kubectl("scale", "hsvc/kept", "--replicas=5")
    api.call("PATCH", f"{path}/kept", {"spec": {"replicas": None}}, **MERGE)
    assert "replicas" not in api.call("GET", f"{path}/kept")["spec"]


def test_every_field_is_explained(api: Api):
    said = api.kubectl("explain", "inferenceservice.spec.scaling")
    assert "How many workers there are, and who decides it." in said
    assert "minReplicas" in said


def test_the_operator_may_do_what_its_role_says(api: Api):
    for each in yaml.safe_load_all((MANIFESTS / "operator.yaml").read_text()):
        if each["apiVersion"].startswith("rbac.authorization.k8s.io") or each["kind"] == "ServiceAccount":
            group = "api/v1" if each["apiVersion"] == "v1" else f"apis/{each['apiVersion']}"
            namespace = each["metadata"].get("namespace")
            place = f"/namespaces/{namespace}" if namespace else ""
            api.call("POST", f"/{group}{place}/{each['kind'].lower()}s", each)

    def may(verb: str, group: str, resource: str, namespace: str = NAMESPACE, **more: str) -> bool:
        asked = {"verb": verb, "group": group, "resource": resource, "namespace": namespace, **more}
        body = {"spec": {"user": ACCOUNT, "resourceAttributes": asked}}
        review = "/apis/authorization.k8s.io/v1/subjectaccessreviews"
        return bool(api.call("POST", review, body)["status"]["allowed"])

    assert may("patch", "apps", "deployments")
    assert may("patch", "helios.dev", "models", subresource="status")
    assert may("list", "security.istio.io", "peerauthentications")
    assert may("update", "coordination.k8s.io", "leases", "helios", name="helios-operator")
    assert not may("patch", "security.istio.io", "peerauthentications")
    assert not may("update", "coordination.k8s.io", "leases", "helios", name="another")
    assert not may("get", "", "secrets")
    assert not may("delete", "helios.dev", "models")
    assert not may("create", "rbac.authorization.k8s.io", "roles")
