"""Whatever somebody asks for: everything that is made of it is legal, it comes to rest, and rest means no writes."""

from __future__ import annotations

import re
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from helios.kube.kinds import DEPLOYMENT, POD, SERVICE
from orchestrator.api.common import FINALIZER
from orchestrator.reconcile import names
from orchestrator.reconcile.kinds import INFERENCE_SERVICE, MODEL
from orchestrator.reconcile.observed import Answer, Wanted
from orchestrator.reconcile.reconcilers import Models, Services
from orchestrator.reconcile.site import Site
from tests.support import specs
from tests.support.kube_schemas import validate
from tests.support.reconciled import Cluster, Known, inference_service, model, settle, turn
from tests.unit.orchestrator.reconcile.test_objects import ALL

A = "a" * 40
LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?\Z")


def legal(manifest: dict[str, Any]) -> None:
    validate(manifest, ("1.28", "1.37"))
    metadata = manifest["metadata"]
    assert LABEL.match(metadata["name"]), metadata["name"]
    if manifest["kind"] == "Service":
        assert metadata["name"][0].isalpha()
    for value in metadata["labels"].values():
        assert names.legal_label(value), value
    if manifest["kind"] == "Deployment":
        assert len(metadata["name"]) + len("-1234567890-12345") <= names.LONGEST + 1
        for value in manifest["spec"]["template"]["metadata"]["labels"].values():
            assert names.legal_label(value)


@settings(
    max_examples=25,
    deadline=None,
    phases=(Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    spec=specs.service_specs(), name=specs.names(), site=st.sampled_from([ALL, Site()]),
    replicas=st.dictionaries(st.sampled_from(["both", "prefill", "decode"]), st.integers(0, 3)),
)  # fmt: skip
def test_everything_is_legal_and_comes_to_rest(spec, name, site, replicas):
    cluster, known = Cluster(), Known()
    cluster.check = legal
    cluster.put(MODEL, model())
    known.answers["org/llama", "main"] = Answer(A, 1000.0)
    known.by_role = {role: Wanted(count, min(count, 2)) for role, count in replicas.items()}
    cluster.put(INFERENCE_SERVICE, inference_service(name, **spec))
    settle(cluster, Models(site, known, known), "llama", 1000.0)
    services = Services(site, known)
    settle(cluster, services, name, 1000.0)
    deployments = cluster.all(DEPLOYMENT)
    assert len({one["metadata"]["name"] for one in deployments}) == len(deployments)
    before = cluster.writes
    told = len(cluster.events)
    turn(cluster, services, name, 1001.0)
    assert cluster.writes == before
    assert len(cluster.events) == told
    cluster.delete(INFERENCE_SERVICE, name)
    turn(cluster, services, name, 1002.0)
    left = [kind for kind, _, _ in cluster.objects if kind not in (MODEL, POD)]
    assert left == []
    cluster.delete(MODEL, "llama")
    turn(cluster, Models(site, known, known), "llama", 1003.0)
    assert cluster.all(MODEL) == []


@given(service=specs.names(), other=specs.names(), role=st.sampled_from(list(names.ROLES)))
def test_no_two_services_share_a_name(service: str, other: str, role: str):
    mine = {names.of_revision(service, one, A) for one in names.ROLES} | {names.of_service(service)}
    assert len(mine) == 4
    if service != other:
        theirs = {names.of_revision(other, one, A) for one in names.ROLES}
        assert not {names.of_revision(service, role, A)} & theirs


def test_finalizers_and_kinds_are_the_groups():
    assert FINALIZER.startswith(INFERENCE_SERVICE.group)
    assert SERVICE.resource == "services"
