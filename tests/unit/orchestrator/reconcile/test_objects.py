"""What is made for a service: Kubernetes takes it, the program understands it, and it keeps to what the docs say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest

from csi import attributes
from helios import worker_labels
from helios.config import ServedSettings
from helios.kube.endpoints import EndpointSlice
from helios.kube.kinds import (
    AUTOSCALER,
    DEPLOYMENT,
    DISRUPTION_BUDGET,
    NETWORK_POLICY,
    NODE,
    PERSISTENT_VOLUME,
    PERSISTENT_VOLUME_CLAIM,
    POD,
    SERVICE,
)
from helios.launch.grace import grace_s
from helios.names import RepoId
from helios.node_labels import WHOLE, cached_key
from orchestrator.reconcile.kinds import (
    DESTINATION_RULE,
    INFERENCE_POOL,
    INFERENCE_SERVICE,
    MODEL,
    PEER_AUTHENTICATION,
    SCALED_OBJECT,
    VIRTUAL_SERVICE,
)
from orchestrator.reconcile.observed import Answer, Facts, Wanted
from orchestrator.reconcile.reconcilers import Models, Services
from orchestrator.reconcile.site import Peer, SecretKey, Site, allowed
from orchestrator.signals.asked import asked
from router.discovery.endpoints import asleep, workers_of
from router.discovery.objects import Pod, Service, decode
from tests.fakes.kubernetes import endpoint, endpoint_slice, pod
from tests.support.kube_schemas import validate
from tests.support.manifests import command_line
from tests.support.manifests import settings as configured
from tests.support.reconciled import Cluster, Known, inference_service, model, settle

ROOT = Path(__file__).parents[4]
A = "a" * 40
ALL = Site(
    routers=("http://helios-router-headless.helios:8481", "http://other:8481"),
    registrar=SecretKey(name="registrar", key="token"),
    registry_urls=("http://helios-registry.helios:8470",),
    registry_token=SecretKey(name="node-token", key="token"),
    compile_key=SecretKey(name="compile", key="key"),
    gateway=Peer(namespace={"kubernetes.io/metadata.name": "istio-ingress"}),
    monitoring=Peer(namespace={"kubernetes.io/metadata.name": "monitoring"}),
    mesh="strict",
    picker_service="helios-picker",
    external_metrics=True,
    keda_scaler="helios-operator.helios:9090",
    pull_secrets=("pull",),
)
APART = {
    "prefill": {"accelerator": {"type": "NVIDIA-H100-80GB-HBM3", "count": 2}, "args": ["--max-num-seqs", "8"]},
    "decode": {"accelerator": {"type": "NVIDIA-H100-80GB-HBM3", "count": 4}},
    "placement": {
        "zoneSpread": "Required", "priorityClassName": "high", "runtimeClassName": "nvidia",
        "tolerations": [{"key": "dedicated", "operator": "Equal", "value": "models", "effect": "NoSchedule"}],
        "nodeSelector": {"pool": "gpu"},
    },
}  # fmt: skip


def ready_model(cluster: Cluster, known: Known, **spec: Any) -> None:
    cluster.put(MODEL, model(**spec))
    known.answers["org/llama", "main"] = Answer(A, 1000.0)
    known.of_commits["org/llama", A] = Facts(16_000_000_000)
    settle(cluster, Models(ALL, known, known), "llama", 1000.0)


def made(site: Site = ALL, storage: dict[str, Any] | None = None, check: Any = None, **spec: Any) -> Cluster:
    """A cluster in which a service has come up; with ``check`` each object was checked when it was applied."""
    cluster, known = Cluster(), Known()
    cluster.check = check or cluster.check
    for number in range(3):
        ready = {"conditions": [{"type": "Ready", "status": "True"}]}
        cluster.put(NODE, {"metadata": {"name": f"node-{number}", "labels": {"pool": "gpu"}}, "status": ready})
    ready_model(cluster, known, storage=storage or {}, prefetch={"nodes": 2, "selector": {"pool": "gpu"}})
    known.by_role = {role: Wanted(2, 1, "2 requests each") for role in ("both", "prefill", "decode")}
    cluster.put(INFERENCE_SERVICE, inference_service(**spec))
    settle(cluster, Services(site, known), "chat", 1000.0)
    return cluster


SPECS: dict[str, dict[str, Any]] = {
    "least": {},
    "apart": APART,
    "push": {**APART, "engine": {"connector": "nixl-push"}},
    "mooncake": {**APART, "engine": {"connector": "mooncake", "image": "registry.example/mine:1"}},
    "shared": {
        **APART,
        "engine": {
            "connector": "shared-storage", "args": ["--kv-transfer-config", '{"kv_connector":"X"}'],
            "env": [{"name": "LMCACHE_CONFIG_FILE", "value": "/x"}, {"name": "HELIOS_HOME", "value": "/elsewhere"}],
        },
    },
    "volume": {**APART, "engine": {"connector": "shared-storage", "kvStorage": {"claimName": "kv"}}},
    "cpu": {"aggregated": {"accelerator": {"count": 0}, "cpu": "8"}, "servedName": "small"},
    "keda": {"scaling": {"by": "KEDA", "targets": {"ttftMilliseconds": 500}}},
    "operator": {"scaling": {"by": "Operator"}},
    "scarce": {"rollout": {"strategy": "Recreate"}},
}  # fmt: skip


@pytest.mark.parametrize("name", SPECS)
def test_every_object_is_one_that_kubernetes_takes_and_its_pods_are_ones_that_the_program_takes(name: str):
    cluster = made(check=validate, **SPECS[name])
    kinds = {DEPLOYMENT, SERVICE, DISRUPTION_BUDGET, NETWORK_POLICY, VIRTUAL_SERVICE, INFERENCE_POOL}
    assert kinds <= {kind for kind, _, _ in cluster.objects}
    deployments = cluster.all(DEPLOYMENT)
    assert len(deployments) == (2 if "prefill" in SPECS[name] else 1)
    for one in deployments:
        (container,) = one["spec"]["template"]["spec"]["containers"]
        command, given = command_line(container)
        assert command == "worker"
        settings = configured(container)
        assert settings.worker.advertise == settings.worker.id == "10.0.0.7"
        assert given["role"] == one["metadata"]["labels"]["helios.dev/role"]
        assert given["revision"] == A
        assert given["model"] == "/model"
        assert given["routers"] == ALL.routers
        assert settings.registry.urls == list(ALL.registry_urls)
        assert str(settings.registry.token_file) == "/etc/helios/registry/token"
        check_pod(one["spec"]["template"], given)


def check_pod(template: dict[str, Any], given: Any) -> None:
    spec, defaults = template["spec"], ServedSettings()
    (container,) = spec["containers"]
    ports = {one["name"]: one["containerPort"] for one in container["ports"]}
    assert ports["http"] == defaults.vllm_port
    assert ports["front"] == defaults.port
    assert spec["terminationGracePeriodSeconds"] > grace_s(given["drain_timeout"], defaults.stop_s)
    for probe in ("readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] == "front"
    assert container["lifecycle"]["preStop"]["exec"]["command"] == ["helios", "worker", "drain"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    mounted = {one["name"] for one in container["volumeMounts"]}
    assert mounted == {one["name"] for one in spec["volumes"]}
    (volume,) = [one for one in spec["volumes"] if one["name"] == "model"]
    wanted = attributes.read(volume["csi"]["volumeAttributes"], where="the pod")
    assert (str(wanted.repo), wanted.commit, wanted.prefetch) == ("models/org/llama", A, ())


def the(cluster: Cluster, kind: Any, name: str = "") -> dict[str, Any]:
    (one,) = [one for one in cluster.all(kind) if name in one["metadata"]["name"]]
    return one


def test_the_longest_drain_has_its_grace_period():
    engine = {"drainSeconds": 600, "startTimeoutSeconds": 7200}
    cluster = made(engine=engine, rollout={"progressDeadlineSeconds": 7200})
    spec = the(cluster, DEPLOYMENT)["spec"]
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] >= grace_s(600, ServedSettings().stop_s)
    assert spec["progressDeadlineSeconds"] > 7200
    (container,) = spec["template"]["spec"]["containers"]
    _, given = command_line(container)
    assert (given["drain_timeout"], given["start_timeout"]) == (600, 7200)


def test_prefill_and_decode_are_placed_wired_and_sized():
    cluster = made(**APART)
    prefill, decode = (the(cluster, DEPLOYMENT, role)["spec"]["template"]["spec"] for role in ("prefill", "decode"))
    for spec, count in ((prefill, 2), (decode, 4)):
        (container,) = spec["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == str(count)
        _, given = command_line(container)
        assert given["vllm_arguments"][:2] == ("--tensor-parallel-size", str(count))
        assert spec["nodeSelector"] == {"pool": "gpu", "nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
        assert {one["key"] for one in spec["tolerations"]} == {"dedicated", "nvidia.com/gpu"}
        assert (spec["priorityClassName"], spec["runtimeClassName"]) == ("high", "nvidia")
        (spread,) = spec["topologySpreadConstraints"]
        assert (spread["topologyKey"], spread["whenUnsatisfiable"]) == ("topology.kubernetes.io/zone", "DoNotSchedule")
        first = spec["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"][0]
        (expression,) = first["preference"]["matchExpressions"]
        assert (expression["key"], expression["values"]) == (cached_key(RepoId.parse("org/llama"), A), [WHOLE])
    (near,) = prefill["affinity"]["podAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    chosen = near["podAffinityTerm"]["labelSelector"]["matchLabels"]
    labels = the(cluster, DEPLOYMENT, "decode")["spec"]["template"]["metadata"]["labels"]
    assert chosen.items() <= labels.items()
    assert "podAffinity" not in decode["affinity"]
    assert {"name": "side-channel", "containerPort": 5600} in prefill["containers"][0]["ports"]


@pytest.mark.parametrize(
    ("connector", "kind", "port"),
    [("nixl-push", "NixlPushConnector", None), ("mooncake", "MooncakeConnector", 8998), ("nixl", None, None)],
)
def test_each_connector_is_wired_by_role(connector: str, kind: str | None, port: int | None):
    cluster = made(**APART, engine={"connector": connector})
    for role, kv_role in (("prefill", "kv_producer"), ("decode", "kv_consumer")):
        (container,) = the(cluster, DEPLOYMENT, role)["spec"]["template"]["spec"]["containers"]
        arguments = command_line(container)[1]["vllm_arguments"]
        if kind is None:
            assert "--kv-transfer-config" not in arguments, "helios worker does it itself"
        else:
            told = json.loads(arguments[arguments.index("--kv-transfer-config") + 1])
            assert (told["kv_connector"], told["kv_role"]) == (kind, kv_role)
        ports = {one["name"]: one["containerPort"] for one in container["ports"]}
        assert ports.get("bootstrap") == (port if role == "prefill" else None)


def test_a_storage_that_prefill_and_decode_share_is_mounted_and_told_to_both_engines():
    def told(**engine: Any) -> dict[str, str]:
        cluster, found = (
            made(**APART, engine={"connector": "shared-storage", "kvStorage": {"claimName": "kv"}, **engine}),
            {},
        )
        for role in ("prefill", "decode"):
            spec = the(cluster, DEPLOYMENT, role)["spec"]["template"]["spec"]
            assert {"name": "kv", "persistentVolumeClaim": {"claimName": "kv"}} in spec["volumes"]
            (container,) = spec["containers"]
            assert {"name": "kv", "mountPath": "/kv"} in container["volumeMounts"]
            arguments = command_line(container)[1]["vllm_arguments"]
            last = max(index for index, one in enumerate(arguments) if one == "--kv-transfer-config")
            found[role] = json.loads(arguments[last + 1])
        return found

    found = told()
    place = found["prefill"]["kv_connector_extra_config"]["shared_storage_path"]
    for role in ("prefill", "decode"):
        assert (found[role]["kv_connector"], found[role]["kv_role"]) == ("ExampleConnector", "kv_both")
        assert found[role]["kv_connector_extra_config"] == {"shared_storage_path": place}
    assert place.startswith(f"/kv/chat/{A[:10]}-"), "of this service and commit alone: blocks go by their tokens"
    other = told(args=["--dtype", "float16"])["decode"]["kv_connector_extra_config"]["shared_storage_path"]
    assert other != place, "nor do engines share that were told otherwise"
    mine = told(args=["--kv-transfer-config", '{"kv_connector":"X"}'])
    assert mine == {role: {"kv_connector": "X"} for role in ("prefill", "decode")}, "what stands in args wins"


def test_routers_find_the_workers_and_their_weight():
    cluster = made()
    service, deployment = the(cluster, SERVICE, "both"), the(cluster, DEPLOYMENT)
    labels = service["metadata"]["labels"]
    assert worker_labels.SELECTED.items() <= labels.items()
    assert (labels["helios.dev/role"], labels["helios.dev/revision"], labels["helios.dev/weight"]) == ("both", A, "1")
    template = deployment["spec"]["template"]["metadata"]
    assert service["spec"]["selector"].items() <= template["labels"].items()
    assert deployment["spec"]["selector"]["matchLabels"].items() <= template["labels"].items()
    assert worker_labels.SELECTED.items() <= template["labels"].items()
    assert template["annotations"]["helios.dev/model"] == "org/llama"
    assert worker_labels.WEIGHT not in {**template["labels"], **template["annotations"]}, "the Service's counts"
    whole = cluster.get(SERVICE, "models", "chat")
    assert whole is not None
    assert worker_labels.WEIGHT not in whole["metadata"]["labels"]


def test_routers_hear_of_the_limits_without_a_change_of_pods():
    cluster = made(limits={"maxInFlight": 40, "maxQueued": 0})
    service, deployment = the(cluster, SERVICE, "both"), the(cluster, DEPLOYMENT)
    template = deployment["spec"]["template"]["metadata"]
    assert not [key for key in {**template["labels"], **template["annotations"]} if "max-" in key]
    one = endpoint_slice("s", [endpoint("10.0.0.1", "p", ready=True)], labels=service["metadata"]["labels"])
    its = pod("p", "10.0.0.1", annotations=template["annotations"], labels=template["labels"])
    found = workers_of(
        [decode(json.dumps(one), EndpointSlice)], [decode(json.dumps(its), Pod)], worker_labels.HTTP
    )  # fmt: skip
    ((worker,), problems) = found.workers, found.problems
    assert (worker.max_in_flight, worker.max_queued, problems) == (40, 0, ())
    assert not [key for key in the(made(), SERVICE, "both")["metadata"]["labels"] if "max-" in key]


def test_routers_know_the_model_while_it_sleeps_unless_no_request_is_to_wake_it():
    service = the(made(servedName="team/chat"), SERVICE, "both")
    found = asleep([decode(json.dumps(service), Service)])
    assert [(one.model, one.url, one.revision) for one in found.workers] == [("team/chat", "", A)]
    fixed = the(made(servedName="team/chat", replicas=0), SERVICE, "both")
    assert asleep([decode(json.dumps(fixed), Service)]).workers == ()


def test_the_chart_s_routers_select_what_is_made():
    text = (ROOT / "node-daemonset" / "chart" / "values.yaml").read_text()
    ((key, value),) = worker_labels.SELECTED.items()
    assert f"slices: {key}={value}\n" in text
    assert f"pods: {key}={value}\n" in text


def test_who_scales_says_replicas_and_nobody_else():
    hpa = the(made(), AUTOSCALER)["spec"]
    assert (hpa["minReplicas"], hpa["maxReplicas"]) == (1, 4)
    names = [one["external"]["metric"]["name"] for one in hpa["metrics"]]
    assert names == ["helios_queued_requests", "helios_kv_usage_percent", "helios_in_flight_requests"]
    assert hpa["metrics"][0]["external"]["metric"]["selector"]["matchLabels"]["revision"] == A
    assert made(scaling={"by": "Operator"}).all(AUTOSCALER) == []
    keda = the(made(scaling={"by": "KEDA"}), SCALED_OBJECT)
    assert keda["spec"]["triggers"][0]["metadata"]["scalerAddress"] == ALL.keda_scaler
    assert "annotations" not in keda["metadata"]
    assert "enableTLS" not in keda["spec"]["triggers"][0]["metadata"]


def test_keda_is_told_when_the_scaler_speaks_tls_and_by_which_keys():
    site = msgspec.structs.replace(ALL, scaler_tls=True, keda_authentication="helios-scaler")
    (one, *_) = triggers = the(made(site, check=validate, scaling={"by": "KEDA"}), SCALED_OBJECT)["spec"]["triggers"]
    assert one["metadata"]["enableTLS"] == "true"
    assert {str(each["authenticationRef"]) for each in triggers} == {
        str({"kind": "ClusterTriggerAuthentication", "name": "helios-scaler"})
    }
    for each in triggers:
        assert asked("models", each["metadata"]).chosen.service == "chat", "what KEDA sends along is understood"


def test_the_mesh_repeats_no_prompt_ejects_not_all_and_leaves_kv_blocks_alone():
    cluster = made(**APART)
    (route,) = the(cluster, VIRTUAL_SERVICE)["spec"]["http"]
    assert "timeout" not in route, "Istio has none then, and refuses 0"
    assert route["retries"]["retryOn"] == "connect-failure,refused-stream,reset-before-request"
    detection = the(cluster, DESTINATION_RULE)["spec"]["trafficPolicy"]["outlierDetection"]
    assert detection["maxEjectionPercent"] <= 50 <= detection["minHealthPercent"]
    peers = the(cluster, PEER_AUTHENTICATION)["spec"]
    assert peers["mtls"] == {"mode": "STRICT"}
    assert peers["portLevelMtls"]["5600"] == {"mode": "DISABLE"}
    annotations = the(cluster, DEPLOYMENT, "prefill")["spec"]["template"]["metadata"]["annotations"]
    assert annotations["traffic.sidecar.istio.io/includeInboundPorts"] == "8000,8490"
    assert annotations["traffic.sidecar.istio.io/includeOutboundIPRanges"] == "", "but for these ports:"
    assert annotations["traffic.sidecar.istio.io/includeOutboundPorts"] == "8470,8481"
    alone = the(made(), DEPLOYMENT)["spec"]["template"]["metadata"]["annotations"]
    assert not [name for name in alone if "Outbound" in name], "it sends no blocks to anybody"


def test_what_the_cluster_does_not_have_is_not_made():
    cluster, known = Cluster(without=[PEER_AUTHENTICATION, INFERENCE_POOL, SCALED_OBJECT]), Known()
    ready_model(cluster, known)
    cluster.put(INFERENCE_SERVICE, inference_service(scaling={"by": "KEDA"}))
    settle(cluster, Services(ALL, known), "chat", 1000.0)
    kinds = {kind for kind, _, _ in cluster.objects}
    assert not kinds & {PEER_AUTHENTICATION, VIRTUAL_SERVICE, INFERENCE_POOL, SCALED_OBJECT, AUTOSCALER}


def test_the_network_lets_in_the_router_and_workers_of_the_same_service():
    spec = the(made(**APART), NETWORK_POLICY)["spec"]
    (router,) = [one for one in spec["ingress"] if one.get("from") == [allowed(ALL.router)]]
    assert {one["port"] for one in router["ports"]} >= {8000, 5557, 5657}
    among = {"from": [{"podSelector": {"matchLabels": {"helios.dev/service": "chat"}}}]}
    assert among in spec["ingress"]
    assert among not in the(made(), NETWORK_POLICY)["spec"]["ingress"], "workers that answer alone need nobody"
    assert spec["policyTypes"] == ["Ingress", "Egress"]


def test_the_picker_of_the_workers_namespace_may_look_at_them():
    def lets_in(site: Site) -> list[dict[str, Any]]:
        found = made(site).get(NETWORK_POLICY, "models", "chat")
        assert found is not None
        return [one for rule in found["spec"]["ingress"] for one in rule["from"]]

    picker = {"podSelector": {"matchLabels": {"app.kubernetes.io/component": "picker"}}}
    assert picker in lets_in(Site(picker_pods=picker["podSelector"]["matchLabels"]))
    assert picker not in lets_in(Site())


def test_a_claim_is_bound_to_the_very_commit():
    cluster = made(check=validate, storage={"volume": "Claim", "storageClassName": "models", "format": "hub"})
    volume, claim = the(cluster, PERSISTENT_VOLUME), the(cluster, PERSISTENT_VOLUME_CLAIM)
    assert claim["spec"]["volumeName"] == volume["metadata"]["name"]
    assert volume["spec"]["claimRef"] == {"namespace": "models", "name": claim["metadata"]["name"]}
    wanted = attributes.read(volume["spec"]["csi"]["volumeAttributes"], where="the volume")
    assert (wanted.commit, wanted.form) == (A, "hub")
    attributes.check_volume_id(volume["spec"]["csi"]["volumeHandle"])
    spec = the(cluster, DEPLOYMENT)["spec"]["template"]["spec"]
    assert {"claimName": claim["metadata"]["name"], "readOnly": True} in [
        one.get("persistentVolumeClaim") for one in spec["volumes"]
    ]
    assert command_line(spec["containers"][0])[1]["model"] == "/hub"


def test_nodes_get_the_model_before_a_pod_needs_it():
    pods = [one for one in made().all(POD) if "prefetch" in one["metadata"]["name"]]
    assert len(pods) == 2
    for one in pods:
        (volume,) = one["spec"]["volumes"]
        assert attributes.read(volume["csi"]["volumeAttributes"], where="the pod").prefetch == ()


def test_the_schemas_refuse_what_an_api_server_would():
    deployment = the(made(), DEPLOYMENT)
    for wrong in ({"replicas": "a"}, {"strategi": {}}):
        with pytest.raises(jsonschema.ValidationError):
            validate({**deployment, "spec": {**deployment["spec"], **wrong}})
    rule = the(made(), DESTINATION_RULE)
    with pytest.raises(jsonschema.ValidationError):
        validate({**rule, "spec": {**rule["spec"], "trafficPolicies": {}}})
