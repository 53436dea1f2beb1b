"""What is refused when it is written, and what is said of it: by the definitions, and by who reads what is stored."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from orchestrator.api import parse
from orchestrator.api.crds import definitions
from orchestrator.api.rules import NAMED, RULES
from tests.support.admission import Admission, Refused

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "f" * 40
ADMISSION = {each["spec"]["names"]["kind"]: Admission(each) for each in definitions().values()}
READ = {"Model": parse.model_spec, "InferenceService": parse.service_spec}


def model(**spec: Any) -> dict[str, Any]:
    source = {"source": {"repo": "org/name"}}
    return {
        "apiVersion": "helios.dev/v1alpha1", "kind": "Model", "metadata": {"name": "name", "namespace": "models"},
        "spec": {**source, **spec},
    }  # fmt: skip


def service(**spec: Any) -> dict[str, Any]:
    """With one kind of workers, unless ``prefill``, ``decode`` or ``aggregated`` is said."""
    roles = {} if {"prefill", "decode", "aggregated"} & spec.keys() else {"aggregated": {}}
    return {
        "apiVersion": "helios.dev/v1alpha1", "kind": "InferenceService",
        "metadata": {"name": "name", "namespace": "models"}, "spec": {"model": {"name": "name"}, **roles, **spec},
    }  # fmt: skip


def named(manifest: dict[str, Any], name: str) -> dict[str, Any]:
    return {**manifest, "metadata": {"name": name}}


def split(traffic: dict[str, int]) -> list[dict[str, Any]]:
    return [{"commit": commit, "weight": weight} for commit, weight in traffic.items()]


TWO: dict[str, Any] = {"prefill": {}, "decode": {}}

GOOD = [
    model(),
    model(source={"repo": "gpt2", "pull": "Never"}),
    model(source={"repo": "a.b-c_d/" + "x" * 96}),
    model(revision={"revision": COMMIT}),
    model(revision={"revision": "refs/pr/1"}),
    model(revision={"revision": "release/v1.2", "policy": "Approve", "approved": COMMIT}),
    model(revision={"policy": "Approve"}),
    model(revision={"policy": "Follow", "checkSeconds": 5, "requireVerified": True}),
    model(storage={"volume": "Claim", "storageClassName": "helios.models.example", "format": "hub"}),
    model(storage={"storageClassName": None}),
    model(prefetch={"nodes": 3, "selector": {"nvidia.com/gpu.product": "H100", "empty": ""}}),
    model(prefetch={"nodes": 3, "selector": {"gone": None}}),
    model(priority="pinned"),
    named(model(), "7b-chat"),
    service(),
    service(aggregated={"cpu": 4, "memory": "1.5Gi", "cache": "500M"}),
    service(**TWO),
    service(**TWO, engine={"connector": "shared-storage", "kvStorage": {"claimName": "kv"}}),
    service(**TWO, engine={"connector": "shared-storage", "args": ["--kv_transfer_config={}"]}),
    service(
        prefill={"args": ["--kv-transfer-config", "{}"]},
        decode={"args": ["--kv-transfer-config={}"]},
        engine={"connector": "shared-storage"},
    ),
    service(engine={"connector": "none"}),
    service(
        engine={"env": [{"name": "A", "value": "1"}, {"name": "B", "valueFrom": {"fieldRef": {"fieldPath": "x"}}}]}
    ),
    service(engine={"image": "registry.example:5000/helios/vllm@sha256:" + "0" * 64, "args": ["--max-model-len=8192"]}),
    service(placement={"tolerations": [{"operator": "Exists"}, {"key": "gpu", "value": "yes", "effect": "NoExecute"}]}),
    service(placement={"tolerations": [{"key": "a/b", "effect": "NoExecute", "tolerationSeconds": 30}]}),
    service(scaling={"minReplicas": 0, "maxReplicas": 8, "overprovision": {"replicas": 8, "percent": 20}}),
    service(scaling={"minReplicas": 4, "maxReplicas": 4}),
    service(scaling={"targets": {"ttftMilliseconds": 500}, "forecast": {"mode": "Act"}}),
    service(scaling={"maxCost": 1}),
    service(scaling={"maxCost": 3}, prefill={"accelerator": {"count": 1}}, decode={"accelerator": {"count": 2}}),
    service(aggregated={"scaling": {"maxCost": 8}, "accelerator": {"count": 8}}),
    service(aggregated={"accelerator": {"count": 0}}),
    service(rollout={"steps": [100], "strategy": "Recreate"}),
    service(rollout={"steps": [1, 2, 5, 100]}),
    service(rollout={"progressDeadlineSeconds": 900}),
    service(traffic=split({COMMIT: 90, OTHER: 10})),
    service(traffic=split({COMMIT: 100, OTHER: 0})),
    service(replicas=0),
    service(replicas=4),
    service(replicas=9, aggregated={"scaling": {"maxReplicas": 9}}),
    service(replicas=9, prefill={}, decode={"scaling": {"maxReplicas": 9}}),
    service(servedName="org/name", limits={"maxQueued": 0}),
    service(servedName="模型:8b"),
    service(scaling={"minReplicas": 3, "maxCost": 3}),
    service(aggregated={"memory": 17179869184}),
    service(placement={"nodeSelector": {"example.com/a.b_c": ""}}),
    named(service(), "7" + "a" * 62),
]


REPO, REVISION, STORAGE, SCALING = "spec.source.repo", "spec.revision", "spec.storage", "spec.scaling"
BAD: list[tuple[dict[str, Any], str, str]] = [
    # (what, the field that is named, what is said of it)
    (model(source={}), "spec.source.repo", "Required value"),
    (model(source={"repo": "a/b/c"}), REPO, "does not match"),
    (model(source={"repo": "org/"}), REPO, "does not match"),
    (model(source={"repo": "org--x/name"}), REPO, "does not match"),
    (model(source={"repo": "org/na..me"}), REPO, "does not match"),
    (model(source={"repo": "org/name."}), REPO, "does not match"),
    (model(source={"repo": "org/name\n"}), REPO, "does not match"),
    (model(source={"repo": "órg/name"}), REPO, "does not match"),
    (model(source={"repo": "_/name"}), REPO, "neither is '_'"),
    (model(source={"repo": "org/" + "x" * 97}), REPO, "96 characters each"),
    (model(source={"repo": ""}), REPO, ""),
    (model(source={"repo": 7}), REPO, 'is not of type "string"'),
    (model(source={"repo": "a/b", "pull": "Always"}), "spec.source.pull", "is not one of"),
    (model(source={"repo": "a/b", "commit": COMMIT}), "spec.source.commit", "unknown field"),
    (model(sauce={}), "spec.sauce", "unknown field"),
    (model(revision={"revision": "a..b"}), f"{REVISION}.revision", "no ref and no commit"),
    (model(revision={"revision": "a//b"}), f"{REVISION}.revision", "no ref and no commit"),
    (model(revision={"revision": "a/"}), f"{REVISION}.revision", "no ref and no commit"),
    (model(revision={"revision": "x.lock"}), f"{REVISION}.revision", "no ref and no commit"),
    (model(revision={"revision": "-x"}), f"{REVISION}.revision", "does not match"),
    (model(revision={"revision": "x" * 251}), f"{REVISION}.revision", "longer than 250 characters"),
    (model(revision={"revision": COMMIT, "policy": "Follow"}), f"{REVISION}.policy", "a commit never moves"),
    (model(revision={"approved": COMMIT}), f"{REVISION}.approved", "approved counts with policy Approve alone"),
    (model(revision={"policy": "Approve", "approved": "abc"}), f"{REVISION}.approved", ""),
    (model(revision={"policy": "Newest"}), f"{REVISION}.policy", "is not one of"),
    (model(revision={"checkSeconds": 1}), f"{REVISION}.checkSeconds", "less than the minimum"),
    (model(revision={"checkSeconds": 7.5}), f"{REVISION}.checkSeconds", 'is not of type "integer"'),
    (model(storage={"volume": "Claim"}), f"{STORAGE}.storageClassName", "storageClassName is missing"),
    (model(storage={"storageClassName": "fast"}), f"{STORAGE}.storageClassName", "storageClassName counts with volume"),
    (model(storage={"volume": "Claim", "storageClassName": "Fast"}), f"{STORAGE}.storageClassName", "does not match"),
    (model(priority="high"), "spec.priority", "is not one of"),
    (model(prefetch={"nodes": -1}), "spec.prefetch.nodes", "less than the minimum"),
    (model(prefetch={"selector": {"a": "b c"}}), "spec.prefetch.selector.a", "does not match"),
    (named(model(), "with.dot"), "", "metadata.name: has to be a DNS label"),
    (named(model(), "x" * 64), "", "metadata.name: has to be a DNS label"),
    (service(model={}), "spec.model.name", "Required value"),
    (service(model={"name": "Name"}), "spec.model.name", "does not match"),
    (service(aggregated=None), "spec", "no workers"),
    (service(aggregated={}, **TWO), "spec.aggregated", "aggregated excludes prefill and decode"),
    (service(aggregated={}, decode={}), "spec.aggregated", "aggregated excludes prefill and decode"),
    (service(prefill={}), "spec.decode", "prefill needs decode"),
    (service(decode={}), "spec.prefill", "decode needs prefill"),
    (service(**TWO, engine={"connector": "none"}), "spec.engine.connector", "engine.connector is none"),
    (service(engine={"connector": "rdma"}), "spec.engine.connector", "is not one of"),
    (service(engine={"image": "a b"}), "spec.engine.image", "does not match"),
    (service(engine={"args": [8192]}), "spec.engine.args[0]", 'is not of type "string"'),
    (service(engine={"env": [{"value": "1"}]}), "spec.engine.env[0].name", "Required value"),
    (service(engine={"env": [{"name": "A"}, {"name": "A"}]}), "spec.engine.env[1]", "Duplicate value"),
    (
        service(engine={"env": [{"name": "A", "value": "1", "valueFrom": {}}]}),
        "spec.engine.env[0].valueFrom",
        "value and valueFrom exclude each other",
    ),
    (service(engine={"drainSeconds": 1}), "spec.engine.drainSeconds", "less than the minimum"),
    (
        service(engine={"startTimeoutSeconds": 8 * 86_400}),
        "spec.engine.startTimeoutSeconds",
        "greater than the maximum",
    ),
    (service(engine={"sharedMemory": "8 GiB"}), "spec.engine.sharedMemory", "does not match"),
    (service(aggregated={"cpu": -1}), "spec.aggregated.cpu", "less than the minimum"),
    (service(aggregated={"cpu": 0.5}), "spec.aggregated.cpu", ""),
    (service(aggregated={"cpu": True}), "spec.aggregated.cpu", ""),
    (service(aggregated={"memory": "16gb"}), "spec.aggregated.memory", "does not match"),
    (
        service(aggregated={"accelerator": {"count": 65}}),
        "spec.aggregated.accelerator.count",
        "greater than the maximum",
    ),
    (service(aggregated={"accelerator": {"type": "H 100"}}), "spec.aggregated.accelerator.type", "does not match"),
    (
        service(aggregated={"accelerator": {"count": 8}, "scaling": {"maxCost": 4}}),
        "spec.aggregated.scaling.maxCost",
        "less than minReplicas workers' accelerator.count",
    ),
    (service(scaling={"maxCost": 1}, **TWO), f"{SCALING}.maxCost", "minReplicas workers of each role"),
    (service(scaling={"minReplicas": 3, "maxCost": 2}), f"{SCALING}.maxCost", "so many could never start"),
    (
        service(aggregated={"scaling": {"minReplicas": 3, "maxCost": 2}}),
        "spec.aggregated.scaling.maxCost",
        "so many could never start",
    ),
    (service(aggregated={"memory": "512m"}), "spec.aggregated.memory", "memory has the suffix m"),
    (service(aggregated={"memory": 0}), "spec.aggregated.memory", "or is nothing"),
    (service(aggregated={"cache": "0Gi"}), "spec.aggregated.cache", "cache has the suffix m"),
    (service(engine={"sharedMemory": "8m"}), "spec.engine.sharedMemory", "write it as 16Gi"),
    (
        service(aggregated={"accelerator": {"resource": "memory"}}),
        "spec.aggregated.accelerator.resource",
        "resource has to be one of nodes'",
    ),
    (service(placement={"nodeSelector": {"a b": "c"}}), "spec.placement.nodeSelector", "can't be a node's label"),
    (model(prefetch={"selector": {"": "c"}}), "spec.prefetch.selector", "can't be a node's label"),
    (service(servedName="llama@v2"), "spec.servedName", "does not match"),
    (service(servedName="a\nb"), "spec.servedName", "does not match"),
    (service(servedName="-x"), "spec.servedName", "does not match"),
    (service(servedName="a\u0000"), "spec.servedName", "does not match"),
    (service(scaling={"minReplicas": 5}), f"{SCALING}.minReplicas", "minReplicas is more than maxReplicas"),
    (
        service(decode={"scaling": {"minReplicas": 9}}, prefill={}),
        "spec.decode.scaling.minReplicas",
        "minReplicas is more than maxReplicas",
    ),
    (service(scaling={"maxReplicas": 0}), f"{SCALING}.maxReplicas", "less than the minimum"),
    (service(scaling={"targets": {}}), f"{SCALING}.targets", "targets names none"),
    (service(scaling={"targets": {"kvUsagePercent": 101}}), f"{SCALING}.targets.kvUsagePercent", "greater than"),
    (service(scaling={"targets": {"inFlight": 0}}), f"{SCALING}.targets.inFlight", "less than the minimum"),
    (service(scaling={"targets": {"inflight": 3}}), f"{SCALING}.targets.inflight", "unknown field"),
    (
        service(scaling={"overprovision": {"replicas": 4}}),
        f"{SCALING}.overprovision.replicas",
        "such room can't be had",
    ),
    (
        service(scaling={"minReplicas": 4, "forecast": {"mode": "Act"}}),
        f"{SCALING}.forecast.mode",
        "forecast.mode Act has nothing to raise",
    ),
    (service(scaling={"downWindowSeconds": 3601}), f"{SCALING}.downWindowSeconds", "greater than the maximum"),
    (service(scaling={"by": "VPA"}), f"{SCALING}.by", "is not one of"),
    (service(rollout={"steps": []}), "spec.rollout.steps", ""),
    (service(rollout={"steps": [10, 50]}), "spec.rollout.steps", "steps have to end with 100"),
    (service(rollout={"steps": [50, 10, 100]}), "spec.rollout.steps", "steps have to rise"),
    (service(rollout={"steps": [10, 10, 100]}), "spec.rollout.steps", "steps have to rise"),
    (service(rollout={"steps": [0, 100]}), "spec.rollout.steps[0]", "less than the minimum"),
    (
        service(rollout={"progressDeadlineSeconds": 600}),
        "spec.rollout.progressDeadlineSeconds",
        "every new commit would be given up",
    ),
    (service(traffic=split({COMMIT: 50, OTHER: 40})), "spec.traffic", "the weights have to be 100 together"),
    (service(traffic=split({COMMIT: 50}) * 2), "spec.traffic[1]", "Duplicate value"),
    (service(traffic=[{"commit": COMMIT}]), "spec.traffic[0].weight", "Required value"),
    (service(traffic=[{"commit": "main", "weight": 100}]), "spec.traffic[0].commit", "does not match"),
    (service(replicas=5), "spec.replicas", "replicas is more than scaling.maxReplicas"),
    (service(replicas=5, prefill={}, decode={}), "spec.replicas", "replicas is more than scaling.maxReplicas"),
    (
        service(replicas=3, aggregated={"scaling": {"maxReplicas": 2}}),
        "spec.replicas",
        "replicas is more than scaling.maxReplicas",
    ),
    (service(servedName=""), "spec.servedName", ""),
    (service(limits={"maxQueued": -1}), "spec.limits.maxQueued", "less than the minimum"),
    (
        service(**TWO, engine={"connector": "shared-storage"}),
        "spec.engine.kvStorage",
        "needs the claim of a volume that prefill and decode share",
    ),
    (
        service(prefill={"args": ["--kv-transfer-config", "{}"]}, decode={}, engine={"connector": "shared-storage"}),
        "spec.engine.kvStorage",
        "needs the claim of a volume that prefill and decode share",
    ),
    (
        service(**TWO, engine={"kvStorage": {"claimName": "kv"}}),
        "spec.engine.kvStorage",
        "kvStorage counts with connector shared-storage alone",
    ),
    (
        service(engine={"connector": "shared-storage", "kvStorage": {"claimName": "kv"}}),
        "spec.engine.kvStorage",
        "is for prefill and decode apart",
    ),
    (
        service(**TWO, engine={"connector": "shared-storage", "kvStorage": {}}),
        "spec.engine.kvStorage.claimName",
        "Required value",
    ),
    (service(limits={"maxInFlight": 0}), "spec.limits.maxInFlight", "less than the minimum"),
    (
        service(limits={"maxQueued": 0}, scaling={"minReplicas": 0}),
        "spec.limits.maxQueued",
        "a request that waits is what wakes a service",
    ),
    (
        service(placement={"tolerations": [{"effect": "NoSchedule"}]}),
        "spec.placement.tolerations[0].key",
        "key is missing: only operator Exists",
    ),
    (
        service(placement={"tolerations": [{"key": "a", "operator": "Exists", "value": "b"}]}),
        "spec.placement.tolerations[0].value",
        "value says nothing with operator Exists",
    ),
    (
        service(placement={"tolerations": [{"key": "a", "tolerationSeconds": 3}]}),
        "spec.placement.tolerations[0].tolerationSeconds",
        "tolerationSeconds counts with effect NoExecute alone",
    ),
    (service(placement={"zoneSpread": "Always"}), "spec.placement.zoneSpread", "is not one of"),
    (named(service(), "x" * 64), "", "metadata.name: has to be a DNS label"),
    ({**model(), "spec": None}, "spec", "Required value"),
]


@pytest.mark.parametrize("manifest", GOOD)
def test_what_may_be_written_is_stored_and_read(manifest: dict[str, Any]):
    stored = ADMISSION[manifest["kind"]].admit(manifest)
    read = READ[manifest["kind"]]
    assert read(stored) == read(manifest), "what the API server fills in is what the types have by default"


@pytest.mark.parametrize(("manifest", "field", "message"), BAD)
def test_what_may_not_is_refused_with_its_field(manifest: dict[str, Any], field: str, message: str):
    with pytest.raises(Refused) as refused:
        ADMISSION[manifest["kind"]].admit(manifest)
    assert field in refused.value.fields
    assert message in str(refused.value)
    with pytest.raises(parse.InvalidResource) as invalid:
        READ[manifest["kind"]](manifest)
    said = str(invalid.value)
    assert said.startswith(field) or (field.rpartition(".")[2] in said and said.startswith(field.rpartition(".")[0]))


def test_every_rule_has_a_case_that_breaks_it():
    rules = {rule.message for each in RULES.values() for rule in each} | {NAMED.message}
    said = set()
    for manifest, _, _ in BAD:
        with pytest.raises(Refused) as refused:
            ADMISSION[manifest["kind"]].admit(manifest)
        said |= {rule for rule in rules if rule in str(refused.value)}
    assert {rule[:40] for rule in rules - said} == {"repo can't be changed: another repositor"}, (
        "it has a test of its own"
    )


def test_a_model_keeps_its_repository():
    old = ADMISSION["Model"].admit(model())
    ADMISSION["Model"].admit(model(source={"repo": "org/name", "pull": "Never"}, priority="scratch"), old)
    with pytest.raises(Refused) as refused:
        ADMISSION["Model"].admit(model(source={"repo": "org/other"}), old)
    assert refused.value.fields == [REPO]
    assert "repo can't be changed" in str(refused.value)


def test_several_errors_are_told_together():
    wrong = service(scaling={"minReplicas": 5}, rollout={"steps": [50, 10]}, prefill={})
    with pytest.raises(parse.InvalidResource) as invalid:
        parse.service_spec(wrong)
    lines = str(invalid.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "spec.decode", "spec.scaling.minReplicas", "spec.rollout.steps", "spec.rollout.steps",
    ]  # fmt: skip


@pytest.mark.parametrize("manifest", [{}, {"spec": None}, {"spec": []}, {"spec": "x"}])
def test_a_resource_without_a_specification_is_invalid(manifest: dict[str, Any]):
    with pytest.raises(parse.InvalidResource, match="spec: is missing"):
        parse.model_spec(manifest)


def test_a_status_of_another_version_is_read_as_far_as_it_is_known():
    status = {"commit": COMMIT, "conditions": [{"type": "Ready", "status": "True", "reason": "Served", "later": 1}]}
    found = parse.service_status({"status": {**status, "later": {"x": 1}, "replicas": None}})
    assert (found.commit, found.conditions[0].reason) == (COMMIT, "Served")
    assert parse.model_status({}) == parse.model_status({"status": {"commit": 7}})


def test_what_is_read_is_left_as_it_was():
    manifest = service(aggregated={"cpu": 4, "scaling": None})
    before = copy.deepcopy(manifest)
    found = parse.service_spec(manifest)
    assert manifest == before
    assert found.aggregated is not None
    assert (found.aggregated.cpu, found.aggregated.scaling) == ("4", None)
