"""Events: told once, counted afterwards, never a flood."""

from __future__ import annotations

from orchestrator.actions import Emit, Ref
from orchestrator.runtime.events import BURST, Count, Create, Recorder
from tests.fakes.kubernetes import ApiServer
from tests.support.sample_operator import GREETING

REF = Ref(GREETING, "ns", "g", "uid-g")
FAILED = Emit("Warning", "Failed", "no room")


class Times:
    def __init__(self) -> None:
        self.now = 0.0


def recorder():
    times = Times()
    return Recorder("instance", lambda: times.now, lambda: 1.7e9 + times.now), times


def test_the_same_again_is_counted_and_written_once_a_minute():
    found, times = recorder()
    first = found.record(FAILED, REF)
    assert isinstance(first, Create)
    for _ in range(10):
        times.now += 5
        assert found.record(FAILED, REF) is None
    times.now += 15
    counted = found.record(FAILED, REF)
    assert isinstance(counted, Count)
    assert (counted.name, counted.series["count"]) == (first.manifest["metadata"]["name"], 12)
    times.now += 400
    again = found.record(FAILED, REF)
    assert isinstance(again, Create)
    assert again.manifest["metadata"]["name"] != first.manifest["metadata"]["name"]


def test_another_message_is_another_event_but_not_without_end():
    found, times = recorder()
    told = [found.record(Emit("Normal", "Scaled", str(number)), REF) for number in range(50)]
    assert sum(isinstance(one, Create) for one in told) == BURST
    assert isinstance(found.record(FAILED, Ref(GREETING, "ns", "other", "u")), Create), "others have room of their own"
    times.now += 31
    assert isinstance(found.record(Emit("Normal", "Scaled", "later"), REF), Create)


def test_an_event_is_what_the_api_server_takes():
    server = ApiServer()
    found, _ = recorder()
    long = Emit("Warning", "Failed", "ä" * 5000)
    first = found.record(long, REF)
    made = server.cluster.create(server.served("events"), "ns", first.manifest, manager="m", strict=True)
    assert len(made["note"].encode()) <= 1024
    assert made["regarding"]["uid"] == "uid-g"


def test_an_event_that_is_gone_is_told_anew():
    found, times = recorder()
    found.record(FAILED, REF)
    times.now += 61
    counted = found.record(FAILED, REF)
    found.gone(counted)
    assert isinstance(found.record(FAILED, REF), Create)
