"""Which models run when clients decide: whatever happens in whatever order, memory is not given twice or lost."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from helios.launch.demand import FAILED_S, LEAST_S, TURN_S, Demand
from helios.launch.needs import Need
from helios.launch.plan import Placement
from helios.launch.pools import MAIN, Pools, lacks
from helios.launch.resident import Act, Model, State
from helios.launch.room import Step
from helios.launch.wanted import ASKED_S, Use, Wanted

COMMIT, OTHER = "a" * 40, "b" * 40
PLACE = Placement("both", "vllm")
GPU, SECOND = "GPU 0", "GPU 1"
BUSY, IDLE, UNKNOWN = Use(1, 0), Use(0, 0), Use(None, None)


def main(size: int) -> tuple[Need, ...]:
    """A model that takes so much of main memory and can't sleep, as on a CPU."""
    return (Need(PLACE, {MAIN: size}),)


def on_gpu(size: int, weights: int = 4, pools: tuple[str, ...] = (GPU,)) -> tuple[Need, ...]:
    """A model on one of some GPUs, with a unit of main memory and of the GPU that stay."""
    return tuple(
        Need(PLACE, {MAIN: 1, pool: size}, ({MAIN: 1 + weights, pool: 1}, {MAIN: 1, pool: 1})) for pool in pools
    )


class Watched(Demand):
    """Before each step those that are up are asked whether they are in use, as ``OnDemand`` does: they are not, but for
    those whose answer a test has told since the step before."""

    def __init__(self, pools: Pools, wanted: Wanted, patience_s: float) -> None:
        super().__init__(pools, wanted, patience_s)
        self._told: set[Model] = set()

    def looked(self, model: Model, use: Use, now: float) -> None:
        super().looked(model, use, now)
        self._told.add(model)

    def step(self, now: float) -> list[Step]:
        for model in self.models:
            if model.state is State.UP and model not in self._told:
                super().looked(model, IDLE, now)
        self._told.clear()
        return super().step(now)


def demand_of(pools: Pools, idle_s: float = 0.0, patience_s: float = 1000.0, warm_s: float = 0.0) -> Demand:
    return Watched(pools, Wanted(idle_s, warm_s), patience_s)


def ask(demand: Demand, name: str, now: float) -> None:
    assert demand.ask(name, COMMIT, "main", now).comes


def acts(demand: Demand, now: float) -> list[tuple[str, Act, int]]:
    """What has to be done."""
    return [(step.model.name, step.act, step.level) for step in demand.step(now)]


def up(demand: Demand, name: str, needs: tuple[Need, ...], now: float) -> Model:
    ask(demand, name, now)
    (sizing,) = demand.step(now)
    assert sizing.act is Act.SIZE
    demand.sized(sizing.model, needs, now)
    (start,) = demand.step(now)
    assert (start.model.name, start.act) == (name, Act.START)
    demand.up(start.model, now)
    return start.model


def wanted(demand: Demand, name: str, needs: tuple[Need, ...], now: float) -> Model:
    """Asked for, and its size is known."""
    ask(demand, name, now)
    sizing = next(step for step in demand.step(now) if step.act is Act.SIZE)
    demand.sized(sizing.model, needs, now)
    return sizing.model


# --- without sleep ---


def test_the_one_that_is_unused_for_the_longest_time_gives_its_memory():
    demand = demand_of({MAIN: 10})
    first, second = up(demand, "org/a", main(4), 0.0), up(demand, "org/b", main(4), 1.0)
    demand.looked(first, BUSY, 5.0)
    wanted(demand, "org/c", main(4), 6.0)
    assert demand.step(6.0) == [], "each keeps its memory for a while"
    told = demand.ask("org/c", COMMIT, "main", 6.0).text
    assert told == "waiting for 4 B of memory: of 10 B of memory 2 B of memory are free, the rest have org/a, org/b"
    late = 5.0 + LEAST_S
    ask(demand, "org/c", late)
    assert acts(demand, late) == [("org/b", Act.STOP, 0)], "both are idle"
    assert demand.step(late) == [], "one goes for one that waits, which has to wait until it is gone"
    demand.stopped(second, late)
    assert acts(demand, late) == [("org/c", Act.START, 0)]


def test_as_many_go_as_a_large_one_needs_and_no_more():
    demand = demand_of({MAIN: 10})
    small = [up(demand, f"org/{name}", main(2), float(at)) for at, name in enumerate("abcde")]
    now = 50.0
    wanted(demand, "org/large", main(5), now)
    assert acts(demand, now) == [("org/a", Act.STOP, 0), ("org/b", Act.STOP, 0), ("org/c", Act.STOP, 0)]
    wanted(demand, "org/small", main(2), now)
    assert acts(demand, now) == [("org/d", Act.STOP, 0)], "what is freed for the one is not the other's"
    for model in small[:3]:
        demand.stopped(model, now)
    assert acts(demand, now) == [("org/large", Act.START, 0)]


def test_one_that_never_fits_is_refused_at_once_with_the_figures():
    demand = demand_of({MAIN: 10})
    model = wanted(demand, "org/huge", main(11), 0.0)
    assert model.state is State.FAILED
    told = demand.ask("org/huge", COMMIT, "main", 1.0)
    assert (told.comes, told.text) == (
        False,
        "it needs 11 B of memory; models may take 10 B of memory together",
    )
    assert demand.step(1.0) == []


def test_who_waits_long_is_told_why_and_may_begin_anew():
    demand = demand_of({MAIN: 10}, patience_s=20.0)
    busy = up(demand, "org/a", main(10), 0.0)
    wanted(demand, "org/b", main(1), 1.0)
    for at in range(1, 22):
        demand.looked(busy, BUSY, float(at))
        assert demand.step(float(at)) == []
        ask(demand, "org/b", float(at))
    told = demand.ask("org/b", COMMIT, "main", 21.5)
    assert not told.comes
    assert told.text.startswith("memory for it was not free within 20 s: waiting for 1 B of memory")
    assert "org/a" in told.text
    assert demand.ask("org/b", COMMIT, "main", 22.0).comes


def test_after_a_while_nobody_overtakes_and_those_in_use_give_way():
    demand = demand_of({MAIN: 11})
    busy = up(demand, "org/busy", main(7), 0.0)
    wanted(demand, "org/large", main(8), 1.0)
    demand.looked(busy, BUSY, 2.0)
    wanted(demand, "org/small", main(1), 2.0)
    assert acts(demand, 2.0) == [("org/small", Act.START, 0)], "there is memory for it"
    late = 1.0 + TURN_S
    demand.looked(busy, BUSY, late - 1)
    ask(demand, "org/large", late - 1)
    wanted(demand, "org/last", main(1), late - 1)
    assert acts(demand, late - 1) == [("org/last", Act.START, 0)]
    demand.looked(busy, BUSY, late)
    ask(demand, "org/large", late)
    wanted(demand, "org/late", main(1), late)
    assert busy.state is State.STOPPING, "though it is in use"
    assert demand.step(late) == [], "nobody gets what the large one waits for"
    demand.keeps(busy, late + 1)
    assert busy.state is State.UP, "its requests did not end in time"
    assert demand.step(late + 2) == [], "it stays for another while, and nobody overtakes"


def test_who_is_asked_for_while_it_is_stopped_comes_again_and_who_is_used_stays():
    demand = demand_of({MAIN: 10}, idle_s=5.0)
    model = up(demand, "org/a", main(4), 0.0)
    assert demand.step(4.9) == []
    assert acts(demand, 5.0) == [("org/a", Act.STOP, 0)]
    demand.keeps(model, 5.5)
    assert model.state is State.UP
    assert acts(demand, 10.5) == [("org/a", Act.STOP, 0)]
    assert demand.ask("org/a", "", "", 11.0).comes, "a worker that is down is asked for without its commit"
    demand.stopped(model, 12.0)
    assert acts(demand, 12.0) == [("org/a", Act.START, 0)]


def test_a_failure_counts_for_a_while_and_one_that_nobody_wants_any_more_is_not_started():
    demand = demand_of({MAIN: 10})
    model = wanted(demand, "org/a", main(4), 0.0)
    demand.step(0.0)
    demand.failed(model, "no memory", 1.0)
    told = demand.ask("org/a", COMMIT, "main", 0.9 + FAILED_S)
    assert (told.comes, told.text) == (False, "no memory")
    model = wanted(demand, "org/a", main(4), 1.0 + FAILED_S)
    assert demand.step(1.1 + FAILED_S + ASKED_S) == []
    assert not demand.ask("org/never", "", "", 100.0).comes


def test_a_commit_that_is_asked_for_itself_has_a_name_of_its_own():
    demand = demand_of({MAIN: 10})
    model = up(demand, "org/a", main(4), 0.0)
    demand.ask("org/a", COMMIT, COMMIT, 1.0)
    assert model.names == {"org/a", f"org/a@{COMMIT}"}, "one worker serves both"
    demand.ask("org/a", OTHER, OTHER, 1.0)
    (other,) = (step.model for step in demand.step(1.0))
    assert other.names == {f"org/a@{OTHER}"}, "no request for the model itself goes there"
    assert demand.ask(f"org/a@{OTHER}", "", "", 2.0).comes


# --- who is to be up: the policy's windows ---


def test_one_that_came_and_went_between_two_looks_counts_and_the_reason_is_told():
    demand = demand_of({MAIN: 10}, idle_s=30.0)
    model = up(demand, "org/a", main(4), 0.0)
    assert demand.step(20.0) == []
    demand.looked(model, Use(0, 1), 21.0)
    assert demand.step(21.0) == []
    assert demand.step(50.9) == [], "nothing runs there, and 30 s ago something ended"
    assert acts(demand, 51.0) == [("org/a", Act.STOP, 0)]
    assert model.why == "no request for 30 s"
    assert demand.ask("org/a", COMMIT, "main", 51.5).text == "stopping: no request for 30 s"


def test_what_is_not_known_keeps_a_model_and_begins_its_idle_time_anew():
    demand = demand_of({MAIN: 10}, idle_s=5.0)
    model = up(demand, "org/a", main(4), 0.0)
    for at in range(1, 40):
        demand.looked(model, UNKNOWN, float(at))
        assert demand.step(float(at)) == [], "its metrics can't be read"
    assert demand.step(43.9) == []
    assert acts(demand, 44.0) == [("org/a", Act.STOP, 0)]


def test_first_counts_say_nothing_of_what_came_before_them():
    demand = demand_of({MAIN: 10}, idle_s=5.0)
    model = up(demand, "org/a", main(4), 0.0)
    demand.looked(model, Use(0, None), 5.0)
    assert demand.step(5.0) == []
    assert demand.step(9.9) == []
    assert acts(demand, 10.0) == [("org/a", Act.STOP, 0)]


def test_a_time_without_looks_is_no_idle_time():
    demand = demand_of({MAIN: 10}, idle_s=5.0)
    up(demand, "org/a", main(4), 0.0)
    assert demand.step(10_000.0) == [], "nobody has looked for long"
    assert acts(demand, 10_005.0) == [("org/a", Act.STOP, 0)]


@pytest.mark.parametrize(("warm_s", "goes_at"), [(0.0, 15.0), (60.0, 70.0)])
def test_who_has_just_come_stays_warm(warm_s: float, goes_at: float) -> None:
    demand = demand_of({MAIN: 10}, idle_s=5.0, warm_s=warm_s)
    model = wanted(demand, "org/a", main(4), 0.0)
    demand.step(0.0)
    demand.up(model, 10.0)
    for at in range(11, int(goes_at)):
        assert demand.step(float(at)) == []
    assert acts(demand, goes_at) == [("org/a", Act.STOP, 0)]


def test_who_needs_memory_does_not_wait_for_another_to_cool_down():
    demand = demand_of({MAIN: 10}, idle_s=300.0, warm_s=600.0)
    model = up(demand, "org/a", main(8), 0.0)
    wanted(demand, "org/b", main(8), 20.0)
    assert acts(demand, 20.0) == [("org/a", Act.STOP, 0)]
    assert model.why == "org/b needs its memory"
    demand.stopped(model, 21.0)
    assert acts(demand, 21.0) == [("org/b", Act.START, 0)]
    assert demand.step(22.0) == [], "and who had to go comes when it is asked for"


def test_who_is_asked_for_by_another_name_is_about_to_be_used():
    demand = demand_of({MAIN: 10}, idle_s=5.0)
    up(demand, "org/a", main(4), 0.0)
    assert demand.step(4.0) == []
    demand.ask("org/a", COMMIT, COMMIT, 4.9)
    assert demand.step(5.0) == [], "the router hears of the name, and its request comes"
    assert acts(demand, 10.0) == [("org/a", Act.STOP, 0)]


def test_who_sleeps_wakes_at_the_first_step_after_somebody_asks():
    demand = demand_of({MAIN: 20, GPU: 10}, idle_s=30.0, warm_s=30.0)
    model = up(demand, "org/a", on_gpu(8), 0.0)
    demand.step(30.0)
    demand.slept(model)
    for at in range(31, 500, 7):
        assert demand.step(float(at)) == []
    ask(demand, "org/a", 500.001)
    assert acts(demand, 500.001) == [("org/a", Act.WAKE, 0)]


LOOKS = st.lists(st.tuples(st.floats(0.1, 4.0), st.sampled_from([BUSY, IDLE, IDLE, IDLE, Use(0, 2), UNKNOWN])))


@given(looks=LOOKS, idle_s=st.floats(1, 15), warm_s=st.floats(0, 15))
def test_a_model_goes_when_both_windows_are_over_and_never_before(
    looks: list[tuple[float, Use]], idle_s: float, warm_s: float
) -> None:
    demand = demand_of({MAIN: 10}, idle_s=idle_s, warm_s=warm_s)
    model = up(demand, "org/a", main(4), 0.0)
    now = used_at = 0.0
    for seconds, use in looks:
        now += seconds
        used_at = used_at if use == IDLE else now
        demand.looked(model, use, now)
        goes = now - used_at >= idle_s and now >= warm_s
        assert [step.act for step in demand.step(now)] == ([Act.STOP] if goes else [])
        if goes:
            return
    now = max(now, warm_s, used_at + idle_s + 0.001)
    assert acts(demand, now) == [("org/a", Act.STOP, 0)]


# --- with sleep ---


def test_two_models_take_turns_on_one_gpu_and_sleep_meanwhile():
    demand = demand_of({MAIN: 20, GPU: 10})
    one = up(demand, "org/a", on_gpu(8), 0.0)
    two = wanted(demand, "org/b", on_gpu(8), 20.0)
    assert acts(demand, 20.0) == [("org/a", Act.LULL, 1)]
    assert demand.held == {MAIN: 5, GPU: 8}, "it holds what it will need asleep, and what it needs awake"
    demand.slept(one)
    assert demand.held == {MAIN: 5, GPU: 1}
    assert acts(demand, 21.0) == [("org/b", Act.START, 0)]
    demand.up(two, 22.0)
    ask(demand, "org/a", 40.0)
    assert acts(demand, 40.0) == [("org/b", Act.LULL, 1)]
    demand.slept(two)
    assert acts(demand, 41.0) == [("org/a", Act.WAKE, 0)]
    demand.up(one, 42.0)
    assert demand.held == {MAIN: 10, GPU: 9}, "main memory stays with who has slept there"


@pytest.mark.parametrize(("memory", "expected"), [(6, Act.LULL), (5, Act.LULL), (4, Act.LULL)])
def test_weights_go_nowhere_where_main_memory_has_no_room_for_them(memory: int, expected: Act) -> None:
    demand = demand_of({MAIN: memory, GPU: 10})
    up(demand, "org/a", on_gpu(8), 0.0)
    wanted(demand, "org/b", on_gpu(8), 20.0)
    assert acts(demand, 20.0) == [("org/a", expected, 1 if memory >= 6 else 2)]


def test_main_memory_that_is_not_free_yet_takes_no_weights() -> None:
    demand = demand_of({MAIN: 9, GPU: 10}, idle_s=15.0)
    plain = up(demand, "org/plain", main(6), 0.0)
    up(demand, "org/a", on_gpu(8), 10.0)
    assert acts(demand, 15.0) == [("org/plain", Act.STOP, 0)]
    wanted(demand, "org/b", on_gpu(8), 20.0)
    assert acts(demand, 20.0) == [("org/a", Act.LULL, 2)], "there will be room for its weights, too late"
    assert plain.state is State.STOPPING


def test_one_that_would_keep_too_much_of_the_gpu_is_stopped():
    demand = demand_of({MAIN: 20, GPU: 10})
    up(demand, "org/a", on_gpu(8), 0.0)
    wanted(demand, "org/whole", on_gpu(10), 20.0)
    assert acts(demand, 20.0) == [("org/a", Act.STOP, 0)]


def test_sleepers_are_stopped_for_main_memory_and_stay_where_others_make_enough_room():
    demand = demand_of({MAIN: 12, GPU: 10})
    one = up(demand, "org/a", on_gpu(8), 0.0)
    two = wanted(demand, "org/b", on_gpu(8), 20.0)
    demand.step(20.0)
    demand.slept(one)
    demand.step(21.0)
    demand.up(two, 22.0)
    wanted(demand, "org/c", on_gpu(8), 40.0)
    assert acts(demand, 40.0) == [("org/b", Act.LULL, 1)], "a lies in main memory, and that has room for b"
    demand.slept(two)
    assert acts(demand, 41.0) == [("org/c", Act.START, 0)]
    wanted(demand, "org/plain", main(5), 42.0)
    assert acts(demand, 42.0) == [("org/a", Act.STOP, 0)], "it sleeps, and is the least recently used"


def test_who_is_not_used_sleeps_and_is_woken_when_asked_for():
    demand = demand_of({MAIN: 20, GPU: 10}, idle_s=30.0)
    model = up(demand, "org/a", on_gpu(8), 0.0)
    assert acts(demand, 30.0) == [("org/a", Act.LULL, 1)]
    ask(demand, "org/a", 30.5)
    demand.slept(model)
    assert acts(demand, 31.0) == [("org/a", Act.WAKE, 0)]
    demand.up(model, 32.0)
    assert acts(demand, 62.0) == [("org/a", Act.LULL, 1)]
    demand.slept(model)
    assert demand.step(1000.0) == [], "it sleeps on"


@pytest.mark.parametrize("asked", [True, False])
def test_who_can_not_be_woken_is_stopped_and_started_and_sleeps_no_more(asked: bool) -> None:
    demand = demand_of({MAIN: 20, GPU: 10}, idle_s=30.0)
    model = up(demand, "org/a", on_gpu(8), 0.0)
    demand.step(30.0)
    if asked:
        demand.slept(model)
        ask(demand, "org/a", 31.0)
        assert acts(demand, 31.0) == [("org/a", Act.WAKE, 0)]
    demand.broke(model, 32.0)
    assert demand.held[GPU] == 8, "until it is gone"
    demand.stopped(model, 33.0)
    assert demand.held == {}
    if not asked:
        assert demand.models == []
        again = up(demand, "org/a", on_gpu(8), 34.0)
    else:
        assert acts(demand, 33.0) == [("org/a", Act.START, 0)]
        again = model
        demand.up(again, 34.0)
    assert acts(demand, 64.0) == [("org/a", Act.STOP, 0)], "what failed once is not tried again"


def test_of_several_gpus_a_model_gets_the_free_one_or_that_of_the_least_recently_used():
    demand = demand_of({MAIN: 50, GPU: 10, SECOND: 10})
    both = (GPU, SECOND)
    one, two = up(demand, "org/a", on_gpu(8, pools=both), 0.0), up(demand, "org/b", on_gpu(8, pools=both), 1.0)
    assert [model.need.awake for model in (one, two) if model.need] == [{MAIN: 1, GPU: 8}, {MAIN: 1, SECOND: 8}]
    demand.looked(one, BUSY, 10.0)
    wanted(demand, "org/c", on_gpu(8, pools=both), 30.0)
    assert acts(demand, 30.0) == [("org/b", Act.LULL, 1)]


def test_who_waits_for_one_gpu_holds_nobody_up_on_another():
    demand = demand_of({MAIN: 50, GPU: 10, SECOND: 10})
    busy = up(demand, "org/busy", on_gpu(8), 0.0)
    wanted(demand, "org/waits", on_gpu(8), 1.0)
    late = 5.0 + TURN_S
    demand.up(busy, late - 1)
    ask(demand, "org/waits", late - 1)
    wanted(demand, "org/here", on_gpu(1), late)
    wanted(demand, "org/there", on_gpu(8, pools=(SECOND,)), late)
    ask(demand, "org/waits", late)
    assert acts(demand, late) == [("org/there", Act.START, 0)]


# --- anything ---

SIZES = {
    "a": on_gpu(3), "b": on_gpu(8, weights=6), "c": on_gpu(5, pools=(GPU, SECOND)), "d": main(6), "e": main(2),
    "f": on_gpu(10), "huge": main(99),
}  # fmt: skip
POOLS = {MAIN: 12, GPU: 10, SECOND: 6}
DRAINED_S = 60.0


class Anything(RuleBasedStateMachine):
    """A machine in which starts, stops and sleeps end when they please, and requests come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.demand = demand_of(POOLS, idle_s=25.0)
        self.busy: dict[str, tuple[Model, Act]] = {}
        """Those for which somebody does something at the moment."""
        self.requests: dict[str, int] = {}
        """Under way at each model."""

    def ask_for(self, name: str) -> None:
        self.demand.ask(f"org/{name}", COMMIT, "main", self.now)

    @rule(name=st.sampled_from(sorted(SIZES)), seconds=st.floats(0, 12))
    def ask(self, name: str, seconds: float) -> None:
        self.now += seconds
        self.ask_for(name)

    @rule()
    def act(self) -> None:
        for model in self.up():
            if self.requests[model.pinned]:
                self.demand.looked(model, BUSY, self.now)
        before = {one: (one.state, one.used_at) for one in self.demand.models}
        held = {one: one.holds for one in self.demand.models}
        steps = self.demand.step(self.now)
        for step in steps:
            assert step.model.pinned not in self.busy, "one does one thing at a time"
            self.busy[step.model.pinned] = step.model, step.act
        out = [step.model for step in steps if step.act in (Act.LULL, Act.STOP)]
        waits = any(self.now - (one.wanted_since or self.now) >= TURN_S for one in self.demand.models)
        for model in out:
            state, used_at = before[model]
            idle = self.now - used_at >= LEAST_S
            assert state is State.ASLEEP or idle or waits, "who was used a moment ago stays"
            for other in self.up():
                older = other.used_at < used_at and self.now - other.used_at >= LEAST_S
                enough = all(other.holds.get(pool, 0) >= size for pool, size in held[model].items())
                assert not (older and enough), "the least recently used goes first"

    @precondition(lambda self: self.busy)
    @rule(data=st.data(), well=st.booleans())
    def done(self, data: st.DataObject, well: bool) -> None:
        self.end(data.draw(st.sampled_from(sorted(self.busy))), well)

    def end(self, pinned: str, well: bool) -> None:
        model, act = self.busy.pop(pinned)
        demand, now = self.demand, self.now
        was_up = pinned in self.requests
        if act is Act.SIZE:
            (demand.sized(model, SIZES[model.name[4:]], now) if well else demand.failed(model, "no model", now))
        elif act is Act.START:
            (demand.up(model, now) if well else demand.failed(model, "why", now))
        elif was_up and self.requests[pinned]:
            demand.keeps(model, now)  # what is under way does not end in time
        elif act is Act.STOP:
            demand.stopped(model, now)
        elif well:
            (demand.up(model, now) if act is Act.WAKE else demand.slept(model))
        else:
            demand.broke(model, now)
            self.busy[pinned] = model, Act.STOP
        if model.state is State.UP:
            self.requests.setdefault(pinned, 0)
        elif self.requests.pop(pinned, 0):
            raise AssertionError("it was in use")

    @precondition(lambda self: self.up())
    @rule(data=st.data(), what=st.sampled_from(["begins", "ends", "dies"]))
    def used(self, data: st.DataObject, what: str) -> None:
        model = data.draw(st.sampled_from(self.up()))
        if what == "dies":
            del self.requests[model.pinned]
            self.demand.failed(model, "it ended", self.now)
            return
        self.requests[model.pinned] = max(0, self.requests[model.pinned] + (1 if what == "begins" else -1))
        self.demand.looked(model, BUSY, self.now)

    def up(self) -> list[Model]:
        return [one for one in self.demand.models if one.state is State.UP]

    @invariant()
    def memory(self) -> None:
        assert not lacks(self.demand.held, POOLS), "the budget is exceeded"
        for model in self.demand.models:
            moving = model.state in (State.SIZING, State.STARTING, State.LULLING, State.WAKING, State.STOPPING)
            assert moving == (model.pinned in self.busy)
            resident = model.state not in (State.NEW, State.SIZING, State.ASKED, State.FAILED)
            assert bool(model.holds) == resident == (model.need is not None)
            if resident and model.state is not State.ASLEEP and model.need is not None:
                assert not lacks(model.need.awake, model.holds), "it holds less than it takes"
            assert model.names

    def teardown(self) -> None:
        """Requests end, and whoever is wanted then is served in turn: all of them, however they compete."""
        self.requests = dict.fromkeys(self.requests, 0)
        missing = set(SIZES) - {"huge"}
        self.now += FAILED_S
        while missing:
            self.now += 4.0
            assert self.now < 10_000, f"{missing} starve"
            for name in sorted(missing):
                self.ask_for(name)
            for model in self.up():  # the others have clients, too, whose requests are short and never pause
                self.demand.looked(model, BUSY, self.now)
                missing.discard(model.name[4:])
            for pinned in list(self.busy):
                self.end(pinned, well=True)
            self.act()


TestAnything = Anything.TestCase
TestAnything.settings = settings(max_examples=60)
