"""Which models run when clients decide: whatever happens in whatever order, places are not given twice or lost."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from helios.launch.demand import ASKED_S, FAILED_S, LEAST_S, Demand, Model, State

COMMIT, OTHER = "a" * 40, "b" * 40


def up(demand: Demand, name: str, now: float, commit: str = COMMIT) -> Model:
    assert demand.ask(name, commit, "main", now).comes
    (model,) = demand.to_start(now)
    demand.up(model, now)
    return model


def test_the_one_that_is_unused_for_the_longest_time_gives_its_place():
    demand = Demand(2, 0.0)
    first, second = up(demand, "org/a", 0.0), up(demand, "org/b", 1.0)
    demand.used(first, 5.0)
    demand.ask("org/c", COMMIT, "main", 6.0)
    assert "2 of 2" in demand.ask("org/c", COMMIT, "main", 6.0).text
    assert demand.to_stop(6.0) == [], "each keeps its place for a while"
    demand.ask("org/c", COMMIT, "main", 1.0 + LEAST_S)
    assert demand.to_stop(1.0 + LEAST_S) == [second]
    assert demand.to_stop(1.0 + LEAST_S) == [], "one place for one that waits"
    assert demand.to_start(1.0 + LEAST_S) == []
    demand.stopped(second, 2.0 + LEAST_S)
    assert [one.name for one in demand.to_start(2.0 + LEAST_S)] == ["org/c"]


def test_who_is_asked_for_while_it_is_stopped_comes_again_and_who_is_used_stays():
    demand = Demand(1, 5.0)
    model = up(demand, "org/a", 0.0)
    assert demand.to_stop(4.9) == []
    assert demand.to_stop(5.0) == [model]
    demand.keeps(model, 5.5)
    assert model.state is State.UP
    assert demand.to_stop(10.5) == [model]
    assert demand.ask("org/a", "", "", 11.0).comes, "a worker that is down is asked for without its commit"
    demand.stopped(model, 12.0)
    assert demand.to_start(12.0) == [model]


def test_a_failure_counts_for_a_while_and_one_that_nobody_wants_any_more_is_not_started():
    demand = Demand(1, 0.0)
    demand.ask("org/a", COMMIT, "main", 0.0)
    (model,) = demand.to_start(0.0)
    demand.failed(model, "no memory", 1.0)
    told = demand.ask("org/a", COMMIT, "main", 0.9 + FAILED_S)
    assert (told.comes, told.text) == (False, "no memory")
    assert demand.ask("org/a", COMMIT, "main", 1.0 + FAILED_S).comes
    assert demand.to_start(1.1 + FAILED_S + ASKED_S) == []
    assert not demand.ask("org/never", "", "", 100.0).comes


def test_a_commit_that_is_asked_for_itself_has_a_name_of_its_own():
    demand = Demand(2, 0.0)
    model = up(demand, "org/a", 0.0)
    demand.ask("org/a", COMMIT, COMMIT, 1.0)
    assert model.names == {"org/a", f"org/a@{COMMIT}"}, "one worker serves both"
    demand.ask("org/a", OTHER, OTHER, 1.0)
    (other,) = demand.to_start(1.0)
    assert other.names == {f"org/a@{OTHER}"}, "no request for the model itself goes there"
    assert demand.ask(f"org/a@{OTHER}", "", "", 2.0).comes


class Anything(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.demand = Demand(2, 8.0)
        self.busy: dict[str, Model] = {}
        """Those that somebody starts or stops at the moment."""

    @rule(name=st.sampled_from("abcd"), seconds=st.floats(0, 12))
    def ask(self, name: str, seconds: float) -> None:
        self.now += seconds
        self.demand.ask(f"org/{name}", COMMIT, "main", self.now)

    @rule()
    def act(self) -> None:
        for model in [*self.demand.to_start(self.now), *self.demand.to_stop(self.now)]:
            assert model.pinned not in self.busy, "one does one thing at a time"
            self.busy[model.pinned] = model

    @precondition(lambda self: self.busy)
    @rule(data=st.data(), well=st.booleans())
    def done(self, data: st.DataObject, well: bool) -> None:
        model = self.busy.pop(data.draw(st.sampled_from(sorted(self.busy))))
        if model.state is State.STARTING:
            (self.demand.up(model, self.now) if well else self.demand.failed(model, "why", self.now))
        elif well:
            self.demand.stopped(model, self.now)
        else:
            self.demand.keeps(model, self.now)

    @precondition(lambda self: self.up())
    @rule(data=st.data(), ends=st.booleans())
    def used(self, data: st.DataObject, ends: bool) -> None:
        model = data.draw(st.sampled_from(self.up()))
        (self.demand.failed(model, "it ended", self.now) if ends else self.demand.used(model, self.now))

    def up(self) -> list[Model]:
        return [one for one in self.demand.models if one.state is State.UP]

    @invariant()
    def places(self) -> None:
        models = self.demand.models
        moving = {one.pinned for one in models if one.state in (State.STARTING, State.STOPPING)}
        assert moving == self.busy.keys()
        assert len(moving) + len(self.up()) <= 2
        assert all(one.names for one in models)

    def teardown(self) -> None:
        """Whoever is still wanted comes at last."""
        for model in list(self.busy.values()):
            (self.demand.stopped if model.state is State.STOPPING else self.demand.up)(model, self.now)
        self.busy.clear()
        self.now += FAILED_S + LEAST_S
        for _ in range(4):
            self.demand.ask("org/a", COMMIT, "main", self.now)
            for model in self.demand.to_start(self.now):
                self.demand.up(model, self.now)
            for model in self.demand.to_stop(self.now):
                self.demand.stopped(model, self.now)
        self.demand.ask("org/a", COMMIT, "main", self.now)
        for model in self.demand.to_start(self.now):
            self.demand.up(model, self.now)
        assert "org/a" in [one.name for one in self.up()]


TestAnything = Anything.TestCase
