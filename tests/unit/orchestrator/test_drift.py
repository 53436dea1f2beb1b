"""What costs a write: a field of ours that is another one, and nothing else."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helios.kube import kinds
from helios.kube.kinds import Kind
from orchestrator.actions import Ref
from orchestrator.runtime.drift import DEFAULTS, KEYS, SETS, digest, same, shown
from tests.fakes.kubernetes.defaults import DEFAULTS as SERVER
from tests.fakes.kubernetes.fields import merge
from tests.fakes.kubernetes.schema import MAP, SET, Schema, builtin
from tests.support.sample_operator import GREETING, deployment

WRITTEN = (
    kinds.DEPLOYMENT, kinds.SERVICE, kinds.CONFIG_MAP, kinds.DISRUPTION_BUDGET, kinds.AUTOSCALER, kinds.NETWORK_POLICY,
    kinds.POD, kinds.PERSISTENT_VOLUME, kinds.PERSISTENT_VOLUME_CLAIM, kinds.SERVICE_ACCOUNT,
)  # fmt: skip


def lists(schema: Schema, within: str = "", name: str = "", seen: frozenset[str] = frozenset()):
    """(within, name, schema) of every list of a kind but those of its status."""
    reference = schema.raw.get("$ref", "")
    if reference in seen:
        return
    seen = seen | {reference} if reference else seen
    if "items" in schema.node:
        yield within, name, schema
        yield from lists(schema.element, within, name, seen)
    for field, raw in (schema.node.get("properties") or {}).items():
        if (within, name, field) != ("", "", "status") and field != "managedFields":
            yield from lists(Schema(raw), name, field, seen)


@pytest.mark.parametrize("kind", WRITTEN, ids=lambda kind: kind.kind)
def test_the_table_of_keys_is_what_kubernetes_says(kind: Kind):
    for within, name, schema in lists(builtin(kind.group, kind.version, kind.kind)):
        where = f"{kind.kind}: {name} in {within}"
        if schema.list_type == MAP and within:
            assert KEYS.get((within, name)) == schema.keys, where
        else:
            assert (within, name) not in KEYS, where
        # Sets are compared as a whole where nobody but us is to say anything.
        assert name not in SETS or schema.list_type == SET, where


def test_protocols_are_the_only_keys_that_are_left_out():
    assert DEFAULTS == {"protocol": "TCP"}


def stored(wanted):
    """As the API server would have it."""
    one = copy.deepcopy(wanted)
    SERVER["Deployment"](one)
    return one | {"status": {"replicas": 1}}


WANTED = deployment(Ref(GREETING, "ns", "g", "uid-g"), "hello")


def test_defaults_and_what_others_add_are_no_drift():
    wanted = copy.deepcopy(WANTED)
    wanted["spec"]["template"]["spec"]["containers"][0]["resources"] = {"requests": {"cpu": "1"}}
    found = stored(wanted)
    pod = found["spec"]["template"]["spec"]
    pod["containers"].insert(0, {"name": "sidecar", "image": "mesh:1"})
    pod["containers"][1]["env"].append({"name": "THEIRS", "value": "x"})
    found["spec"]["replicas"] = 7
    found["metadata"] |= {"annotations": {"theirs": "x"}, "finalizers": ["theirs"]}
    assert same(wanted, shown(wanted, found))


@pytest.mark.parametrize(
    "change",
    [
        lambda one: one["spec"]["template"]["spec"]["containers"][0].update(image="evil:1"),
        lambda one: one["spec"]["template"]["spec"]["containers"][0]["env"][0].update(value="x"),
        lambda one: one["spec"]["template"]["spec"]["containers"][0]["env"].clear(),
        lambda one: one["spec"]["template"]["spec"]["containers"][0].pop("ports"),
        lambda one: one["spec"]["template"]["spec"]["containers"].clear(),
        lambda one: one["metadata"]["labels"].clear(),
        lambda one: one["metadata"].pop("ownerReferences"),
        lambda one: one["metadata"]["ownerReferences"][0].update(controller=False),
        lambda one: one["spec"].update(template=None),
    ],
)
def test_what_is_ours_and_another_one_is_drift(change):
    found = stored(WANTED)
    change(found)
    assert not same(WANTED, shown(WANTED, found))


def test_an_atomic_list_is_ours_as_a_whole():
    policy = {"spec": {"ingress": [{"ports": [{"port": 80}]}]}}
    found = {"spec": {"ingress": [{"ports": [{"port": 80, "protocol": "TCP"}]}]}}
    assert same(policy, shown(policy, found))
    found["spec"]["ingress"][0]["ports"].append({"port": 22, "protocol": "TCP"})
    assert not same(policy, shown(policy, found))


def test_what_the_server_writes_its_own_way_is_known_by_its_digest():
    found = stored(WANTED)
    made = shown(WANTED, found)
    assert not same(WANTED, made), "1000m is 1"
    found["metadata"]["resourceVersion"] = "9"
    assert digest(shown(WANTED, found)) == digest(made)
    found["spec"]["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"] = "2"
    assert digest(shown(WANTED, found)) != digest(made)


def test_a_digest_does_not_go_by_the_order_of_keys():
    assert digest({"a": 1, "b": {"c": 2, "d": 3}}) == digest({"b": {"d": 3, "c": 2}, "a": 1})


values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["", "a", "b"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=12,
)
objects = st.dictionaries(st.sampled_from("abc"), values, max_size=3)


@given(live=objects, wanted=objects)
@settings(max_examples=200, deadline=None)
def test_what_was_applied_is_as_it_was_wanted(live, wanted):
    anything = Schema({"x-kubernetes-preserve-unknown-fields": True})
    after = merge(live, wanted, anything)
    assert same(wanted, shown(wanted, after))
    assert same(wanted, shown(wanted, wanted))


@given(wanted=objects, found=objects)
@settings(max_examples=200, deadline=None)
def test_nothing_to_do_means_that_applying_would_change_nothing_that_counts(wanted, found):
    anything = Schema({"x-kubernetes-preserve-unknown-fields": True})
    if same(wanted, shown(wanted, found)):
        assert emptied(merge(found, wanted, anything)) == emptied(found)


def emptied(value):
    """Without what is empty, which is as good as nothing."""
    if isinstance(value, dict):
        kept = {key: emptied(one) for key, one in value.items()}
        return {key: one for key, one in kept.items() if one not in ({}, [], None)} or None
    if isinstance(value, list):
        return [emptied(one) for one in value] or None
    return value
