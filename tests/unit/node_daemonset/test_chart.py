"""The chart: valid for several Kubernetes versions, with few rights; values that can't be are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import kubernetes_validate
import pytest
import yaml

from orchestrator.api.crds import definitions
from tests.support.chart import DAEMONSET, ROOT, Chart, Refused
from tests.support.manifests import containers, pods, settings
from tests.unit.node_daemonset.conftest import IMAGES, VALUES

VERSIONS = ("1.28", "1.31", "1.34", "1.37")
"""The oldest that the chart takes (Chart.yaml), the newest that the schemas know, and two between."""
OPERATOR = ("PodMonitor", "ServiceMonitor", "PrometheusRule")
PRIVILEGED = {"keeper", "worker", "driver"}

Objects = list[dict[str, Any]]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_one_that_kubernetes_takes(objects: Objects, version: str):
    for each in objects:
        if each["kind"] not in OPERATOR:
            kubernetes_validate.validate(each, version, strict=True)


def test_plain_manifests_are_ones_that_kubernetes_takes():
    seen = 0
    for path in sorted((DAEMONSET / "manifests").glob("*.yaml")):
        if path.name in ("kustomization.yaml", "values.yaml"):
            continue
        for each in yaml.safe_load_all(path.read_text()):
            if each["kind"] not in OPERATOR:
                kubernetes_validate.validate(each, VERSIONS[-1], strict=True)
                kubernetes_validate.validate(each, VERSIONS[0], strict=True)
                seen += 1
    assert seen > 30


def test_what_is_generated_is_up_to_date(chart: Chart):
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "chart.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_kustomization_brings_files_that_there_are_and_names_their_images():
    found = yaml.safe_load((DAEMONSET / "manifests" / "kustomization.yaml").read_text())
    text = "".join((DAEMONSET / "manifests" / name).read_text() for name in found["resources"])
    for image in found["images"]:
        assert f"image: {image['name']}:{image['newTag']}\n" in text


def test_helm_itself_finds_nothing_to_complain_of(chart: Chart):
    code = "import helm_python, json, sys; _, path, values = sys.argv; "
    code += "print(json.dumps(helm_python.lint(path, json.loads(values), strict=True)))"
    command = [sys.executable, "-c", code, str(DAEMONSET / "chart"), json.dumps(VALUES["everything"])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    complaints = [each for each in report["messages"] if each["severity"] > 1]
    assert (complaints, report["errors"]) == ([], [])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"images": {"repository": ""}}, "images.repository is missing"),
        ({"registryUrls": []}, "registryUrls is empty and registry.enabled is false"),
        ({"registryUrls": ["http://me:secret@registry.example"]}, "/registryUrls/0"),
        ({"wroker": {}}, "wroker"),
        ({"worker": {"config": {"mount": {"pool_mb": 3}}}}, "pool_mb"),
        ({"worker": {"config": {"mount": {"mode": "fast"}}}}, "/worker/config/mount/mode"),
        ({"router": {"config": {"admission": {"queue": {"per_worker": "many"}}}}}, "per_worker"),
        ({"registry": {"config": {"tenants": {"acme": {"own": ["acme/*"]}}}}}, "own"),
        (
            {"worker": {"config": {"mount": {"cache": "/c"}}}},
            "mount.cache is said by worker.tiers.l1.path",
        ),
        ({"router": {"enabled": True, "config": {"discovery": {"resolve": False}}}}, "is said by router.resolve"),
        ({"priorityClass": {"create": False}}, "priorityClass.name is empty"),
        ({"csi": {"authorise": "node"}}, "/csi/authorise"),
        ({"csi": {"driver": "CSI_driver"}}, "/csi/driver"),
        ({"csi": {"startupTaint": "helios.dev/agent-not-ready:NoExecute"}}, "/csi/startupTaint"),
        ({"csi": {"nodeLabels": "yes"}}, "/csi/nodeLabels"),
        ({"node": {"root": "var/lib/helios"}}, "/node/root"),
        ({"node": {"root": "/var/lib/" + "x" * 60}}, "/node/root"),
        ({"worker": {"port": 0}}, "/worker/port"),
        ({"worker": {"resources": {"limit": {}}}}, "limit"),
        ({"storageClasses": [{"name": "a"}]}, "model"),
        ({"sidecars": {"registrar": "registry.example/registrar"}}, "/sidecars/registrar"),
        ({"registry": {"enabled": True, "store": "s3://b"}}, "registry.database is empty"),
        ({"registry": {"enabled": True, "database": "postgresql://db/helios"}}, "registry.store is empty"),
        ({"registry": {"enabled": True, "replicas": 1}}, "registry.home.persistent=true"),
        (
            {"registry": {"enabled": True, "store": "/store", "database": "postgresql://db/helios"}},
            "registry.storeClaim is empty",
        ),
        ({"router": {"enabled": True, "workers": {"slices": "", "pods": ""}}}, "both empty"),
        ({"operator": {"namespace": "Models"}}, "/operator/namespace"),
        ({"operator": {"writes": {"linkerd": True}}}, "linkerd"),
        ({"operator": {"config": {"worker": 3}}}, "worker"),
        ({"operator": {"enabled": True, "config": {"lease_name": "a"}}}, "lease_name is said by the chart"),
        (
            {"operator": {"enabled": True, "config": {"signals": {"scaler_listen": "a:1"}}}},
            "is said by operator.scaler",
        ),
        (
            {"operator": {"enabled": True, "externalMetrics": {"enabled": True}}},
            "operator.externalMetrics needs a certificate",
        ),
    ],
)
def test_values_that_cannot_be_are_refused_with_their_name(chart: Chart, wrong: dict[str, Any], message: str):
    with pytest.raises(Refused) as refused:
        chart.files({**VALUES["nodes-alone"], **wrong})
    assert message in str(refused.value)


def test_only_what_mounts_is_privileged(objects: Objects):
    for name, pod in pods(objects):
        spec = pod["spec"]
        for container in containers(pod):
            its = container["securityContext"]
            assert its["readOnlyRootFilesystem"] is True
            if its.get("privileged"):
                assert container["name"] in PRIVILEGED
                assert name.endswith(("keeper", "worker", "csi-node"))
                continue
            assert its["allowPrivilegeEscalation"] is False
            assert its["capabilities"] == {"drop": ["ALL"]}
            root = its.get("runAsUser") == 0
            assert root == name.endswith(("keeper", "csi-node")), (
                "beside what mounts: sockets and directories of root's"
            )
            if not root:
                assert spec["securityContext"]["runAsNonRoot"] is True
                assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert "hostNetwork" not in spec
        assert spec["enableServiceLinks"] is False, "a Service's variables would be read as settings"


def test_mounts_propagate_to_the_node_only_where_something_is_mounted(objects: Objects):
    found = {
        (name.rpartition("helios-")[2], mount["name"])
        for name, pod in pods(objects)
        for container in containers(pod)
        for mount in container["volumeMounts"]
        if mount.get("mountPropagation") == "Bidirectional"
    }
    assert found in ({("keeper", "mounts"), ("csi-node", "kubelet")}, set())


def test_every_container_has_requests_and_a_limit_of_memory(objects: Objects):
    for _, pod in pods(objects):
        for container in containers(pod):
            assert {"cpu", "memory"} <= set(container["resources"]["requests"]), container["name"]
            assert "memory" in container["resources"]["limits"]


def test_registry_and_router_have_by_default_what_they_are_sized_for(chart: Chart):
    objects = chart.objects(VALUES["no-nodes"] | {"router": {"enabled": True}})
    sizes = {name: pod["spec"]["containers"][0]["resources"] for name, pod in pods(objects)}
    assert sizes["helios-registry"] == {
        "requests": {"cpu": "2", "memory": "4Gi"},
        "limits": {"cpu": "4", "memory": "8Gi"},
    }
    assert sizes["helios-router"] == {
        "requests": {"cpu": "4", "memory": "8Gi"},
        "limits": {"cpu": "8", "memory": "16Gi"},
    }
    for each in objects:
        if each["kind"] in ("StatefulSet", "Deployment") and each["metadata"]["name"] in sizes.keys() - {
            "helios-operator"
        }:
            assert each["spec"]["replicas"] == 3
            apart = each["spec"]["template"]["spec"]["affinity"]["podAntiAffinity"]
            (term,) = apart["requiredDuringSchedulingIgnoredDuringExecution"]
            assert term["topologyKey"] == "kubernetes.io/hostname"
            assert term["labelSelector"] == each["spec"]["selector"]
    budgets = {
        each["metadata"]["name"]: each["spec"]["maxUnavailable"]
        for each in objects
        if each["kind"] == "PodDisruptionBudget"
    }
    assert budgets == {"helios-operator": 1, "helios-registry": 1, "helios-router": 1}


def api_tokens(pod: dict[str, Any]) -> list[str]:
    """Containers of a pod that have a token for the API server."""
    volumes = {
        volume["name"]
        for volume in pod["spec"]["volumes"]
        for source in volume.get("projected", {}).get("sources", [])
        if "audience" not in source.get("serviceAccountToken", {"audience": ""})
    }
    return [
        container["name"]
        for container in containers(pod)
        if pod["spec"]["automountServiceAccountToken"] or volumes & {m["name"] for m in container["volumeMounts"]}
    ]


def rights(objects: Objects, kind: str) -> dict[str, list[dict[str, list[str]]]]:
    return {each["metadata"]["name"]: each["rules"] for each in objects if each["kind"] == kind}


def test_only_who_asks_the_api_server_has_a_token_and_few_rights(everything: Objects):
    with_token = {name: found for name, pod in pods(everything) if (found := api_tokens(pod))}
    bound = {s["name"] for each in everything if each["kind"].endswith("RoleBinding") for s in each["subjects"]}
    asking = {f"helios-{part}" for part in ("csi-controller", "csi-node", "operator", "picker", "router")}
    assert set(with_token) == bound == asking
    assert with_token["helios-csi-node"] == ["driver"], "the registrar asks the kubelet alone"
    for each in everything:
        if each["kind"] in ("Role", "ClusterRole"):
            for rule in each["rules"]:
                assert "*" not in rule["verbs"] + rule["resources"] + rule["apiGroups"]
                assert "secrets" not in rule["resources"]
    cluster = rights(everything, "ClusterRole")
    assert set(cluster) == {"helios-csi-controller", "helios-csi-node", "helios-operator-cluster"}, "volumes, nodes"
    for name, pod in pods(everything):
        assert name not in bound or pod["spec"]["serviceAccountName"] == name


NODES = {"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "patch"]}
CSI_NODES = {"apiGroups": ["storage.k8s.io"], "resources": ["csinodes"], "verbs": ["get"]}


@pytest.mark.parametrize(
    ("csi", "rules"),
    [
        ({}, None),
        ({"nodeLabels": True}, [NODES]),
        ({"startupTaint": "helios.dev/agent-not-ready"}, [NODES, CSI_NODES]),
    ],
)
def test_the_driver_may_change_nodes_only_where_it_is_told_to(chart: Chart, csi: dict[str, Any], rules: Any):
    objects = chart.objects({**VALUES["nodes-alone"], "csi": csi})
    assert rights(objects, "ClusterRole").get("helios-csi-node") == rules
    pod = dict(pods(objects))["helios-csi-node"]
    assert api_tokens(pod) == ([] if rules is None else ["driver"])
    assert pod["spec"].get("serviceAccountName") == (None if rules is None else "helios-csi-node")
    (policy,) = (o for o in objects if o["kind"] == "NetworkPolicy" and o["metadata"]["name"] == "helios-csi-node")
    ports = {port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]}
    assert (6443 in ports) == (rules is not None)
    (driver,) = (each for each in pod["spec"]["containers"] if each["name"] == "driver")
    found = settings(driver).csi
    assert (found.node_labels, found.startup_taint) == (csi.get("nodeLabels", False), csi.get("startupTaint", ""))
    (place,) = [m["mountPath"] for m in driver["volumeMounts"] if m["name"] == "service-account"] or [None]
    assert place == (None if rules is None else found.service_account)


def test_the_nodes_pods_tolerate_the_taint_that_they_take_away(everything: Objects):
    found = {name: pod["spec"].get("tolerations", []) for name, pod in pods(everything)}
    ours = {"key": "helios.dev/agent-not-ready", "operator": "Exists"}
    gpu = {"key": "nvidia.com/gpu", "operator": "Exists"}
    for part in ("keeper", "worker", "csi-node"):
        assert found[f"helios-{part}"] == [gpu, ours]
    assert ours not in found["helios-registry"] + found["helios-router"] + found["helios-csi-controller"]


def granted(objects: Objects, name: str) -> dict[str, set[str]]:
    """``resource.group`` -> verbs, of all roles that this service account is bound to."""
    roles = {
        (each["kind"], each["metadata"]["name"]): each["rules"] for each in objects if each["kind"].endswith("Role")
    }
    found: dict[str, set[str]] = {}
    for each in objects:
        if each["kind"].endswith("RoleBinding") and name in {subject["name"] for subject in each["subjects"]}:
            for rule in roles.get((each["roleRef"]["kind"], each["roleRef"]["name"]), []):
                for group in rule["apiGroups"]:
                    for resource in rule["resources"]:
                        key = f"{resource}.{group}" if group else resource
                        found.setdefault(key, set()).update(rule["verbs"])
    return found


def test_the_operator_may_do_what_it_does_to_each_kind_and_nothing_else(chart: Chart, everything: Objects):
    """Least privilege, kind by kind: what it makes, what it only looks at, and how it tells."""
    made, seen = {"list", "watch", "create", "patch", "delete"}, {"list", "watch"}
    istio = {f"{name}.networking.istio.io" for name in ("destinationrules", "virtualservices")}
    istio |= {"peerauthentications.security.istio.io"}
    core = {"services", "pods", "persistentvolumeclaims", "persistentvolumes"}
    core |= {"deployments.apps", "poddisruptionbudgets.policy", "horizontalpodautoscalers.autoscaling"}
    core |= {"networkpolicies.networking.k8s.io"}
    usual = {
        **dict.fromkeys(core, made),
        **{key: {"list", "watch", "patch"} for key in ("models.helios.dev", "inferenceservices.helios.dev")},
        **{key: {"patch"} for key in ("models/status.helios.dev", "inferenceservices/status.helios.dev")},
        **{key: {"update"} for key in ("models/finalizers.helios.dev", "inferenceservices/finalizers.helios.dev")},
        "deployments/scale.apps": {"patch"},
        "events.events.k8s.io": {"create", "patch"},
        "leases.coordination.k8s.io": {"get", "update", "create"},
        "nodes": seen,
    }
    others = dict.fromkeys((*istio, "scaledobjects.keda.sh", "inferencepools.inference.networking.k8s.io"), seen)
    assert granted(chart.objects(VALUES["no-nodes"]), "helios-operator") == {**usual, **others}
    allowed = dict.fromkeys((*others,), made)
    routers = {"endpointslices.discovery.k8s.io": seen}
    assert granted(everything, "helios-operator") == {**usual, **others, **allowed, **routers}


def test_the_operator_reaches_no_further_than_its_namespace(chart: Chart, everything: Objects):
    def kinds(objects: Objects) -> dict[str, tuple[str, str | None]]:
        found = [o for o in objects if o["kind"] in ("Role", "ClusterRole") and "operator" in o["metadata"]["name"]]
        return {o["metadata"]["name"]: (o["kind"], o["metadata"].get("namespace")) for o in found}

    lease, cluster = ("Role", "helios"), ("ClusterRole", None)
    assert kinds(everything) == {
        "helios-operator": ("Role", "models"),
        "helios-operator-release": lease,
        "helios-operator-pickers": ("Role", "models"),
        "helios-operator-cluster": cluster,
    }
    everywhere = kinds(chart.objects(VALUES["no-nodes"]))
    assert everywhere["helios-operator"] == ("ClusterRole", None)
    (lease_role,) = [
        o for o in everything if o["metadata"]["name"] == "helios-operator-release" and o["kind"] == "Role"
    ]
    assert lease_role["rules"][0]["resourceNames"] == ["helios-operator"], "it may change no other lease"


def test_a_picker_is_in_each_namespace_and_the_operator_names_and_asks_it(chart: Chart):
    values = {
        **IMAGES,
        "node": {"enabled": False},
        "registry": {"enabled": True, "store": "s3://models/helios", "database": "postgresql://helios@db/helios"},
        "picker": {"enabled": True, "namespaces": ["models", "helios"], "demandTokens": {"secret": "sums"}},
        "operator": {"enabled": True, "writes": {"gateway": True}},
    }
    objects = chart.objects(values)
    found = [o for o in objects if o["metadata"]["labels"]["app.kubernetes.io/component"] == "picker"]
    kinds = {"ConfigMap", "ServiceAccount", "Role", "RoleBinding", "Service", "Deployment", "PodDisruptionBudget"}
    for namespace in ("models", "helios"):
        own = {o["kind"]: o for o in found if o["metadata"]["namespace"] == namespace}
        assert set(own) == kinds | {"NetworkPolicy"}
        (service,) = own["Service"]["spec"]["ports"]
        assert (service["port"], service["appProtocol"]) == (9002, "kubernetes.io/h2c")
        (container,) = own["Deployment"]["spec"]["template"]["spec"]["containers"]
        assert settings(container).router.discovery.kubernetes.namespace == namespace
        assert own["RoleBinding"]["subjects"][0]["namespace"] == namespace
        ingress = own["NetworkPolicy"]["spec"]["ingress"]
        assert [[one["port"] for one in rule["ports"]] for rule in ingress] == [[9002], [8480], [8481]]
    (operator,) = [c for name, pod in pods(objects) for c in containers(pod) if name == "helios-operator"]
    site, signals = settings(operator).operator.site, settings(operator).operator.signals
    labels = found[0]["metadata"]["labels"]
    assert site.picker_service == "helios-picker"
    assert site.picker_pods.items() <= labels.items()
    assert signals.router_services == ["models/helios-picker-headless", "helios/helios-picker-headless"]
    places = {o["metadata"]["namespace"] for o in objects if o["metadata"]["name"] == "helios-operator-pickers"}
    assert places == {"models"}, "in its own namespace it may look already"
    (registry,) = [o for o in objects if o["kind"] == "NetworkPolicy" and o["metadata"]["name"] == "helios-registry"]
    assert site.picker_pods in [
        one.get("podSelector", {}).get("matchLabels") for one in registry["spec"]["ingress"][0]["from"]
    ]
    for wrong, message in (
        ({"operator": {"enabled": True}}, "picker.enabled needs operator.writes.gateway"),
        (
            {"operator": {**values["operator"], "config": {"site": {"picker_service": "x"}}}},
            "is said by picker.enabled",
        ),
        ({"picker": {"enabled": True, "config": {"picker": {"listen": "x:1"}}}}, "listen is said by picker.port"),
        ({"picker": {"enabled": True, "namespaces": [""]}}, "/picker/namespaces/0"),
    ):
        with pytest.raises(Refused, match=message):
            chart.files({**values, **wrong})


def test_external_metrics_have_a_certificate_that_the_api_server_can_check(chart: Chart, everything: Objects):
    (service,) = [each for each in everything if each["kind"] == "APIService"]
    assert service["spec"]["caBundle"] == "QQ=="
    assert service["spec"]["service"] == {"name": "helios-operator", "namespace": "helios", "port": 443}
    values = {
        **VALUES["no-nodes"],
        "operator": {"enabled": True, "externalMetrics": {"enabled": True, "issuer": "ours"}},
    }
    objects = chart.objects(values)
    (service,) = [each for each in objects if each["kind"] == "APIService"]
    (certificate,) = [each for each in objects if each["kind"] == "Certificate"]
    assert service["metadata"]["annotations"] == {"cert-manager.io/inject-ca-from": "helios/helios-operator"}
    assert "caBundle" not in service["spec"]
    assert certificate["spec"]["dnsNames"] == ["helios-operator.helios.svc"]
    (pod,) = [pod for name, pod in pods(objects) if name == "helios-operator"]
    secrets = [volume["secret"]["secretName"] for volume in pod["spec"]["volumes"] if "secret" in volume]
    assert certificate["spec"]["secretName"] in secrets


def test_the_definitions_are_in_the_chart_and_are_no_templates():
    found = {path.name: yaml.safe_load(path.read_text()) for path in (DAEMONSET / "chart" / "crds").iterdir()}
    assert found == definitions()
    assert not any("{{" in path.read_text() for path in (DAEMONSET / "chart" / "crds").iterdir())


def matches(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return selector.items() <= labels.items()


def test_selectors_find_the_pods_that_they_are_for(everything: Objects):
    templates = dict(pods(everything))
    own = {name: pod["metadata"]["labels"] for name, pod in templates.items()}
    for each in everything:
        name = each["metadata"]["name"]
        if each["kind"] in ("DaemonSet", "Deployment", "StatefulSet"):
            assert [n for n, labels in own.items() if matches(each["spec"]["selector"]["matchLabels"], labels)] == [
                name
            ]
        elif each["kind"] == "Service":
            found = [n for n, labels in own.items() if matches(each["spec"]["selector"], labels)]
            assert len(found) == 1, name
            ports = {p["name"] for c in containers(templates[found[0]]) for p in c.get("ports", [])}
            assert {port["targetPort"] for port in each["spec"]["ports"]} <= ports
        elif each["kind"] == "PodDisruptionBudget":
            assert [n for n, labels in own.items() if matches(each["spec"]["selector"]["matchLabels"], labels)] == [
                name
            ]
        elif each["kind"] == "NetworkPolicy":
            found = [n for n, labels in own.items() if matches(each["spec"]["podSelector"]["matchLabels"], labels)]
            assert found == [name] or (name == "helios-default" and len(found) == len(own))


def test_a_pod_reaches_what_its_settings_name_and_little_else(everything: Objects):
    policies = {each["metadata"]["name"]: each["spec"] for each in everything if each["kind"] == "NetworkPolicy"}
    assert "helios-keeper" not in policies, "nothing but the default, which allows nothing"
    assert set(policies["helios-default"]) == {"podSelector", "policyTypes"}

    def out(name: str) -> set[int]:
        return {port["port"] for rule in policies[name]["egress"] for port in rule.get("ports", [])}

    assert 8470 in out("helios-worker") & out("helios-csi-node") & out("helios-csi-controller") & out("helios-router")
    assert out("helios-csi-node") == {53, 8470, 443, 6443}
    assert {443, 6443} <= out("helios-csi-controller")
    for name, port in (("helios-worker", 8472), ("helios-csi-node", 8474)):
        assert policies[name]["ingress"] == [
            {
                "from": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
                "ports": [{"protocol": "TCP", "port": port}],
            }
        ]


def test_registries_elsewhere_are_reached_at_their_ports(chart: Chart):
    urls = ["http://registry.example:8470", "https://second.example", "http://third.example/t/acme"]
    objects = chart.objects({**IMAGES, "registryUrls": urls})
    (policy,) = [o for o in objects if o["kind"] == "NetworkPolicy" and o["metadata"]["name"] == "helios-csi-node"]
    assert [port["port"] for port in policy["spec"]["egress"][1]["ports"]] == [8470, 443, 80]


def test_a_change_of_the_configuration_starts_pods_anew(chart: Chart):
    def noted(values: dict[str, Any]) -> dict[str, str]:
        return {
            n: p["metadata"]["annotations"]["helios.dev/configuration"]
            for n, p in pods(chart.objects(values))
            if n == "helios-worker"
        }

    before = noted(VALUES["nodes-alone"])
    assert noted({**VALUES["nodes-alone"], "worker": {"config": {"mount": {"pool_mib": 7}}}}) != before
    assert noted(VALUES["nodes-alone"]) == before


def test_every_value_is_read_by_a_template_and_known_to_the_schema():
    values = yaml.safe_load((DAEMONSET / "chart" / "values.yaml").read_text())
    schema = json.loads((DAEMONSET / "chart" / "values.schema.json").read_text())
    assert set(schema["properties"]) == set(values) | {"global"}
    text = "".join(path.read_text() for path in (DAEMONSET / "chart" / "templates").iterdir())
    for section, keys in values.items():
        names = keys if isinstance(keys, dict) else [section]
        for name in names:
            assert f".{name}" in text or f'"{name}"' in text, f"{section}.{name}"
        properties = schema["properties"][section].get("properties")
        if properties is not None:
            assert set(properties) == set(keys), section
            assert schema["properties"][section]["additionalProperties"] is False
