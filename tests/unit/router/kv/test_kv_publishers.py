"""Where a worker publishes KV events, by what is said of it."""

from __future__ import annotations

import json
import re
from dataclasses import astuple
from typing import Any

import pytest

from helios.config import KvEventsSettings, RegistrySettings, RouterSettings, WorkerSettings
from helios.errors import UsageError
from helios.kube.endpoints import EndpointSlice
from router.checked import check
from router.discovery.endpoints import workers_of
from router.discovery.file import parse
from router.discovery.objects import Pod, decode
from router.discovery.registration import Registration
from router.kv.publishers import UNSAID, Said, apart, check_settings, publishers_of, wrong_with
from router.membership import said_of, spec_of, together
from router.workers import parse_worker
from tests.fakes.kubernetes import endpoint, endpoint_slice, pod

URL = "http://10.0.0.5:8000"
USUAL = KvEventsSettings(port=5557, replay_port=5558)


@pytest.mark.parametrize(
    ("url", "said", "settings", "expected"),
    [
        (URL, UNSAID, KvEventsSettings(), []),
        (URL, UNSAID, USUAL, [("tcp://10.0.0.5:5557", "tcp://10.0.0.5:5558")]),
        (URL, UNSAID, KvEventsSettings(port=5557), [("tcp://10.0.0.5:5557", None)]),
        (URL, Said("none"), USUAL, []),
        ("http://*:8000", UNSAID, USUAL, []),
        (URL, Said("6000"), KvEventsSettings(), [("tcp://10.0.0.5:6000", None)]),
        (URL, Said("6000", "none"), USUAL, [("tcp://10.0.0.5:6000", None)]),
        (URL, Said("tcp://kv:1", "2"), USUAL, [("tcp://kv:1", "tcp://10.0.0.5:2")]),
        ("https://[::1]:8000/a", UNSAID, USUAL, [("tcp://[::1]:5557", "tcp://[::1]:5558")]),
        (URL, Said("7", "9", 2), USUAL, [("tcp://10.0.0.5:7", "tcp://10.0.0.5:9"), ("tcp://10.0.0.5:8", "tcp://10.0.0.5:10")]),
        (URL, UNSAID, KvEventsSettings(port=65535, ranks=3), [("tcp://10.0.0.5:65535", None)]),
    ],
)  # fmt: skip
def test_a_place_is_an_endpoint_a_port_or_none(
    url: str, said: Said, settings: KvEventsSettings, expected: list[Any]
) -> None:
    assert [astuple(one) for one in publishers_of(url, said, settings)] == [(url, *ends, "") for ends in expected]


def test_a_place_of_two_workers_is_nobodys() -> None:
    one, two, three = (publishers_of(url, UNSAID, USUAL) for url in ("http://a:1", "http://a:2", "http://b:1"))
    assert apart([*one, *two, *three]) == (list(three), {"tcp://a:5557": ("http://a:1", "http://a:2")})


@pytest.mark.parametrize(
    ("said", "word"),
    [
        (Said("http://h:1"), "kv_events is wrong: 'http://h:1'"), (Said("0"), "'0' is not a port"),
        (Said("70000"), "not a port"), (Said("", "tcp://*:5"), "kv_replay is wrong"),
        (Said(ranks=-1), "kv_ranks is -1"), (Said(ranks=5000), "from 0 to 1024"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_and_left_out(said: Said, word: str) -> None:
    assert word in wrong_with(said)
    settings = WorkerSettings(model="m", url=URL, kv_events=said.events, kv_replay=said.replay, kv_ranks=said.ranks)
    spec, problems = spec_of(URL, [settings])
    assert spec is None
    assert word in problems[0]
    text = f'[[workers]]\nmodel = "m"\nurl = "{URL}"\nkv_events = "{said.events}"\nkv_replay = "{said.replay}"\n'
    with pytest.raises(UsageError, match=re.escape(word)):
        parse((text + f"kv_ranks = {said.ranks}\n").encode())


def test_what_several_say_of_one_worker_is_what_the_first_says() -> None:
    two = [WorkerSettings(model="m", url=URL), WorkerSettings(model="n", url=URL, kv_events="5")]
    first, _ = spec_of(URL, two)
    other, _ = spec_of(URL, [WorkerSettings(model="m", url=URL, kv_events="6")])
    assert first is not None
    assert other is not None
    assert first.kv == Said("5")
    assert together(URL, [("a", first), ("b", other)])[0].kv == Said("5")


def test_the_command_line_and_registrations_say_it_too() -> None:
    worker = parse_worker(f"m={URL},kv_events=5557,kv_replay=tcp://h:5")
    assert said_of(worker) == Said("5557", "tcp://h:5")
    with pytest.raises(UsageError, match="kv_events=x"):
        parse_worker(f"m={URL},kv_events=x")
    (registered,) = Registration(url=URL, models=["m"], kv_events="7", kv_ranks=2).settings()
    assert said_of(registered) == Said("7", "", 2)


def test_pods_say_it_by_a_port_or_an_annotation() -> None:
    def said(ports: list[dict[str, Any]], **notes: str) -> Said:
        annotations = {
            "helios.dev/model": "m",
            **{f"helios.dev/{name.replace('_', '-')}": v for name, v in notes.items()},
        }
        one = endpoint_slice("s", [endpoint("10.0.0.1", "p")], ports=[{"name": "http", "port": 8000}, *ports])
        of = pod("p", "10.0.0.1", annotations=annotations)
        slices, pods = [decode(json.dumps(one), EndpointSlice)], [decode(json.dumps(of), Pod)]
        found = workers_of(slices, pods, "http")
        assert found.problems == ()
        return said_of(found.workers[0])

    named = [{"name": "kv-events", "port": 5557}, {"name": "other", "port": 9}]
    assert said([]) == UNSAID
    assert said(named) == Said("5557")
    assert said(named, kv_events="other", kv_replay="77", kv_ranks="2") == Said("9", "77", 2)
    assert said(named, kv_events="none") == Said("none")


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"port": -1}, "port must be from 0"), ({"replay_port": 5}, "port is not"), ({"ranks": 0}, "from 1"),
        ({"wait_s": 0}, "wait_s"), ({"max_blocks": 0}, "max_blocks"), ({"tokens_mib": 0}, "tokens_mib"),
    ],
)  # fmt: skip
def test_settings_that_can_not_work_are_refused(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        check_settings(KvEventsSettings(**settings))


def test_a_policy_by_kv_events_needs_somebody_who_publishes() -> None:
    def checked(**settings: Any) -> list[str]:
        worker = {"model": "m", "url": URL, **settings.pop("worker", {})}
        router = RouterSettings(workers=[WorkerSettings(**worker)], policy="prefix-index", **settings)
        return check(router, RegistrySettings())

    with pytest.raises(UsageError, match="none of them is said to publish any"):
        checked()
    assert checked(worker={"kv_events": "5557"}) == checked(kv_events=USUAL) == ["m"]
