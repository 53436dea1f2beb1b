"""EndpointSlices and pods -> workers."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.config import WorkerSettings
from helios.kube.endpoints import EndpointSlice
from router.discovery.endpoints import asleep, workers_of
from router.discovery.objects import Pod, Service, decode
from tests.fakes.kubernetes import endpoint, endpoint_slice, pod, service

SERVES = {"helios.dev/models": "org/m"}


def slices(*ones):
    return [decode(json.dumps(one), EndpointSlice) for one in ones]


def pods(*ones):
    return [decode(json.dumps(one), Pod) for one in ones]


def found(these, those, port="http"):
    found = workers_of(these, those, port)
    return {(one.model, one.url): one for one in found.workers}, list(found.problems)


def only(these, those, port="http") -> WorkerSettings:
    workers, problems = found(these, those, port)
    assert not problems
    (worker,) = workers.values()
    return worker


def test_what_services_say_of_a_model_that_sleeps_does_not_depend_on_their_order():
    notes = {"helios.dev/model": "team/chat"}
    ones = [
        decode(json.dumps(service(name, annotations=notes, labels=labels)), Service)
        for name, labels in (("a", {"helios.dev/max-queued": "7"}), ("b", {"helios.dev/max-queued": "3"}), ("c", {}))
    ]
    told = asleep(ones)
    assert told == asleep(reversed(ones))
    assert [one.max_queued for one in told.workers] == [3, 7, None]


def test_an_endpoint_is_what_its_pod_says():
    notes = {
        "helios.dev/models": "org/m, alias", "helios.dev/role": "decode", "helios.dev/revision": "c" * 40,
        "helios.dev/weight": "2.5", "helios.dev/adapters": "b,a", "helios.dev/scheme": "https",
    }  # fmt: skip
    workers, problems = found(
        slices(endpoint_slice("s", [endpoint("10.0.0.1", "p", ready=True)])),
        pods(pod("p", "10.0.0.1", annotations=notes)),
    )
    assert problems == []
    assert sorted(workers) == [("alias", "https://10.0.0.1:8000"), ("org/m", "https://10.0.0.1:8000")]
    assert workers["org/m", "https://10.0.0.1:8000"] == WorkerSettings(
        model="org/m", url="https://10.0.0.1:8000", role="decode", revision="c" * 40, weight=2.5, adapters=["a", "b"]
    )


def test_a_weight_of_a_service_counts_for_its_pods_and_none_is_no_new_requests():
    for weight, expected in (("0", (1.0, True)), ("12.5", (12.5, False))):
        one = endpoint_slice("s", [endpoint("10.0.0.1", "p", ready=True)], labels={"helios.dev/weight": weight})
        worker = only(slices(one), pods(pod("p", "10.0.0.1", annotations=SERVES)))
        assert (worker.weight, worker.cordoned) == expected


def test_a_service_s_limits_count_for_its_pods_and_wrong_ones_leave_them_out():
    labels = {"helios.dev/max-in-flight": "8", "helios.dev/max-queued": "0"}
    one = endpoint_slice("s", [endpoint("10.0.0.1", "p", ready=True)], labels=labels)
    worker = only(slices(one), pods(pod("p", "10.0.0.1", annotations=SERVES)))
    assert (worker.max_in_flight, worker.max_queued) == (8, 0)
    for wrong in ("0", "-1", "x", "1.5"):
        one = endpoint_slice("s", [endpoint("10.0.0.1", "p")], labels={"helios.dev/max-in-flight": wrong})
        workers, (problem,) = found(slices(one), pods(pod("p", "10.0.0.1", annotations=SERVES)))
        assert not workers
        assert "max_in_flight" in problem


def test_labels_of_the_slice_do_where_no_pods_are_looked_at():
    one = endpoint_slice("s", [endpoint("10.0.0.1", "p"), endpoint("10.0.0.2", None)], labels={"helios.dev/model": "m"})
    workers, problems = found(slices(one), None)
    assert (sorted(url for _, url in workers), problems) == (["http://10.0.0.1:8000", "http://10.0.0.2:8000"], [])


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ({}, "used"),
        ({"ready": None, "terminating": None}, "used"),
        ({"ready": True}, "used"),
        ({"ready": False, "serving": False}, "cordoned"),
        ({"ready": False, "serving": True, "terminating": True}, "gone"),
        ({"ready": True, "terminating": True}, "gone"),  # publishNotReadyAddresses
    ],
)
def test_what_terminates_is_gone_and_what_is_not_ready_stays_known(conditions, expected):
    one = slices(endpoint_slice("s", [endpoint("10.0.0.1", "p", **conditions)]))
    workers, problems = found(one, pods(pod("p", "10.0.0.1", annotations=SERVES)))
    assert problems == []
    assert [worker.cordoned for worker in workers.values()] == {"used": [False], "cordoned": [True], "gone": []}[
        expected
    ]


def test_a_pod_that_ends_is_gone_whatever_its_slice_still_says():
    one = slices(endpoint_slice("s", [endpoint("10.0.0.1", "p", ready=True)]))
    assert found(one, pods(pod("p", "10.0.0.1", ending=True, annotations=SERVES))) == ({}, [])


def test_pods_alone():
    good = pod("p", "fd00::1", annotations=SERVES)
    done = pod("q", "10.0.0.2", annotations=SERVES)
    done["status"]["phase"] = "Succeeded"
    worker = only(None, pods(good, done, pod("r", None, annotations=SERVES)))
    assert (worker.url, worker.cordoned) == ("http://[fd00::1]:8000", False)
    assert only(None, pods(pod("p", "10.0.0.1", ready=False, annotations=SERVES))).cordoned


def test_a_pod_in_several_slices_is_one_worker():
    both = [
        endpoint_slice("a", [endpoint("10.0.0.1", "p", ready=True)]),
        endpoint_slice("b", [endpoint("fd00::1", "p", ready=True)], family="IPv6"),
        endpoint_slice("c", [endpoint("10.0.0.1", "p", ready=False)]),
    ]
    assert only(slices(*both), pods(pod("p", "10.0.0.1", annotations=SERVES))) == WorkerSettings(
        model="org/m", url="http://10.0.0.1:8000"
    )


def test_an_address_that_went_to_another_pod_takes_requests():
    old = endpoint("10.0.0.1", "a", ready=False)
    new = endpoint("10.0.0.1", "b", ready=True)
    there = pods(pod("a", "10.0.0.1", annotations=SERVES), pod("b", "10.0.0.1", annotations=SERVES))
    assert not only(slices(endpoint_slice("s", [old, new])), there).cordoned


def test_a_pod_of_the_same_name_that_is_not_the_endpoints_says_nothing_of_it():
    one = slices(endpoint_slice("s", [endpoint("10.0.0.1", "p", uid="before")]))
    assert found(one, pods(pod("p", "10.0.0.9", annotations=SERVES))) == ({}, [])
    assert found(one, pods()) == ({}, []), "nor does a pod that does not fit"


@pytest.mark.parametrize(
    ("ports", "wanted", "notes", "number"),
    [
        ([{"name": "metrics", "port": 9}, {"name": "http", "port": 8000}], "http", {}, 8000),
        ([{"name": "metrics", "port": 9}, {"name": "http", "port": 8000}], "9", {}, 9),
        ([{"name": "", "port": 8001}], "http", {}, 8001),
        ([{"name": "a", "port": 1}, {"name": "b", "port": 2}], "http", {"helios.dev/port": "b"}, 2),
        ([{"name": "a", "port": 1}, {"name": "b", "port": 2}], "http", {"helios.dev/port": "7000"}, 7000),
        (None, "8000", {}, 8000),
    ],
)
def test_ports(ports, wanted, notes, number):
    one = slices(endpoint_slice("s", [endpoint("10.0.0.1", "p")], ports=ports))
    worker = only(one, pods(pod("p", "10.0.0.1", annotations=SERVES | notes)), wanted)
    assert worker.url == f"http://10.0.0.1:{number}"


@pytest.mark.parametrize(
    ("notes", "ports", "named"),
    [
        ({}, None, "helios.dev/models"),
        ({"helios.dev/models": " , "}, None, "helios.dev/models"),
        (SERVES | {"helios.dev/role": "boss"}, None, "boss"),
        (SERVES | {"helios.dev/weight": "-1"}, None, "weight"),
        (SERVES | {"helios.dev/weight": "much"}, None, "weight"),
        (SERVES | {"helios.dev/scheme": "gopher"}, None, "gopher"),
        (SERVES | {"helios.dev/port": "99999"}, [{"name": "a", "port": 1}, {"name": "b", "port": 2}], "99999"),
        (SERVES, [{"name": "a", "port": 1}, {"name": "b", "port": 2}], "no port 'http', but a 1, b 2"),
        (SERVES, [], "no port 'http', but none"),
    ],
)
def test_what_cant_be_used_is_named_and_the_others_are_workers(notes, ports, named):
    more = {} if ports is None else {"ports": ports}
    these = slices(
        endpoint_slice("s", [endpoint("10.0.0.1", "bad")], **more), endpoint_slice("t", [endpoint("10.0.0.2", "good")])
    )
    workers, (problem,) = found(
        these, pods(pod("bad", "10.0.0.1", annotations=notes), pod("good", "10.0.0.2", annotations=SERVES))
    )
    assert list(workers) == [("org/m", "http://10.0.0.2:8000")]
    assert problem.startswith("ns/bad: ")
    assert named in problem


def test_nulls_of_every_kind_are_nothing():
    text = '{"metadata": {"name": "s", "labels": null}, "addressType": "IPv4", "endpoints": null, "ports": null}'
    assert workers_of([decode(text, EndpointSlice)], None, "http").workers == ()
    text = '{"metadata": {"name": "p"}, "spec": {"containers": [{"ports": null}]}, "status": {"conditions": null}}'
    assert workers_of(None, [decode(text, Pod)], "http").workers == ()


NAMES = st.sampled_from(["a", "b", "c"])
IPS = st.sampled_from(["10.0.0.1", "10.0.0.2", "10.0.0.3"])
MAYBE = st.sampled_from([None, True, False])
NOTES = st.fixed_dictionaries(
    {}, optional={
        "helios.dev/models": st.sampled_from(["m", "m,n", ""]), "helios.dev/weight": st.sampled_from(["1", "2", "x"]),
        "helios.dev/port": st.sampled_from(["http", "9", "zz"]),
    },
)  # fmt: skip
ENDPOINTS = st.builds(
    lambda ip, name, uid, ready, terminating: endpoint(ip, name, uid=uid, ready=ready, terminating=terminating),
    IPS, st.none() | NAMES, st.sampled_from([None, "other"]), MAYBE, MAYBE,
)  # fmt: skip
PORTS = st.lists(
    st.sampled_from([{"name": "http", "port": 8000}, {"name": "x", "port": 9}, {"port": None}]), max_size=3
)
SLICES = st.lists(
    st.builds(
        lambda name, ends, ports, family, notes: endpoint_slice(name, ends, ports=ports, family=family, labels=notes),
        NAMES, st.lists(ENDPOINTS, max_size=4), PORTS, st.sampled_from(["IPv4", "IPv6", "Carrier"]), NOTES,
    ),
    max_size=3, unique_by=lambda one: one["metadata"]["name"],
)  # fmt: skip
PODS = st.lists(
    st.builds(
        lambda name, ip, ready, ending, notes: pod(name, ip, ready=ready, ending=ending, annotations=notes),
        NAMES, st.none() | IPS, st.booleans(), st.booleans(), NOTES,
    ),
    max_size=3, unique_by=lambda one: one["metadata"]["name"],
)  # fmt: skip


@given(st.none() | SLICES, st.none() | PODS, st.randoms(use_true_random=False))
def test_every_order_gives_the_same_workers_once_each(these, those, shuffled: random.Random):
    ours, theirs = (None if these is None else slices(*these)), (None if those is None else pods(*those))
    first = workers_of(ours, theirs, "http")
    for one in (ours, theirs):
        if one is not None:
            shuffled.shuffle(one)
    assert workers_of(ours, theirs, "http") == first
    keys = [(one.url, one.model) for one in first.workers]
    assert len(set(keys)) == len(keys)
    by_url = {}
    for one in first.workers:
        by_url.setdefault(one.url, set()).add((one.role, one.cordoned, one.weight))
    assert all(len(said) == 1 for said in by_url.values()), "a worker is the same for all its models"
    if ours is not None and theirs is not None:
        pods_there = {(p.metadata.name, p.metadata.uid) for p in theirs}
        able = {
            e.addresses[0] for s in ours for e in s.endpoints or ()
            if e.target_ref and (e.target_ref.name, e.target_ref.uid) in pods_there
        }  # fmt: skip
        assert {one.url.split("//")[1].split(":")[0] for one in first.workers} <= able
