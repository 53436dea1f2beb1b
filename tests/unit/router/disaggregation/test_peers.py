"""Where prefill workers are met: as each source says it, and as they say themselves."""

from __future__ import annotations

import json

import msgspec
import pytest

from helios.errors import InvalidInput, UsageError
from router.disaggregation.bootstrap import bootstrap_of, query_url, wrong_with
from router.disaggregation.connectors import MOONCAKE, NIXL, NIXL_PUSH, SGLANG
from router.disaggregation.peers import Peers
from router.discovery.endpoints import workers_of
from router.discovery.file import parse
from router.discovery.objects import Pod, decode
from router.discovery.registration import Registration
from router.worker import Worker
from router.workers import Workers, parse_worker
from tests.fakes.kubernetes import pod
from tests.support.splitting import PUSHED


def worker(text: str = "m=http://p:1,role=prefill") -> Worker:
    (one,) = Workers([parse_worker(text)], lambda: 0.0).all
    return one


@pytest.mark.parametrize(
    ("said", "at", "query"),
    [
        ("", ("p", 8998), "http://p:8998"),
        ("9001", ("p", 9001), "http://p:9001"),
        ("10.0.0.9:9001", ("10.0.0.9", 9001), "http://10.0.0.9:9001"),
        ("[fd00::1]:9001", ("fd00::1", 9001), "http://[fd00::1]:9001"),
    ],
)
def test_it_is_a_port_of_the_workers_host_or_a_place_of_its_own(said: str, at: tuple[str, int], query: str) -> None:
    one = worker("m=http://p:1,role=prefill" + (f",bootstrap={said}" if said else ""))
    assert bootstrap_of(one) == at
    assert query_url(one) == query
    assert wrong_with(said) == ""


@pytest.mark.parametrize(
    "said",
    ["0", "65536", "x", ":9001", "h:", "http://h:1", "h:1/x", "fd00::1", "fd00::1:9001", "[h]:1", "*:1", "a@b:1", "-1"],
)
def test_what_is_no_place_is_refused_by_every_source(said: str) -> None:
    with pytest.raises(UsageError):
        parse_worker(f"m=http://p:1,role=prefill,bootstrap={said}")
    with pytest.raises(UsageError, match="bootstrap"):
        parse(f'[[workers]]\nmodel = "m"\nurl = "http://p:1"\nbootstrap = "{said}"\n'.encode())
    with pytest.raises(InvalidInput, match="bootstrap"):
        Registration(url="http://p:1", models=["m"], bootstrap=said).settings()
    notes = {"helios.dev/model": "m", "helios.dev/bootstrap": said}
    found = workers_of(None, [decode(json.dumps(pod("p", "10.0.0.1", annotations=notes)), Pod)], "http")
    assert not found.workers
    assert "bootstrap" in found.problems[0]


def test_each_source_says_it() -> None:
    (one,) = parse(b'[[workers]]\nmodel = "m"\nurl = "http://p:1"\nbootstrap = "9001"\n').workers
    assert one.bootstrap == "9001"
    (one,) = Registration(url="http://p:1", models=["m"], bootstrap="h:9001").settings()
    assert one.bootstrap == "h:9001"
    notes = {"helios.dev/model": "m", "helios.dev/bootstrap": "9001"}
    (one,) = workers_of(None, [decode(json.dumps(pod("p", "10.0.0.1", annotations=notes)), Pod)], "http").workers
    assert one.bootstrap == "9001"


def test_a_port_of_that_name_counts_where_no_annotation_says_it() -> None:
    there = pod("p", "10.0.0.1", annotations={"helios.dev/model": "m"})
    there["spec"]["containers"][0]["ports"] = [
        {"name": "http", "containerPort": 8000}, {"name": "bootstrap", "containerPort": 9001},
    ]  # fmt: skip
    (one,) = workers_of(None, [decode(json.dumps(there), Pod)], "http").workers
    assert one.bootstrap == "9001"


def test_of_two_sources_that_contradict_each_other_the_first_counts() -> None:
    workers = Workers([parse_worker("m=http://p:1,bootstrap=9001")], lambda: 0.0)
    problems = workers.apply("file", [parse_worker("n=http://p:1,bootstrap=9002")])
    assert "bootstraps: 9001 and 9002" in problems[0]
    problems = workers.apply("file", [parse_worker("n=http://p:1")])
    (one,) = workers.all
    assert (problems, one.bootstrap, one.models) == ([], "9001", ["m", "n"])


def test_sglangs_is_known_from_the_settings() -> None:
    known = Peers(SGLANG).of(worker("m=http://p:1,bootstrap=[fd00::1]:9001"))
    assert known == {"bootstrap_host": b'"[fd00::1]"', "bootstrap_port": b"9001"}
    assert Peers(NIXL).of(worker()) == {}


def test_mooncakes_engines_are_used_in_turn_until_the_worker_is_another_one() -> None:
    peers, one = Peers(MOONCAKE), worker()
    assert peers.of(one) is None
    engines = {"0": {"engine_id": "e-0", "worker_addr": {}}, "1": {"engine_id": "e-1", "worker_addr": {}}}
    assert peers.queried(one, json.dumps(engines).encode())
    found = [peers.of(one) or {} for _ in range(4)]
    assert sorted((known["rank"], known["engine_id"]) for known in found) == [
        (b"0", b'"e-0"'), (b"0", b'"e-0"'), (b"1", b'"e-1"'), (b"1", b'"e-1"'),
    ]  # fmt: skip
    assert {known["bootstrap_addr"] for known in found} == {b'"http://p:8998"'}
    one.bootstrap = "9001"
    assert peers.of(one) is None
    one.bootstrap = ""
    one.begins_anew()
    assert peers.of(one) is None
    assert not peers.queried(one, b"{}")
    with pytest.raises(msgspec.DecodeError):
        peers.queried(one, b"[]")


def test_nixls_is_what_an_answer_says_and_another_answer_is_another_worker() -> None:
    peers, one = Peers(NIXL_PUSH), worker()
    assert not peers.answered(one, b'{"remote_engine_id": "e"}')
    assert peers.answered(one, json.dumps(PUSHED).encode())
    assert peers.of(one) == {
        "remote_engine_id": b'"e"', "remote_host": b'"10.0.0.5"', "remote_port": b"5600", "tp_size": b"1",
        "dcp_size": b"1", "pp_size": b"1",
    }  # fmt: skip
    assert peers.still(one, json.dumps(PUSHED | {"remote_block_ids": [[9]]}).encode())
    assert not peers.still(one, json.dumps(PUSHED | {"remote_port": 5601}).encode())
    assert peers.of(one) is None
    assert not peers.still(one, b"[]")


def test_workers_that_are_gone_are_forgotten() -> None:
    peers, one = Peers(NIXL_PUSH), worker()
    peers.answered(one, json.dumps(PUSHED).encode())
    peers.keep(["http://p:1"])
    assert peers.of(one) is not None
    peers.keep([])
    assert peers.of(one) is None
