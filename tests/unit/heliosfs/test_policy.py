"""The policy object: what is protected stays, what was admitted fits, what was promised is given back."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from heliosfs.tiers.history import CORRELATED_S, HALF_LIFE_S, History
from heliosfs.tiers.policy import Bounds, Disk, Policy, Priority, Reservation, Verdict

MIB, GIB = 1 << 20, 1 << 30
ROOMY = Disk(1 << 50, 1 << 50)
KEYS = [f"{n:02d}" for n in range(12)]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make(limit: int | None = 100, min_free: float = 0.0) -> tuple[Policy, Clock]:
    clock = Clock()
    return Policy(Bounds(limit, min_free), History(clock)), clock


def ask(policy: Policy, key: str, size: int, disk: Disk = ROOMY, **options: Any) -> Verdict:
    """Ask until nothing has to go any more; removals succeed."""
    policy.hold(key)
    policy.use(key, options.get("group", ""))
    answer = policy.ask(key, size, size, disk, **options)
    for victim in answer.victims:
        policy.ended(victim, gone=True)
    verdict = policy.ask(key, size, size, disk, **options).verdict
    if verdict is Verdict.GRANTED:
        policy.put(key, size, size)
    policy.end(key)
    policy.let_go(key)
    return verdict


# --- what goes ---


def test_the_least_used_goes_first_and_only_as_much_as_must() -> None:
    policy, clock = make(100 * GIB)
    for key in ("a", "b", "c"):
        assert ask(policy, key, 30 * GIB) is Verdict.GRANTED
    clock.now = 2 * CORRELATED_S
    policy.use("a")
    policy.use("c")
    assert ask(policy, "d", 40 * GIB) is Verdict.GRANTED
    assert sorted(policy.entries) == ["a", "c", "d"]


def test_old_uses_fade() -> None:
    policy, clock = make(100 * GIB)
    ask(policy, "a", 60 * GIB)
    for _ in range(5):
        clock.now += CORRELATED_S
        policy.use("a")
    assert ask(policy, "b", 60 * GIB) is Verdict.NOT_WORTH
    clock.now += 4 * HALF_LIFE_S
    assert ask(policy, "b", 60 * GIB) is Verdict.GRANTED


def test_opens_at_once_are_one_use() -> None:
    policy, clock = make()
    for _ in range(50):
        clock.now += 0.1
        policy.use("a")
    assert policy.history.uses["a"].hits == 1
    clock.now += CORRELATED_S
    policy.use("a")
    assert policy.history.uses["a"].hits == 2


def test_a_refused_blob_gets_in_when_it_is_asked_for_often_enough() -> None:
    policy, clock = make(100 * GIB)
    ask(policy, "old", 90 * GIB)
    clock.now = CORRELATED_S
    policy.use("old")
    verdicts = []
    for _ in range(2):
        clock.now += CORRELATED_S
        verdicts.append(ask(policy, "new", 90 * GIB))
    assert verdicts == [Verdict.NOT_WORTH, Verdict.GRANTED]


def test_a_small_file_stays_longer_than_a_large_one() -> None:
    policy, _ = make(1000 * MIB)
    ask(policy, "config", 1 * MIB)
    ask(policy, "shard", 900 * MIB)
    assert ask(policy, "other", 900 * MIB) is Verdict.GRANTED
    assert set(policy.entries) == {"config", "other"}


def test_what_does_not_fit_pushes_nobody_out() -> None:
    policy, _ = make()
    ask(policy, "a", 60)
    assert ask(policy, "huge", 101) is Verdict.TOO_LARGE
    assert set(policy.entries) == {"a"}


def test_a_model_that_does_not_fit_takes_what_is_free_and_pushes_nobody_out() -> None:
    policy, clock = make()
    ask(policy, "other", 50)
    clock.now = HALF_LIFE_S
    lacking = [150, 125, 100, 100, 100, 100]
    verdicts = [ask(policy, f"shard-{n}", 25, group="large", group_need=lacking[n]) for n in range(6)]
    assert verdicts == [Verdict.GRANTED] * 2 + [Verdict.TOO_LARGE] * 4
    assert set(policy.entries) == {"other", "shard-0", "shard-1"}
    again = [ask(policy, f"more-{n}", 25, group="fits", group_need=25 * (4 - n)) for n in range(4)]
    assert again == [Verdict.GRANTED] * 4
    assert set(policy.entries) == {f"more-{n}" for n in range(4)}


def test_siblings_do_not_push_each_other_out() -> None:
    policy, _ = make()
    ask(policy, "s1", 60, group="m")
    assert ask(policy, "s2", 60, group="m") is Verdict.TOO_LARGE
    assert ask(policy, "s3", 60, group="n") is Verdict.GRANTED


@pytest.mark.parametrize("priority", [Priority.PINNED, Priority.CRITICAL])
def test_nobody_pushes_out_a_higher_class(priority: Priority) -> None:
    policy, clock = make()
    ask(policy, "a", 60)
    policy.classify({"a": priority})
    clock.now = 10 * HALF_LIFE_S
    assert ask(policy, "b", 60) is Verdict.TOO_LARGE
    policy.classify({"a": priority, "b": Priority.PINNED})
    assert ask(policy, "b", 60) is (Verdict.TOO_LARGE if priority is Priority.PINNED else Verdict.GRANTED)


def test_lower_classes_go_first_however_much_they_are_used() -> None:
    policy, clock = make()
    ask(policy, "kept", 30)
    ask(policy, "scratch", 30)
    for _ in range(5):
        clock.now += CORRELATED_S
        policy.use("scratch")
    policy.classify({"scratch": Priority.SCRATCH})
    assert ask(policy, "new", 60) is Verdict.GRANTED
    assert set(policy.entries) == {"kept", "new"}


def test_what_frees_nothing_does_not_go() -> None:
    policy, _ = make()
    policy.put("linked", 500, 0)
    ask(policy, "a", 60)
    assert ask(policy, "b", 60) is Verdict.GRANTED
    assert set(policy.entries) == {"linked", "b"}


# --- free space ---


def test_a_share_of_the_disk_stays_free() -> None:
    policy, _ = make(limit=None, min_free=0.1)
    assert ask(policy, "a", 91, Disk(100, 100)) is Verdict.TOO_LARGE
    assert ask(policy, "a", 90, Disk(100, 100)) is Verdict.GRANTED
    assert policy.borrow(1, Disk(10, 100)) is None


def test_a_disk_that_others_fill_is_given_room() -> None:
    policy, _ = make(limit=None, min_free=0.1)
    for key in ("a", "b", "c"):
        policy.put(key, 20, 20)
    assert policy.trim(Disk(10, 100)) == ()
    assert policy.trim(Disk(5, 100)) == ("a",)
    assert policy.trim(Disk(5, 100)) == (), "what leaves already counts"


def test_a_tier_over_its_limit_is_emptied_to_the_low_watermark() -> None:
    policy, _ = make()
    for n in range(101):
        policy.put(f"{n:03d}", 1, 1)
    assert len(policy.trim(ROOMY)) == 6


# --- wishes ---


def test_of_what_somebody_wants_gone_the_protected_stays() -> None:
    policy, _ = make()
    for key in ("a", "b", "c"):
        policy.put(key, 1, 1)
    policy.hold("a")
    policy.classify({"b": Priority.PINNED})
    assert policy.choose(["a", "b", "c", "unknown"]) == (("c",), {"a": "in use", "b": "pinned"})


def test_room_that_is_promised_is_not_promised_again() -> None:
    policy, _ = make()
    assert policy.ask("a", 60, 60, ROOMY).verdict is Verdict.GRANTED
    assert policy.ask("b", 60, 60, ROOMY).verdict is Verdict.TOO_LARGE
    policy.end("a")
    assert policy.ask("b", 60, 60, ROOMY).verdict is Verdict.GRANTED


def test_one_waits_for_what_leaves_and_asks_anew_when_it_gave_too_little() -> None:
    policy, _ = make()
    policy.put("a", 50, 50)
    policy.put("b", 50, 50)
    first = policy.ask("new", 40, 40, ROOMY)
    assert first.verdict is Verdict.WAIT
    assert first.victims == ("a",)
    assert policy.ask("new", 40, 40, ROOMY).verdict is Verdict.WAIT
    policy.ended("a", gone=False)  # it could not be removed
    second = policy.ask("new", 40, 40, ROOMY)
    assert second.victims == ("b",)
    policy.ended("b", gone=True)
    assert policy.ask("new", 40, 40, ROOMY).verdict is Verdict.GRANTED


class Churn(RuleBasedStateMachine):
    """Anything happens in any order; each blob is written only with what was lent for it."""

    LIMIT = 100

    def __init__(self) -> None:
        super().__init__()
        self.policy, self.clock = make(self.LIMIT)
        self.sizes = {key: 5 + 7 * n for n, key in enumerate(KEYS)}
        self.open: list[str] = []
        self.filling: dict[str, list[Reservation]] = {}
        self.loans: list[tuple[str, Reservation]] = []
        self.leaving: list[str] = []

    def cost(self, key: str) -> int:
        entry = self.policy.entries.get(key)
        return entry.cost if entry else 0

    @rule(key=st.sampled_from(KEYS))
    def opens(self, key: str) -> None:
        self.policy.hold(key)
        self.policy.use(key, f"group-{int(key) % 3}")
        self.open.append(key)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def fills(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self.open))
        if key in self.filling:
            return
        need = self.sizes[key] - self.cost(key)
        protected = {k for k in self.policy.entries if self.policy.holds(k)} | {
            k for k in self.policy.entries if self.policy.priority(k) is Priority.PINNED
        }
        answer = self.policy.ask(key, self.sizes[key], need, ROOMY, f"group-{int(key) % 3}", need)
        assert not protected & set(answer.victims)
        assert (answer.verdict is Verdict.WAIT) or not answer.victims
        self.leaving += answer.victims
        if answer.verdict is Verdict.GRANTED:
            self.filling[key] = []

    @precondition(lambda self: self.filling)
    @rule(data=st.data(), part=st.integers(1, 30))
    def starts_a_job(self, data: st.DataObject, part: int) -> None:
        key = data.draw(st.sampled_from(sorted(self.filling)))
        ticket = self.policy.ticket(key)
        assert ticket is not None
        self.loans.append((key, self.policy.split(ticket, part)))

    @precondition(lambda self: self.open)
    @rule(data=st.data(), part=st.integers(1, 30))
    def reads(self, data: st.DataObject, part: int) -> None:
        loan = self.policy.borrow(part, ROOMY)
        if loan is not None:
            self.loans.append((data.draw(st.sampled_from(self.open)), loan))

    @precondition(lambda self: self.loans)
    @rule(data=st.data(), share=st.floats(0, 1))
    def a_job_ends(self, data: st.DataObject, share: float) -> None:
        key, loan = self.loans.pop(data.draw(st.integers(0, len(self.loans) - 1)))
        if self.policy.holds(key) and not (key in self.policy.entries and self.policy.entries[key].leaving):
            written = min(int(share * loan.left), max(0, self.sizes[key] - self.cost(key)))
            self.policy.wrote(loan, self.policy.put(key, self.sizes[key], self.cost(key) + written))
        self.policy.close(loan)
        self.policy.close(loan)  # twice is once

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def closes(self, data: st.DataObject) -> None:
        key = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        if key not in self.open:
            self.filling.pop(key, None)
            self.policy.end(key)
        self.policy.let_go(key)

    @precondition(lambda self: self.leaving)
    @rule(works=st.booleans())
    def goes(self, works: bool) -> None:
        key = self.leaving.pop(0)
        self.policy.ended(key, gone=works and not self.policy.holds(key))

    @rule(data=st.data())
    def somebody_wants_it_gone(self, data: st.DataObject) -> None:
        keys = data.draw(st.lists(st.sampled_from(KEYS), max_size=3, unique=True))
        victims, _ = self.policy.choose(keys)
        assert not any(self.policy.holds(key) or self.policy.priority(key) is Priority.PINNED for key in victims)
        self.leaving += victims

    @rule(key=st.sampled_from(KEYS))
    def a_file_goes_behind_our_back(self, key: str) -> None:
        if not self.policy.holds(key):
            self.policy.drop(key)

    @rule(classes=st.dictionaries(st.sampled_from(KEYS), st.sampled_from(list(Priority))))
    def classes_change(self, classes: dict[str, Priority]) -> None:
        self.policy.classify(classes)

    @rule(seconds=st.floats(0, 3 * HALF_LIFE_S))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def the_sums_are_right(self) -> None:
        policy = self.policy
        assert policy.used == sum(entry.cost for entry in policy.entries.values())
        assert policy.leaving == sum(entry.cost for entry in policy.entries.values() if entry.leaving)
        assert policy.reserved >= 0
        assert all(loan.left >= 0 for _, loan in self.loans)

    @invariant()
    def the_limit_holds(self) -> None:
        assert self.policy.used <= self.LIMIT
        assert self.policy.used + self.policy.reserved - self.policy.leaving <= self.LIMIT or self.policy.leaving == 0

    def teardown(self) -> None:
        for key in dict.fromkeys(self.open):
            self.policy.end(key)
        for key in self.open:
            self.policy.let_go(key)
        for _, loan in self.loans:
            self.policy.close(loan)
        assert self.policy.reserved == 0
        for key in self.leaving:
            self.policy.ended(key, gone=True)
        assert self.policy.leaving == 0
        for key in list(self.policy.entries):
            self.policy.drop(key)
        assert self.policy.used == 0
        assert not self.policy._groups, "nothing is remembered of what is gone"


TestChurn = Churn.TestCase
TestChurn.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
