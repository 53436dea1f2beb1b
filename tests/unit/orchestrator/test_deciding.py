"""What a service's workers are decided by: its settings, what routers say, what was remembered, and ceilings."""

from __future__ import annotations

import random
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from helios.config import SignalsSettings
from helios.demand import Answers, Demand, Model, Role, Times, Waiting
from helios.metrics import SignalsMetrics
from orchestrator.api.parse import service_spec
from orchestrator.deciding.deciding import Deciding
from orchestrator.deciding.memory import Memory, decode, encode
from orchestrator.deciding.mind import Mind
from orchestrator.deciding.plan import plan_of
from orchestrator.reconcile.kinds import INFERENCE_SERVICE, MODEL
from orchestrator.reconcile.site import Site
from orchestrator.scaling.forecast import Forecast
from orchestrator.scaling.settings import ForecastSettings
from orchestrator.scaling.signals import Signals as Sample
from orchestrator.signals.serving import Signals
from tests.support.reconciled import Cluster, inference_service, model

SCALING = {"minReplicas": 0, "maxReplicas": 8, "targets": {"inFlight": 4}, "downWindowSeconds": 0, "warmSeconds": 0}


class Here:
    """A cluster, a router that says what it is told to say, and who decides."""

    def __init__(self, *, heard: bool = True, ceilings: Mapping[str, int] | None = None) -> None:
        self.now, self.turns, self.leads = 1_000_000.0, [], True
        self.cluster = Cluster()
        self.cluster.put(MODEL, model())
        self.signals = None
        if heard:
            self.signals = Signals(
                SignalsSettings(routers=["http://r:1"]), SignalsMetrics(CollectorRegistry()), clock=lambda: self.now
            )
            self.signals.collector.expect(["r"])
        self.total = 0
        self.ceilings = ceilings
        self.deciding = self.another()

    def another(self) -> Deciding:
        """As a process that begins to lead."""
        found = Deciding(Site(), self.signals, look_s=15.0, ceilings=self.ceilings, wall=lambda: self.now)
        found.attach(self.cluster, lambda: self.leads, lambda kind, key: self.turns.append((kind.kind, str(key))))
        self.deciding = found
        found.begin()
        return found

    def say(self, name: str = "org/llama", held: int = 0, flying: int = 0, came: int = 0, **more: Any) -> None:
        assert self.signals is not None
        self.total += came + held
        waiting = Waiting(held, held * 100, 1.0, "worker") if held else None
        roles = (Role("both", "c" * 40, 1, 1, flying, flying * 100, 0, ()),)
        one = Model(name, self.total, 1.0 if came or held else None, waiting, roles, ())
        self.signals.collector.told("r", Demand("e", more.get("complete", True), False, (one,)))

    def after(self, seconds: float) -> None:
        """Time passes, with a look each quarter of a minute at the most, as long as the router goes on saying so."""
        end = self.now + seconds
        while self.now < end:
            self.now += min(5.0, end - self.now)
            self.again()
            self.deciding.turn()

    def again(self) -> None:
        if self.signals is not None:
            self.say(**self.last)

    last: dict[str, Any] = {}  # noqa: RUF012

    def wanted(self, name: str = "chat") -> int:
        """As the service's turn has it; what that writes is in the status then."""
        found = self.deciding.wanted("models", name)
        one = self.cluster.objects[INFERENCE_SERVICE, "models", name]
        roles = {"aggregated": {"desired": found["both"].replicas, "ready": found["both"].replicas}} if found else {}
        text = self.deciding.state("models", name)
        self.cluster.put(INFERENCE_SERVICE, {**one, "status": {"roles": roles, "scaling": text}})
        return found["both"].replicas if found else -1


def test_a_held_request_is_a_turn_at_once_and_silence_is_none():
    here = Here()
    here.cluster.put(INFERENCE_SERVICE, inference_service(scaling=SCALING))
    here.say()
    assert here.wanted() == 0
    here.after(30)
    assert here.wanted() == 0
    here.turns.clear()
    here.now += 0.1
    here.say(held=9)
    here.deciding.turn()
    assert here.turns == [("InferenceService", "models/chat")]
    assert here.wanted() == 3, "the first jump has the size of the queue"


def test_it_sleeps_after_its_idle_time_and_not_while_routers_are_not_heard():
    here = Here()
    here.cluster.put(INFERENCE_SERVICE, inference_service(scaling={**SCALING, "idleSeconds": 60}))
    here.say(held=1)
    assert here.wanted() == 1
    here.last = {"flying": 1}
    here.after(120)
    assert here.wanted() == 1
    here.last = {"complete": False}
    here.after(600)
    assert here.wanted() == 1, "some process of the router was not heard"
    assert not here.deciding.wanted("models", "chat")["both"].signals
    here.last = {}
    here.after(50)
    assert here.wanted() == 1
    here.after(40)
    assert here.wanted() == 0


def test_another_leader_goes_on_from_what_the_status_remembers():
    here = Here()
    here.cluster.put(INFERENCE_SERVICE, inference_service(scaling={**SCALING, "idleSeconds": 60}))
    here.say(flying=20, came=20)
    here.last = {"flying": 20}
    here.wanted()
    here.after(60)
    assert here.wanted() == 5
    here.another()
    here.last = {}
    assert here.wanted() == 5, "a first look takes nothing away"
    here.after(45)
    assert here.wanted() == 1, "and the windows begin where they were"


def test_in_steady_state_nothing_is_to_be_written():
    here = Here()
    here.cluster.put(INFERENCE_SERVICE, inference_service(scaling=SCALING))
    here.say()
    here.wanted()
    here.after(60)
    here.turns.clear()
    here.after(1800)
    assert here.turns == []


def test_who_does_not_lead_tells_what_the_leader_wrote_and_decides_nothing():
    here = Here()
    here.cluster.put(INFERENCE_SERVICE, inference_service(scaling=SCALING))
    one = here.cluster.objects[INFERENCE_SERVICE, "models", "chat"]
    here.cluster.put(INFERENCE_SERVICE, {**one, "status": {"roles": {"aggregated": {"desired": 3}}}})
    here.leads = False
    here.say(held=100)
    here.deciding.turn()
    assert here.turns == []
    assert here.signals is not None
    served = here.signals.services.find("models", "chat")
    assert served is not None
    assert (served.names, served.roles, dict(served.desired)) == (("org/llama",), ("both",), {"both": 3})
    here.cluster.put(INFERENCE_SERVICE, {**one, "status": {"roles": {"aggregated": {}}}})
    here.deciding.turn()
    served = here.signals.services.find("models", "chat")
    assert served is not None
    assert dict(served.desired) == {"both": 0}, "what is 0 is left out of a status"
    here.cluster.delete(INFERENCE_SERVICE, "chat")
    here.deciding.turn()
    assert here.signals.services.find("models", "chat") is None


def test_a_commit_s_health_is_that_of_the_requests_since_it_has_its_weight():
    here, commit = Here(), "c" * 40
    here.cluster.put(INFERENCE_SERVICE, inference_service(scaling=SCALING))
    here.wanted()
    one = here.cluster.objects[INFERENCE_SERVICE, "models", "chat"]

    def told(ok: int, failed: int, elsewhere: int, times: tuple[int, ...]) -> None:
        assert here.signals is not None
        answers = Answers(commit, ok, failed, 0, elsewhere, Times((1.0, 2.0), times, 0.0))
        role = Role("both", commit, 1, 1, 3, 300, 0, ())
        here.now += 5
        here.signals.collector.told(
            "r", Demand("e", True, False, (Model("org/llama", 0, None, None, (role,), (answers,)),))
        )

    told(100, 90, 0, (0, 0, 0))
    told(101, 99, 0, (0, 0, 0))
    since = datetime.fromtimestamp(here.now + 1, UTC).isoformat()
    revisions = [{"commit": commit, "weight": 100, "since": since}]
    here.cluster.put(INFERENCE_SERVICE, {**one, "status": {"revisions": revisions}})
    told(117, 100, 2, (16, 0, 0))
    found = here.deciding.health("models", "chat")[commit]
    assert (found.requests, found.in_flight) == (19, 3)
    assert found.error_percent == pytest.approx(100 * 3 / 19)
    assert found.ttft_ms == pytest.approx(500)
    here.after(60)
    here.turns.clear()
    here.after(60)
    assert ("InferenceService", "models/chat") not in here.turns
    moving = [*revisions, {"commit": "d" * 40, "weight": 0, "since": since}]
    here.cluster.put(INFERENCE_SERVICE, {**one, "status": {"revisions": moving}})
    here.after(60)
    assert here.turns.count(("InferenceService", "models/chat")) >= 3, "each look may end the rollout"


def test_services_that_answer_for_the_same_name_are_known_to_each_other():
    here = Here()
    for name in ("chat", "other"):
        here.cluster.put(INFERENCE_SERVICE, inference_service(name, scaling=SCALING))
    here.say(flying=8)
    here.wanted()
    here.wanted("other")
    here.after(30)
    assert here.deciding.wanted("models", "chat")["both"].others == 1
    here.cluster.put(INFERENCE_SERVICE, inference_service("other", scaling=SCALING, servedName="mine"))
    here.wanted("other")
    here.after(30)
    assert here.deciding.wanted("models", "chat")["both"].others == 0
    assert here.deciding.wanted("models", "other")["both"].others == 0


def test_a_clock_that_is_set_back_stops_no_decision():
    here = Here()
    here.cluster.put(INFERENCE_SERVICE, inference_service(scaling={**SCALING, "minReplicas": 1}))
    here.say(flying=1)
    assert here.wanted() == 1
    here.now -= 86_400
    here.say(flying=20)
    here.deciding.turn()
    assert here.wanted() == 5


def test_without_routers_a_service_has_a_worker_and_never_sleeps():
    here = Here(heard=False)
    here.cluster.put(INFERENCE_SERVICE, inference_service(scaling=SCALING))
    assert here.wanted() == 1
    here.after(10_000)
    assert here.wanted() == 1


def test_a_ceiling_is_shared_by_priority_and_nobody_starves():
    here = Here(ceilings={"nvidia.com/gpu": 3})
    here.cluster.put(MODEL, model("minor", "org/minor", priority="scratch"))
    here.cluster.put(INFERENCE_SERVICE, inference_service(scaling={**SCALING, "minReplicas": 1}))
    here.cluster.put(
        INFERENCE_SERVICE, inference_service("other", model={"name": "minor"}, scaling={**SCALING, "minReplicas": 1})
    )
    here.say(held=40)
    assert here.wanted("other") == 1
    assert here.wanted() == 2
    assert "ceiling" in here.deciding.wanted("models", "chat")["both"].reason


def test_a_cost_of_its_own_is_kept():
    here = Here()
    role = {"accelerator": {"count": 2}}
    here.cluster.put(INFERENCE_SERVICE, inference_service(aggregated=role, scaling={**SCALING, "maxCost": 5}))
    here.say(held=40)
    assert here.wanted() == 2


def test_prefill_and_decode_sleep_and_wake_together():
    spec = service_spec(inference_service(prefill={}, decode={}, scaling=SCALING))
    plan = plan_of(spec, None, 15.0, heard=True)
    mind = Mind("", {}, 0.0)
    quiet = Sample(replicas=0, held=0, in_flight=0, arrivals=0)
    busy = Sample(replicas=0, held=0, in_flight=9, arrivals=0)
    mind.look(0.0, plan, {"prefill": quiet, "decode": busy})
    assert {want.name: want.replicas for want in mind.wants("ns/s", plan)} == {"ns/s/prefill": 1, "ns/s/decode": 3}


def test_what_is_remembered_is_small():
    """After weeks of numbers that can't be compressed, with both roles' windows well filled."""
    chance, forecast = random.Random(1), Forecast(ForecastSettings())
    for number in range(3 * 672):
        forecast.observe(1e9 + number * 300.0, chance.randrange(1000), chance.randrange(100))
        forecast.observe(1e9 + number * 300.0 + 299, chance.randrange(1000), chance.randrange(100))
    forecast._season._week[:] = type(forecast._season._week)("f", [chance.random() for _ in range(672)])
    spec = service_spec(inference_service(prefill={}, decode={}, scaling=SCALING))
    plan, mind = plan_of(spec, None, 15.0, heard=True), Mind("", {}, 0.0)
    for number in range(40):
        load = max(0, 100 - 2 * number + chance.randrange(3))
        seen = Sample(replicas=5, ready=5, held=0, in_flight=load, arrivals=load)
        mind.look(number * 15.0 + chance.random(), plan, {"prefill": seen, "decode": seen})
        mind.grant(number * 15.0, plan, {"prefill": 5, "decode": 5})
    memory = decode(mind._encoded())
    text = encode(Memory(memory.states, forecast.encode().decode(), memory.busy_s))
    assert 2000 < len(text) < 8192
    assert decode(text).forecast == forecast.encode().decode()


@given(st.text(max_size=60))
def test_what_cannot_be_read_is_as_none(text: str):
    assert decode(text) == Memory()
