"""The fake API server keeps to what a real one does: the scenarios that tests/cluster runs against a real one."""

from __future__ import annotations

import asyncio

import pytest

from helios.cluster import cluster_client
from tests.fakes.kubernetes import ApiServer, kubeconfig
from tests.fakes.kubernetes.defaults import quantity
from tests.fakes.kubernetes.fields import decoded, encoded
from tests.support.api_scenarios import SCENARIOS, Api, config_map
from tests.support.sample_operator import greeting


@pytest.mark.parametrize("run", SCENARIOS, ids=lambda run: run.__name__)
def test_scenario(run, tmp_path):
    async def go():
        server = ApiServer()
        await server.open()
        try:
            (tmp_path / "kubeconfig").write_text(kubeconfig(server))
            async with cluster_client(kubeconfig=str(tmp_path / "kubeconfig")) as (client, _):
                await Api(client).prepared("scenario")
                await run(Api(client), "scenario")
        finally:
            await server.close()
        assert server.complaints == []

    asyncio.run(go())


def test_garbage_is_collected_when_its_last_owner_has_gone():
    server = ApiServer()
    cluster, served = server.cluster, server.served("configmaps")

    def made(name, *owners):
        one = config_map(name)
        references = [{"apiVersion": "v1", "kind": "ConfigMap", "name": "o", "uid": uid} for uid in owners]
        one["metadata"]["ownerReferences"] = references
        return cluster.create(served, "ns", one, manager="m", strict=True)["metadata"]["uid"]

    first, second = made("first"), made("second")
    made("both", first, second)
    made("grandchild", made("child", first))
    cluster.delete(served, "ns", "first", {})
    while cluster.collect():
        pass
    assert [one["metadata"]["name"] for one in server.all("configmaps")] == ["both", "second"]


@pytest.mark.parametrize(
    ("text", "canonical"),
    [("1000m", "1"), ("1024Mi", "1Gi"), ("0.5", "500m"), ("1500Mi", "1500Mi"), ("2000k", "2M"), ("0", "0"), (8, "8"),
     ("1.5Gi", "1536Mi"), ("100", "100")],
)  # fmt: skip
def test_quantities_have_one_form(text, canonical):
    assert quantity(text) == canonical


def test_managed_fields_survive_the_wire():
    paths = {("f:data", "f:a"), ("f:spec", 'k:{"name":"x"}'), ("f:spec", 'k:{"name":"x"}', "f:image"), ("f:m", 'v:"y"')}
    assert decoded(encoded(paths)) == paths


@pytest.mark.parametrize(
    ("spoil", "field"),
    [
        (lambda version: version["schema"]["openAPIV3Schema"].pop("type"), "type"),
        (lambda version: version.update(storage=False), "storage version"),
        (lambda version: version.pop("schema"), "schema"),
        (lambda version: version["schema"]["openAPIV3Schema"]["properties"]["spec"].update(
            {"x-kubernetes-validations": [{"rule": "self.text ==="}]}), "compilation failed"),
    ],
)  # fmt: skip
def test_a_definition_that_is_none_is_refused(spoil, field):
    import copy

    from tests.fakes.kubernetes.errors import Refusal
    from tests.support.sample_operator import CRD

    crd = copy.deepcopy(CRD)
    spoil(crd["spec"]["versions"][0])
    server = ApiServer()
    served = server.served("customresourcedefinitions")
    with pytest.raises(Refusal, match=field):
        server.cluster.create(served, "", crd, manager="m", strict=True)


def test_resources_of_a_definition_go_with_it():
    from tests.support.sample_operator import CRD

    server = ApiServer()
    definitions = server.served("customresourcedefinitions")
    server.cluster.create(definitions, "", CRD, manager="m", strict=True)
    server.cluster.create(server.served("greetings"), "ns", greeting("g"), manager="m", strict=True)
    server.cluster.delete(definitions, "", CRD["metadata"]["name"], {})
    assert all("greetings" not in place[0] for place in server.cluster.store.objects)
