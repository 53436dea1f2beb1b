"""What clients of a Kubernetes API server rely on, as scenarios that run against the fake one and against a real one.

Each takes an ``Api`` and a namespace of its own. They say in code what the fake claims: a claim that is wrong fails
against the real server (tests/cluster/test_api.py), one that the fake does not hold fails in tests/unit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from helios.kube.kinds import CONFIG_MAP, CUSTOM_RESOURCE, DEPLOYMENT, LEASE, NAMESPACE, Kind
from helios.kube.reflector import Refused
from orchestrator.runtime.writes import APPLY, MERGE, call
from tests.support.sample_operator import CRD, GREETING, deployment, greeting

JSON_PATCH = "application/json-patch+json"
Scenario = Callable[["Api", str], Awaitable[None]]
SCENARIOS: list[Scenario] = []


def scenario(run: Scenario) -> Scenario:
    SCENARIOS.append(run)
    return run


class Api:
    """Calls through the official client."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def __call__(self, method: str, path: str, body: Any = None, **options: Any) -> dict[str, Any]:
        content_type = options.pop("content_type", "application/json")
        query = {"fieldManager": options.pop("manager", "tests")} if method not in ("GET", "DELETE") else {}
        return await call(
            self._client, method, path, timeout_s=20, body=body, content_type=content_type, query=query | options
        )  # fmt: skip

    async def get(self, kind: Kind, namespace: str, name: str, sub: str = "") -> dict[str, Any]:
        return await self("GET", kind.path(namespace, name, sub))

    async def create(self, kind: Kind, namespace: str, one: dict[str, Any], **options: Any) -> dict[str, Any]:
        return await self("POST", kind.path(namespace), one, **options)

    async def apply(
        self, kind: Kind, namespace: str, one: dict[str, Any], manager: str, *, force: bool = False, sub: str = ""
    ) -> dict[str, Any]:  # fmt: skip
        path = kind.path(namespace, one["metadata"]["name"], sub)
        return await self("PATCH", path, one, content_type=APPLY, manager=manager, force=str(force).lower())

    async def merge(self, kind: Kind, namespace: str, name: str, patch: Any, sub: str = "", **options: Any) -> Any:
        return await self("PATCH", kind.path(namespace, name, sub), patch, content_type=MERGE, **options)

    async def refused(self, doing: Awaitable[Any]) -> Refused:
        with pytest.raises(Refused) as caught:
            await doing
        return caught.value

    async def gone(self, kind: Kind, namespace: str, name: str) -> None:
        """Wait until it is."""
        async with asyncio.timeout(60):
            while True:
                try:
                    await self.get(kind, namespace, name)
                except Refused as error:
                    if error.status != 404:
                        raise
                    return
                await asyncio.sleep(0.05)

    async def prepared(self, namespace: str) -> None:
        """The namespace and the sample's definition are there."""
        for kind, one in ((NAMESPACE, {"metadata": {"name": namespace}}), (CUSTOM_RESOURCE, CRD)):
            try:
                await self.create(kind, "", {"apiVersion": kind.api_version, "kind": kind.kind, **one})
            except Refused as error:
                if error.code != "AlreadyExists":
                    raise
        async with asyncio.timeout(30):
            while True:
                try:
                    await self("GET", GREETING.path(namespace))
                    return
                except Refused:
                    await asyncio.sleep(0.05)


def config_map(name: str = "c", **data: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}


def managers(one: dict[str, Any]) -> set[tuple[str, str]]:
    return {(each["manager"], each["operation"]) for each in one["metadata"].get("managedFields", ())}


@scenario
async def versions_are_compared(api: Api, ns: str) -> None:
    one = await api.create(CONFIG_MAP, ns, config_map(a="1"))
    two = await api.merge(CONFIG_MAP, ns, "c", {"data": {"a": "2"}})
    assert int(two["metadata"]["resourceVersion"]) > int(one["metadata"]["resourceVersion"])
    error = await api.refused(api("PUT", CONFIG_MAP.path(ns, "c"), one))
    assert (error.status, error.code) == (409, "Conflict")
    same = await api.merge(CONFIG_MAP, ns, "c", {"data": {"a": "2"}})
    assert same["metadata"]["resourceVersion"] == two["metadata"]["resourceVersion"], "nothing changed"
    stale = {"metadata": {"resourceVersion": one["metadata"]["resourceVersion"]}, "data": {"a": "3"}}
    assert (await api.refused(api.merge(CONFIG_MAP, ns, "c", stale))).status == 409
    error = await api.refused(api.create(CONFIG_MAP, ns, config_map()))
    assert (error.status, error.code) == (409, "AlreadyExists")
    assert (await api.refused(api.get(CONFIG_MAP, ns, "nobody"))).status == 404


@scenario
async def json_patches_are_applied_whole_or_not_at_all(api: Api, ns: str) -> None:
    await api.create(CONFIG_MAP, ns, config_map(a="1", b="2"))
    path = CONFIG_MAP.path(ns, "c")
    steps = [{"op": "replace", "path": "/data/a", "value": "9"}, {"op": "test", "path": "/data/b", "value": "x"}]
    assert (await api.refused(api("PATCH", path, steps, content_type=JSON_PATCH))).status == 422
    assert (await api.get(CONFIG_MAP, ns, "c"))["data"] == {"a": "1", "b": "2"}
    steps[1]["value"] = "2"
    assert (await api("PATCH", path, steps, content_type=JSON_PATCH))["data"]["a"] == "9"


@scenario
async def what_is_applied_may_have_any_text(api: Api, ns: str) -> None:
    """Bodies are read as YAML, which has neither pairs of surrogates nor control characters as they are."""
    odd = "".join(map(chr, (*range(1, 0x100), 0x2028, 0x2029, 0xFEFF, 0xFFFD, 0xFFFE, 0xFFFF, 0x1F600, 0x10FFFF)))
    texts = {"a": odd, "b": "\\ud83d\\ude00", "c": f" {odd[:40]}\n\n  \t"}
    applied = await api.apply(CONFIG_MAP, ns, config_map(**texts), "one")
    assert applied["data"] == texts
    assert (await api.get(CONFIG_MAP, ns, "c"))["data"] == texts


@scenario
async def deletion_has_preconditions(api: Api, ns: str) -> None:
    one = await api.create(CONFIG_MAP, ns, config_map())
    metadata = one["metadata"]
    for wrong in ({"uid": "00000000-0000-0000-0000-000000000000"}, {"resourceVersion": "1"}):
        options = {"preconditions": {"uid": metadata["uid"], "resourceVersion": metadata["resourceVersion"]} | wrong}
        assert (await api.refused(api("DELETE", CONFIG_MAP.path(ns, "c"), options))).status == 409
    right = {"uid": metadata["uid"], "resourceVersion": metadata["resourceVersion"]}
    answer = await api("DELETE", CONFIG_MAP.path(ns, "c"), {"preconditions": right})
    assert answer["status"] == "Success"
    await api.gone(CONFIG_MAP, ns, "c")


@scenario
async def finalizers_hold_an_object(api: Api, ns: str) -> None:
    one = config_map()
    one["metadata"]["finalizers"] = ["tests.helios.dev/a", "tests.helios.dev/b"]
    await api.create(CONFIG_MAP, ns, one)
    waiting = await api("DELETE", CONFIG_MAP.path(ns, "c"))
    assert waiting["kind"] == "ConfigMap"
    assert waiting["metadata"]["deletionTimestamp"]
    more = {"metadata": {"finalizers": ["tests.helios.dev/c"]}}
    assert (await api.refused(api.merge(CONFIG_MAP, ns, "c", more))).status == 422
    fewer = {"metadata": {"finalizers": ["tests.helios.dev/b"]}}
    await api.merge(CONFIG_MAP, ns, "c", fewer)
    last = await api.merge(CONFIG_MAP, ns, "c", {"metadata": {"finalizers": None}})
    assert last["metadata"]["deletionTimestamp"]
    await api.gone(CONFIG_MAP, ns, "c")


@scenario
async def apply_creates_and_owns_fields(api: Api, ns: str) -> None:
    one = await api.apply(CONFIG_MAP, ns, config_map(a="1", b="2"), "first")
    assert managers(one) == {("first", "Apply")}
    same = await api.apply(CONFIG_MAP, ns, config_map(a="1", b="2"), "first")
    assert same["metadata"]["resourceVersion"] == one["metadata"]["resourceVersion"], "nothing changed"
    less = await api.apply(CONFIG_MAP, ns, config_map(a="1"), "first")
    assert less["data"] == {"a": "1"}, "what is applied no more is removed"
    more = await api.merge(CONFIG_MAP, ns, "c", {"data": {"theirs": "x"}}, manager="somebody")
    assert managers(more) == {("first", "Apply"), ("somebody", "Update")}
    kept = await api.apply(CONFIG_MAP, ns, config_map(a="2"), "first")
    assert kept["data"] == {"a": "2", "theirs": "x"}, "what others own stays"


@scenario
async def apply_conflicts_name_the_manager_unless_forced(api: Api, ns: str) -> None:
    await api.apply(CONFIG_MAP, ns, config_map(a="1"), "first")
    await api.merge(CONFIG_MAP, ns, "c", {"data": {"a": "drifted"}}, manager="somebody")
    error = await api.refused(api.apply(CONFIG_MAP, ns, config_map(a="1"), "first"))
    assert (error.status, error.code) == (409, "Conflict")
    assert "somebody" in error.message
    assert ".data.a" in error.message
    agreed = await api.apply(CONFIG_MAP, ns, config_map(a="drifted"), "second")
    assert ("second", "Apply") in managers(agreed), "the same value is owned together"
    forced = await api.apply(CONFIG_MAP, ns, config_map(a="1"), "first", force=True)
    assert (forced["data"], managers(forced)) == ({"a": "1"}, {("first", "Apply")})
    gone = await api.apply(CONFIG_MAP, ns, config_map(), "first")
    assert not gone.get("data")


@scenario
async def a_field_of_two_stays_until_the_second_gives_it_up(api: Api, ns: str) -> None:
    await api.apply(CONFIG_MAP, ns, config_map(a="1", b="1"), "first")
    await api.apply(CONFIG_MAP, ns, config_map(a="1"), "second")
    one = await api.apply(CONFIG_MAP, ns, config_map(b="1"), "first")
    assert one["data"] == {"a": "1", "b": "1"}
    assert (await api.apply(CONFIG_MAP, ns, config_map(), "second"))["data"] == {"b": "1"}


@scenario
async def apply_with_the_uid_of_another_object_is_refused(api: Api, ns: str) -> None:
    stranger = config_map(a="1")
    stranger["metadata"]["uid"] = "00000000-0000-0000-0000-000000000000"
    assert (await api.refused(api.apply(CONFIG_MAP, ns, stranger, "first"))).status == 409
    await api.apply(CONFIG_MAP, ns, config_map(a="1"), "first")
    refused = await api.refused(api.apply(CONFIG_MAP, ns, stranger, "first", force=True))
    assert refused.status == 422
    assert "metadata.uid: Invalid value" in refused.message


@scenario
async def lists_with_keys_are_owned_element_by_element(api: Api, ns: str) -> None:
    parent = await api.create(GREETING, ns, greeting("g", namespace=ns))
    wanted = deployment(_ref(parent, ns), "x")
    await api.apply(DEPLOYMENT, ns, wanted, "first")
    sidecar = {"spec": {"template": {"spec": {"containers": [{"name": "sidecar", "image": "mesh:1"}]}}}}
    other = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "g"}, **sidecar}
    both = await api.apply(DEPLOYMENT, ns, other, "mesh")
    assert {one["name"] for one in both["spec"]["template"]["spec"]["containers"]} == {"main", "sidecar"}
    again = await api.apply(DEPLOYMENT, ns, wanted, "first")
    assert again["metadata"]["resourceVersion"] == both["metadata"]["resourceVersion"]
    wanted["spec"]["template"]["spec"]["containers"][0]["env"] = [{"name": "NEW", "value": "1"}]
    (main,) = [
        one for one in (await api.apply(DEPLOYMENT, ns, wanted, "first"))["spec"]["template"]["spec"]["containers"]
        if one["name"] == "main"
    ]  # fmt: skip
    assert main["env"] == [{"name": "NEW", "value": "1"}]
    bare = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "g"}}
    alone = await api.apply(DEPLOYMENT, ns, bare, "mesh")
    assert [one["name"] for one in alone["spec"]["template"]["spec"]["containers"]] == ["main"]


@scenario
async def built_in_kinds_get_defaults_and_normal_forms(api: Api, ns: str) -> None:
    parent = await api.create(GREETING, ns, greeting("g", namespace=ns))
    one = await api.apply(DEPLOYMENT, ns, deployment(_ref(parent, ns), "x"), "first")
    (main,) = one["spec"]["template"]["spec"]["containers"]
    assert main["resources"]["requests"] == {"cpu": "1", "memory": "1Gi"}
    assert (main["imagePullPolicy"], main["ports"][0]["protocol"]) == ("IfNotPresent", "TCP")
    assert (one["spec"]["replicas"], one["metadata"]["generation"]) == (1, 1)
    assert one["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": "25%", "maxUnavailable": "25%"}


@scenario
async def wrong_objects_are_refused(api: Api, ns: str) -> None:
    parent = await api.create(GREETING, ns, greeting("g", namespace=ns))
    wanted = deployment(_ref(parent, ns), "x")
    wanted["spec"]["unknown"] = 1
    error = await api.refused(api.create(DEPLOYMENT, ns, wanted, fieldValidation="Strict"))
    assert error.status == 400
    assert 'unknown field "spec.unknown"' in error.message
    del wanted["spec"]["unknown"]
    del wanted["spec"]["template"]["spec"]["containers"][0]["name"]
    assert (await api.refused(api.create(DEPLOYMENT, ns, wanted))).status == 422
    named = config_map("UPPER")
    assert (await api.refused(api.create(CONFIG_MAP, ns, named))).status == 422
    error = await api.refused(api.create(CONFIG_MAP, f"{ns}-nowhere", config_map()))
    assert (error.status, error.code) == (404, "NotFound")


@scenario
async def the_generation_counts_changes_of_the_spec(api: Api, ns: str) -> None:
    one = await api.create(GREETING, ns, greeting("g", namespace=ns))
    assert one["metadata"]["generation"] == 1
    labelled = await api.merge(GREETING, ns, "g", {"metadata": {"labels": {"a": "b"}}})
    assert labelled["metadata"]["generation"] == 1
    changed = await api.merge(GREETING, ns, "g", {"spec": {"text": "new"}, "status": {"replicas": 7}})
    assert (changed["metadata"]["generation"], changed.get("status")) == (2, None), "status is a subresource"
    told = await api.merge(GREETING, ns, "g", {"spec": {"text": "no"}, "status": {"replicas": 7}}, "status")
    assert (told["metadata"]["generation"], told["status"], told["spec"]["text"]) == (2, {"replicas": 7}, "new")


@scenario
async def statuses_are_applied_beside_specs(api: Api, ns: str) -> None:
    await api.create(GREETING, ns, greeting("g", namespace=ns))
    base = {"apiVersion": GREETING.api_version, "kind": "Greeting", "metadata": {"name": "g"}}
    one = await api.apply(GREETING, ns, base | {"status": {"replicas": 1, "more": "x"}}, "first", sub="status")
    assert one["status"] == {"replicas": 1, "more": "x"}
    less = await api.apply(GREETING, ns, base | {"status": {"replicas": 1}}, "first", sub="status")
    assert less["status"] == {"replicas": 1}
    assert less["spec"]["text"] == "hello"


@scenario
async def scale_is_a_subresource(api: Api, ns: str) -> None:
    await api.create(GREETING, ns, greeting("g", namespace=ns, replicas=2))
    scale = await api.get(GREETING, ns, "g", "scale")
    assert (scale["kind"], scale["spec"]["replicas"]) == ("Scale", 2)
    after = await api.merge(GREETING, ns, "g", {"spec": {"replicas": 5}}, "scale")
    assert after["spec"]["replicas"] == 5
    assert (await api.get(GREETING, ns, "g"))["spec"]["replicas"] == 5
    assert (await api.refused(api.merge(GREETING, ns, "g", {"spec": {"replicas": -1}}, "scale"))).status == 422


@scenario
async def custom_resources_are_pruned_filled_and_checked(api: Api, ns: str) -> None:
    one = await api.create(GREETING, ns, greeting("g", namespace=ns, unknown=1, parts=[{"name": "a"}]))
    assert one["spec"] == {"text": "hello", "replicas": 1, "deploy": True, "parts": [{"name": "a", "weight": 1}]}
    error = await api.refused(
        api.create(GREETING, ns, greeting("h", namespace=ns, unknown=1), fieldValidation="Strict")
    )  # fmt: skip
    assert (error.status, 'unknown field "spec.unknown"' in error.message) == (400, True)
    for spec, field in (
        ({"text": ""}, "spec.text"),
        ({"replicas": -1}, "spec.replicas"),
        ({"replicas": "x"}, "spec.replicas"),
    ):
        error = await api.refused(api.create(GREETING, ns, greeting("h", **{"namespace": ns, **spec})))
        assert (error.status, field in error.message) == (422, True), error.message
    missing = {"apiVersion": GREETING.api_version, "kind": "Greeting", "metadata": {"name": "h"}, "spec": {}}
    assert (await api.refused(api.create(GREETING, ns, missing))).status == 422


@scenario
async def rules_in_cel_are_kept(api: Api, ns: str) -> None:
    error = await api.refused(api.create(GREETING, ns, greeting("h", namespace=ns, deploy=False, replicas=2)))
    assert "more than one replica needs deploy" in error.message
    assert "spec.replicas" in error.message
    await api.create(GREETING, ns, greeting("g", namespace=ns, store="a"))
    error = await api.refused(api.merge(GREETING, ns, "g", {"spec": {"store": "b"}}))
    assert (error.status, "the store can't be changed" in error.message) == (422, True)
    await api.merge(GREETING, ns, "g", {"spec": {"text": "other"}})


@scenario
async def leases_are_created_once_and_swapped(api: Api, ns: str) -> None:
    lease = {
        "apiVersion": LEASE.api_version, "kind": "Lease", "metadata": {"name": "l"},
        "spec": {"holderIdentity": "a", "leaseDurationSeconds": 15, "renewTime": "2026-01-01T00:00:00.000000Z"},
    }  # fmt: skip
    one = await api.create(LEASE, ns, lease)
    assert (await api.refused(api.create(LEASE, ns, lease))).status == 409
    one["spec"]["holderIdentity"] = "b"
    two = await api("PUT", LEASE.path(ns, "l"), one)
    assert two["spec"]["holderIdentity"] == "b"
    assert (await api.refused(api("PUT", LEASE.path(ns, "l"), one))).status == 409


def _ref(one: dict[str, Any], namespace: str) -> Any:
    from orchestrator.actions import Ref

    return Ref(GREETING, namespace, one["metadata"]["name"], one["metadata"]["uid"])
