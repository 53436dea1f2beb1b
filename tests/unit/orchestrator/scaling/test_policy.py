"""The policy: what people count on, and what must hold whatever is seen, in whatever order."""

from __future__ import annotations

import math
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.scaling.outlook import Expected, Outlook
from orchestrator.scaling.policy import Decision, Policy
from orchestrator.scaling.settings import ScalingSettings
from orchestrator.scaling.signals import UNHEARD, Signals, WorkerSignals
from orchestrator.scaling.state import MOST, State, decode, encode

START = 1_767_600_000.0


def settings(**changed: object) -> ScalingSettings:
    return msgspec.convert({"in_flight_per_replica": 8, "kv_usage": 0, "max_replicas": 20} | changed, ScalingSettings)


def idle(replicas: int, **changed: object) -> Signals:
    known = {"replicas": replicas, "ready": replicas, "held": 0, "in_flight": 0, "arrivals": 0}
    return msgspec.convert(known | changed, Signals)


class Driven:
    """A model whose replicas are ready one look after they were asked for."""

    def __init__(self, policy: Policy, replicas: int = 0) -> None:
        self.policy, self.now, self.state = policy, START, None
        self.replicas = self.ready = replicas

    def look(self, outlook: Outlook | None = None, after_s: float = 15.0, **seen: object) -> Decision:
        self.now += after_s
        sample = idle(self.replicas, **{"ready": min(self.ready, self.replicas)} | seen)
        decision = self.policy.decide(self.now, sample, self.state, outlook)
        self.ready, self.replicas, self.state = self.replicas, decision.replicas, decision.state
        return decision


def expecting(work: float, rate: float, *, trusted: bool = True) -> Outlook:
    return Outlook(soon=Expected(work, rate), later=Expected(work, rate), trusted=trusted)


# --- from nothing, and back ---


def test_the_first_jump_has_the_size_of_the_queue() -> None:
    driven = Driven(Policy(settings()))
    assert driven.look().replicas == 0
    decision = driven.look(held=60)
    assert (decision.replicas, decision.wake, decision.needed) == (7, True, 7)  # 60 / 8, less than a tenth short
    assert driven.look(held=60).replicas == 7


def test_a_limit_of_speed_does_not_hold_back_the_first_jump() -> None:
    driven = Driven(Policy(settings(up={"replicas": 1}, up_window_s=300)))
    assert driven.look(held=60).replicas == 7
    assert driven.look(held=100).replicas == 7


def test_a_request_that_was_gone_before_anybody_looked_wakes_the_model() -> None:
    driven = Driven(Policy(settings()))
    driven.look()
    assert driven.look(arrivals=1).replicas == 1


def test_the_last_replica_stays_as_long_as_is_said() -> None:
    driven = Driven(Policy(settings(idle_s=120, warm_s=60)))
    driven.look(held=1)
    for _ in range(20):
        assert driven.look(in_flight=1).replicas == 1
    decisions = [driven.look() for _ in range(9)]
    numbers = [decision.replicas for decision in decisions]
    assert numbers == [1] * 7 + [0, 0]  # the eighth look is 120 s after the last request
    assert decisions[7].why[-1] == "no request for 120 s"


def test_a_model_that_woke_for_nobody_stays_warm() -> None:
    driven = Driven(Policy(settings(idle_s=30, warm_s=300, warm_replicas=2)))
    assert driven.look(held=1).replicas == 2
    driven.look()
    numbers = [driven.look().replicas for _ in range(22)]
    assert 2 in numbers[15:19]
    assert numbers[-1] == 0


def test_one_that_never_gets_ready_is_given_up_when_nobody_waits_any_more() -> None:
    driven = Driven(Policy(settings(startup_s=60)))
    driven.look(held=1)
    numbers = [driven.look(ready=0).replicas for _ in range(60)]
    assert numbers[10] == 1
    assert numbers[-1] == 0


def test_down_to_the_most_of_the_window() -> None:
    driven = Driven(Policy(settings(down_window_s=300)), replicas=5)
    for _ in range(30):
        driven.look(in_flight=40)
    numbers = [driven.look(in_flight=8 if number != 10 else 24).replicas for number in range(50)]
    assert numbers[:20] == [5] * 20
    assert numbers[21:30] == [4] * 9  # 24 in flight may have 4: within the tolerance
    assert numbers[-1] == 2


# --- what is not known ---


@pytest.mark.parametrize(
    "unknown",
    [
        {"held": None},
        {"in_flight": None},
        {"arrivals": None},
        {"router_age_s": UNHEARD},
        {"router_age_s": 61.0},
        {"partial": True},
    ],
    ids=str,
)
def test_what_is_not_known_takes_nothing_away(unknown: dict[str, object]) -> None:
    driven = Driven(Policy(settings()), replicas=4)
    for _ in range(200):
        decision = driven.look(**unknown)
        assert decision.replicas == 4
        assert decision.floor >= 1
    assert "not known" in " ".join(decision.why)
    assert [driven.look().replicas for _ in range(10)][-1] == 4  # a window and an idle time begin now
    assert [driven.look().replicas for _ in range(40)][-1] == 0


def test_caches_that_are_not_known_take_nothing_away() -> None:
    driven = Driven(Policy(settings(kv_usage=0.8)), replicas=2)
    workers = [{"kv_usage": 0.1}, {"kv_usage": 0.1, "age_s": 100.0}]
    for _ in range(100):
        assert driven.look(workers=workers).replicas == 2
    workers[1]["age_s"] = 1.0
    assert [driven.look(workers=workers, in_flight=1).replicas for _ in range(40)][-1] == 1


def test_counts_that_miss_some_router_still_add() -> None:
    driven = Driven(Policy(settings()), replicas=1)
    assert driven.look(in_flight=40, partial=True).replicas == 5


def test_full_caches_add() -> None:
    driven = Driven(Policy(settings(kv_usage=0.5)), replicas=2)
    workers = (WorkerSignals(kv_usage=0.9), WorkerSignals(kv_usage=0.9))
    assert driven.look(in_flight=2, workers=msgspec.to_builtins(workers)).replicas == 4


def test_tokens_add() -> None:
    driven = Driven(Policy(settings(tokens_per_replica=1000)), replicas=1)
    assert driven.look(in_flight=2, in_flight_tokens=3000, held_tokens=1000).replicas == 4


# --- restarts ---


@pytest.mark.parametrize("replicas", [0, 1, 5])
def test_who_knows_nothing_takes_nothing_down_before_windows_are_full(replicas: int) -> None:
    driven = Driven(Policy(settings(down_window_s=300, idle_s=300, warm_s=300)), replicas=replicas)
    numbers = [driven.look().replicas for _ in range(20)]
    assert numbers == [replicas] * 20
    assert [driven.look().replicas for _ in range(20)][-1] == 0


def test_after_a_long_silence_a_window_begins_anew() -> None:
    driven = Driven(Policy(settings()), replicas=5)
    for _ in range(30):
        driven.look(in_flight=40)
    assert driven.look(after_s=7200.0).replicas == 5
    assert driven.look().replicas == 5


def test_a_clock_that_was_wrong_is_got_over() -> None:
    driven = Driven(Policy(settings()), replicas=5)
    driven.look(in_flight=40, after_s=1e8)
    driven.now -= 1e8
    numbers = [driven.look().replicas for _ in range(60)]
    assert numbers[0] == 5
    assert numbers[-1] == 0


def test_how_long_starts_take_is_learnt() -> None:
    policy = Policy(settings(startup_s=50))
    driven = Driven(policy)
    driven.look()
    assert policy.startup_s(driven.state) == 50
    driven.look(held=20)  # three are asked for
    for _ in range(5):
        driven.look(held=20, ready=0)
    driven.look(held=0, in_flight=20, ready=2)
    driven.look(in_flight=20, ready=3)
    assert sorted(driven.state.startups) == [90.0, 90.0, 105.0]
    assert policy.startup_s(driven.state) == 105
    assert policy.lead_s(driven.state) > 105


def test_late_tokens_of_before_a_replica_came_do_not_add_another() -> None:
    driven = Driven(Policy(settings(ttft_s=1.0)), replicas=2)
    for _ in range(6):
        decision = driven.look(in_flight=14, ttft_s=3.0)
    more = decision.replicas
    assert more > 2
    driven.look(in_flight=14, ttft_s=3.0, ready=2)
    assert [driven.look(in_flight=14, ttft_s=3.0, ready=more).replicas for _ in range(3)] == [more] * 3


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"version":2}', b'{"version":1,"state":{}}', "null"])
def test_a_state_that_can_not_be_read_is_none(data: bytes | str) -> None:
    assert decode(data) is None


def test_a_state_of_a_later_version_is_none() -> None:
    record = msgspec.json.decode(encode(State.fresh(START, 1, 1)))
    assert decode(msgspec.json.encode(record | {"version": 2})) is None
    assert decode(msgspec.json.encode(record)) == State.fresh(START, 1, 1)


# --- latency ---


def test_late_tokens_add_and_stop_when_they_are_in_time() -> None:
    driven = Driven(Policy(settings(ttft_s=1.0)), replicas=2)
    numbers = []
    for _ in range(400):
        late = 3.0 if driven.ready < 4 else 0.8
        numbers.append(driven.look(in_flight=14, ttft_s=late).replicas)
    assert 4 <= numbers[-1] <= 5
    assert sum(a != b for a, b in pairwise(numbers)) <= 3


def test_tokens_that_stay_late_whatever_is_added_do_not_add_without_end() -> None:
    driven = Driven(Policy(settings(ttft_s=1.0)), replicas=2)
    numbers = [driven.look(in_flight=14, ttft_s=9.0).replicas for _ in range(400)]
    assert max(numbers) <= 8  # four times what the load asks for


# --- ahead of demand ---

DAILY = {"in_flight_per_replica": 8, "forecast": {"mode": "act", "worth_s": 600}}


def test_a_forecast_wakes_and_keeps() -> None:
    driven = Driven(Policy(settings(**DAILY)))
    decision = driven.look(expecting(20.0, 0.1))
    assert (decision.replicas, decision.floor, decision.needed, decision.wake) == (3, 3, 0, True)
    for _ in range(100):
        assert driven.look(expecting(20.0, 0.1)).replicas == 3


def test_few_requests_are_not_worth_a_replica() -> None:
    driven = Driven(Policy(settings(**DAILY)))
    assert driven.look(expecting(0.1, 1 / 800)).replicas == 0
    assert driven.look(expecting(0.1, 1 / 500)).replicas == 1


@pytest.mark.parametrize(("mode", "trusted"), [("observe", True), ("off", True), ("act", False)])
def test_nothing_follows_from_a_forecast_that_is_not_acted_on(mode: str, trusted: bool) -> None:
    driven = Driven(Policy(settings(forecast={"mode": mode})))
    decision = driven.look(expecting(20.0, 0.1, trusted=trusted))
    assert (decision.replicas, decision.floor, decision.prefetch) == (0, 0, 0)
    assert decision.expected == (0 if mode == "off" else 3)


def test_nodes_get_the_model_before_replicas_are_raised() -> None:
    driven = Driven(Policy(settings(**DAILY)))
    decision = driven.look(Outlook(soon=Expected(0, 0), later=Expected(30.0, 0.1)))
    assert (decision.replicas, decision.prefetch) == (0, 4)


# --- whatever is seen ---

counts = st.one_of(st.none(), st.integers(0, 200))
samples = st.fixed_dictionaries(
    {"held": counts, "in_flight": counts, "arrivals": counts, "partial": st.booleans()},
    optional={
        "router_age_s": st.sampled_from([0.0, 30.0, 90.0, UNHEARD]),
        "ttft_s": st.one_of(st.none(), st.floats(0, 10)),
    },
)
outlooks = st.one_of(
    st.none(),
    st.builds(
        lambda work, more, rate, trusted: Outlook(
            soon=Expected(work, rate), later=Expected(work + more, rate), trusted=trusted
        ),
        st.floats(0, 300), st.floats(0, 100), st.floats(0, 5), st.booleans(),
    ),
)  # fmt: skip
configured = st.builds(
    lambda low, more, window, up, tolerance, extra, ttft_s, mode: settings(
        min_replicas=low, max_replicas=low + more, down_window_s=window, up_window_s=window / 10, up={"replicas": up},
        down={"percent": up * 10}, tolerance=tolerance, extra_replicas=extra, ttft_s=ttft_s, forecast={"mode": mode},
    ),
    st.integers(0, 3), st.integers(1, 30), st.sampled_from([0.0, 60.0, 300.0]), st.integers(0, 5),
    st.sampled_from([0.0, 0.1, 0.3]), st.integers(0, 2), st.sampled_from([0.0, 1.0]),
    st.sampled_from(["off", "observe", "act"]),
)  # fmt: skip
courses = st.lists(
    st.tuples(samples, outlooks, st.sampled_from([0.0, 1.0, 15.0, 15.0, 45.0, 90.0, 4000.0])), max_size=40
)


@given(configured, courses, st.integers(0, 40))
def test_bounds_floor_and_memory(chosen: ScalingSettings, course: list, replicas: int) -> None:
    driven = Driven(Policy(chosen), replicas)
    for seen, outlook, after_s in course:
        before = driven.replicas
        known = seen["held"] is not None and seen["in_flight"] is not None and not seen["partial"]
        fresh = seen.get("router_age_s", 0.0) <= chosen.stale_s
        decision = driven.look(outlook, after_s, **seen)
        assert chosen.min_replicas <= decision.replicas <= chosen.max_replicas
        assert decision.needed <= decision.replicas
        assert chosen.min_replicas <= decision.floor <= chosen.max_replicas
        assert decision.wake == (before == 0 and decision.replicas > 0)
        assert decision.next_look_s > 0
        if not (known and fresh):
            assert decision.replicas >= min(before, chosen.max_replicas)
        elif seen["held"] or seen["in_flight"] or seen["arrivals"]:
            assert decision.replicas >= 1
            assert decision.floor >= 1
        state = decision.state
        assert max(map(len, (state.downs, state.ups, state.changes, state.begun))) <= MOST + 1
        assert len(encode(state)) < 20_000


@given(configured, courses, st.integers(0, 40))
def test_a_restart_at_any_time_changes_nothing(chosen: ScalingSettings, course: list, replicas: int) -> None:
    one, other = Driven(Policy(chosen), replicas), Driven(Policy(chosen), replicas)
    for seen, outlook, after_s in course:
        assert one.look(outlook, after_s, **seen) == other.look(outlook, after_s, **seen)
        other.policy = Policy(chosen)
        other.state = decode(encode(other.state))
        assert other.state == one.state


@given(configured, courses, st.integers(0, 40))
def test_a_forecast_takes_nothing_away(chosen: ScalingSettings, course: list, replicas: int) -> None:
    """With the same sample and memory, and in its own course as well, while latency doesn't say something else."""
    chosen = msgspec.structs.replace(chosen, ttft_s=0.0)
    plain, ahead = Driven(Policy(chosen), replicas), Driven(Policy(chosen), replicas)
    for seen, outlook, after_s in course:
        sample = idle(ahead.replicas, **seen)
        with_it = ahead.policy.decide(ahead.now + after_s, sample, ahead.state, outlook)
        without = ahead.policy.decide(ahead.now + after_s, sample, ahead.state, None)
        assert with_it.replicas >= without.replicas
        assert with_it.floor >= without.floor
        assert with_it.needed == without.needed
        if not chosen.up.replicas:  # limits of speed go by what was there, which differs
            assert ahead.look(outlook, after_s, **seen).replicas >= plain.look(None, after_s, **seen).replicas
        else:
            ahead.look(outlook, after_s, **seen)


@given(configured, courses, st.integers(0, 40), st.integers(0, 50), st.integers(0, 50))
def test_more_demand_never_gives_less(
    chosen: ScalingSettings, course: list, replicas: int, held: int, flying: int
) -> None:
    driven = Driven(Policy(chosen), replicas)
    for seen, outlook, after_s in course:
        now = driven.now + after_s
        more = seen | {
            "held": None if seen["held"] is None else seen["held"] + held,
            "in_flight": None if seen["in_flight"] is None else seen["in_flight"] + flying,
        }
        less = driven.policy.decide(now, idle(driven.replicas, **seen), driven.state, outlook)
        greater = driven.policy.decide(now, idle(driven.replicas, **more), driven.state, outlook)
        assert greater.replicas >= less.replicas
        driven.look(outlook, after_s, **seen)


@given(configured, courses, st.integers(0, 40), st.integers(0, 150))
def test_under_a_steady_load_replicas_arrive_and_stay(
    chosen: ScalingSettings, course: list, replicas: int, load: int
) -> None:
    """Whatever was before; in at most one turn."""
    chosen = msgspec.structs.replace(chosen, ttft_s=0.0)
    driven = Driven(Policy(chosen), replicas)
    for seen, outlook, after_s in course:
        driven.look(outlook, after_s, **seen)
    numbers = [driven.look(in_flight=load, arrivals=load).replicas for _ in range(200)]
    assert len(set(numbers[150:])) == 1
    ways = [after > before for before, after in pairwise(numbers) if after != before]
    assert sum(one != other for one, other in pairwise(ways)) <= 1
    each = load / 8
    extra = chosen.extra_replicas if load else 0
    aimed = min(chosen.max_replicas, max(chosen.min_replicas, math.ceil(each * (1 - chosen.tolerance) - 1e-6)))
    assert numbers[-1] >= aimed
    assert numbers[-1] <= max(chosen.min_replicas, math.ceil((each + extra) * (1 + chosen.tolerance)), 1)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"min_replicas": 30}, "max_replicas"),
        ({"warm_replicas": 30}, "max_replicas"),
        ({"interval_s": 90}, "stale_s"),
        ({"forecast": {"timezone": "Mars/Olympus"}}, "Mars/Olympus"),
        ({"forecast": {"history_s": 3600}}, "history_s"),
        ({"in_flight_per_replica": 0}, "in_flight_per_replica"),
        ({"idle": 3}, "idle"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused_by_name(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=said):
        settings(**wrong)
