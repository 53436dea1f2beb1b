"""What moves between two tiers, decided by pure objects; whatever happens, nothing in use goes and nothing leaks."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from heliosfs.tiers.history import CORRELATED_S, HALF_LIFE_S, History
from heliosfs.tiers.moves import PROMOTE_USES, doubles, downward, upward
from heliosfs.tiers.policy import Bounds, Policy, Priority, Verdict
from tests.unit.heliosfs.test_policy import KEYS, ROOMY, Clock


def make(fast: int = 100, slow: int = 200) -> tuple[Policy, Policy, Clock]:
    clock = Clock()
    history = History(clock)
    return Policy(Bounds(fast), history), Policy(Bounds(slow), history), clock


def use(policy: Policy, clock: Clock, key: str, times: int) -> None:
    for _ in range(times):
        clock.now += CORRELATED_S
        policy.history.use(key)


def test_what_is_used_again_goes_up_the_last_one_first() -> None:
    fast, slow, clock = make()
    for key in ("once", "twice", "often"):
        slow.put(key, 10, 10)
    use(slow, clock, "often", 3)
    use(slow, clock, "once", 1)
    use(slow, clock, "twice", 2)
    assert list(upward(fast, slow)) == ["twice", "often"]
    clock.now += 2 * HALF_LIFE_S
    assert list(upward(fast, slow)) == [], "that was long ago"


def test_what_does_not_go_up() -> None:
    fast, slow, clock = make()
    slow.put("partial", 10, 10, whole=False)
    slow.put("linked", 10, 0)
    slow.put("there already", 10, 10)
    fast.put("there already", 10, 10)
    slow.put("going", 10, 10)
    slow.put("of no account", 10, 10)
    slow.classify({"of no account": Priority.SCRATCH})
    for key in list(slow.entries):
        use(slow, clock, key, 5)
    slow.choose(["going"])
    assert list(upward(fast, slow)) == []


def test_what_somebody_wants_kept_goes_up_at_its_first_use() -> None:
    fast, slow, clock = make()
    for key in ("pinned", "critical", "normal"):
        slow.put(key, 10, 10)
    slow.classify({"pinned": Priority.PINNED, "critical": Priority.CRITICAL})
    assert list(upward(fast, slow)) == []
    for key in ("pinned", "critical", "normal"):
        use(slow, clock, key, 1)
    assert set(upward(fast, slow)) == {"pinned", "critical"}


def test_what_goes_down() -> None:
    fast, slow, clock = make()
    for key in ("used", "unused", "below already", "of no account"):
        fast.put(key, 10, 10)
    fast.put("partial", 10, 5, whole=False)
    fast.put("linked", 10, 0)
    slow.put("below already", 10, 10)
    fast.classify({"of no account": Priority.SCRATCH})
    for key in list(fast.entries):
        if key != "unused":
            use(fast, clock, key, 1)
    assert [key for key in fast.entries if downward(key, fast, slow)] == ["used"]
    assert not downward("unknown", fast, slow)


def test_of_what_is_in_both_the_slower_copy_goes_unless_it_alone_is_whole() -> None:
    fast, slow, _ = make()
    for key in ("both", "held", "better below", "going"):
        fast.put(key, 10, 10, whole=key != "better below")
        slow.put(key, 10, 10)
    slow.put("alone", 10, 10)
    fast.hold("held")
    fast.choose(["going"])
    assert doubles(fast, slow) == (["better below"], ["both"])
    assert slow.leave(["both", "held"]) == ("both", "held")  # this tier does not know that the other one holds it
    assert slow.leave(["both"]) == (), "it leaves already"


def test_uses_are_remembered_as_long_as_any_tier_has_the_blob(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heliosfs.tiers.history.MAX_USES", 2)
    fast, slow, clock = make()
    use(slow, clock, "below", 2)
    slow.put("below", 10, 10)
    fast.hold("open")
    for key in ("open", "a", "b", "c", "d"):
        use(fast, clock, key, 1)
    assert fast.history is slow.history
    assert list(fast.history.uses) == ["below", "open", "d"]
    assert fast.history.recent("below") > PROMOTE_USES
    assert fast.history.recent("a") == 0


def test_a_copy_counts_as_the_blob_that_it_is_of() -> None:
    fast, slow, clock = make(fast=10)
    fast.put("old", 10, 10)
    use(fast, clock, "old", 3)
    slow.put("new", 10, 10)
    use(slow, clock, "new", 1)
    assert fast.ask("new.moving", 10, 10, ROOMY, blob="new").verdict is Verdict.NOT_WORTH
    use(slow, clock, "new", 5)
    answer = fast.ask("new.moving", 10, 10, ROOMY, blob="new")
    assert answer.victims == ("old",)


class TwoTiers(RuleBasedStateMachine):
    """Blobs are opened, filled, moved and removed in any order, by callers that keep the rules of Tiers."""

    LIMITS = (60, 90)

    def __init__(self) -> None:
        super().__init__()
        self.fast, self.slow, self.clock = make(*self.LIMITS)
        self.tiers = (self.fast, self.slow)
        self.sizes = {key: 5 + 4 * n for n, key in enumerate(KEYS)}
        self.open: list[str] = []
        self.home: dict[str, Policy] = {}
        self.leaving: list[tuple[Policy, str]] = []
        self.copies: dict[Policy, str] = {}

    def protected(self, tier: Policy) -> set[str]:
        return {k for k in tier.entries if tier.holds(k) or tier.priority(k) is Priority.PINNED}

    def asks(self, tier: Policy, key: str, size: int, blob: str = "") -> Verdict:
        protected = self.protected(tier)
        answer = tier.ask(key, size, size, ROOMY, blob=blob)
        assert not protected & set(answer.victims)
        assert not any("." in victim for victim in answer.victims), "no copy that is under way"
        self.leaving += [(tier, victim) for victim in answer.victims]
        return answer.verdict

    @rule(key=st.sampled_from(KEYS))
    def opens(self, key: str) -> None:
        for tier in self.tiers:
            tier.hold(key)
        self.fast.use(key, "g")
        self.open.append(key)
        found = [tier for tier in self.tiers if key in tier.entries]
        self.home.setdefault(key, found[0] if found else self.fast)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), part=st.integers(1, 40))
    def fills(self, data: st.DataObject, part: int) -> None:
        key = data.draw(st.sampled_from(self.open))
        home = self.home[key]
        here = home.entries.get(key)
        if here is not None and here.whole:
            return
        for tier in (home,) if here is not None else self.tiers:
            if self.asks(tier, key, self.sizes[key] - (here.cost if here else 0)) is Verdict.GRANTED:
                self.home[key] = tier
                ticket = tier.ticket(key)
                assert ticket is not None
                part = min(part, ticket.left)
                before = here.cost if here else 0
                loan = tier.split(ticket, part)
                cost = before + loan.left
                tier.wrote(loan, tier.put(key, self.sizes[key], cost, whole=cost == self.sizes[key]))
                tier.close(loan)
                if cost == self.sizes[key]:
                    tier.end(key)
                for other in self.tiers:
                    if other is not tier:
                        other.end(key)
                return

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def closes(self, data: st.DataObject) -> None:
        key = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        if key not in self.open:
            del self.home[key]
            for tier in self.tiers:
                tier.end(key)
        for tier in self.tiers:
            tier.let_go(key)

    @rule()
    def a_promotion_begins(self) -> None:
        if self.fast not in self.copies:
            key = next(upward(self.fast, self.slow), None)
            if key is not None:
                self.begins(self.fast, self.slow, key)

    @precondition(lambda self: self.leaving)
    @rule()
    def a_demotion_begins(self) -> None:
        tier, key = self.leaving[0]
        if tier is self.fast and self.slow not in self.copies and downward(key, self.fast, self.slow):
            self.begins(self.slow, self.fast, key)

    def begins(self, to: Policy, source: Policy, key: str) -> None:
        wish = f"{key}.moving"
        to.hold(wish)
        if self.asks(to, wish, source.entries[key].size, key) is Verdict.GRANTED:
            self.copies[to] = key
            if to is self.fast:
                source.hold(key)
        else:
            to.end(wish)
            to.let_go(wish)

    @precondition(lambda self: self.copies)
    @rule(data=st.data(), part=st.integers(1, 60), fails=st.booleans())
    def a_copy_goes_on(self, data: st.DataObject, part: int, fails: bool) -> None:
        to = data.draw(st.sampled_from([tier for tier in self.tiers if tier in self.copies]))
        key = self.copies[to]
        wish, ticket = f"{key}.moving", to.ticket(f"{key}.moving")
        assert ticket is not None
        done = to.entries[wish].cost if wish in to.entries else 0
        size = self.sizes[key]
        unwanted = key in to.entries or (to is self.slow and self.fast.holds(key) > 0)
        cost = min(size, done + part)
        if not (fails or unwanted):
            to.wrote(ticket, to.put(wish, size, cost))
            if cost < size:
                return
        to.drop(wish)
        if not (fails or unwanted):
            to.put(key, size, size)
        to.end(wish)
        to.let_go(wish)
        del self.copies[to]
        if to is self.fast:
            self.slow.let_go(key)

    @rule()
    def what_is_in_both_goes(self) -> None:
        for tier, keys in zip(self.tiers, doubles(self.fast, self.slow), strict=True):
            for key in tier.leave(keys):
                assert not tier.holds(key)
                self.leaving.append((tier, key))

    @precondition(lambda self: self.leaving)
    @rule(works=st.booleans())
    def goes(self, works: bool) -> None:
        tier, key = self.leaving[0]
        if tier is self.fast and self.copies.get(self.slow) == key:
            return  # it goes when it was saved
        del self.leaving[0]
        tier.ended(key, gone=works and not tier.holds(key))

    @rule(data=st.data())
    def somebody_wants_it_gone(self, data: st.DataObject) -> None:
        keys = data.draw(st.lists(st.sampled_from(KEYS), max_size=3, unique=True))
        for tier in self.tiers:
            protected = self.protected(tier)
            victims, _ = tier.choose(keys)
            assert not protected & set(victims)
            self.leaving += [(tier, victim) for victim in victims]

    @rule(which=st.integers(0, 1), keys=st.integers(0, 1))
    def a_tier_goes_away(self, which: int, keys: int) -> None:
        tier = self.tiers[which]
        for key in [key for key in tier.entries if not tier.holds(key)]:
            tier.drop(key)

    @rule(classes=st.dictionaries(st.sampled_from(KEYS), st.sampled_from(list(Priority))))
    def classes_change(self, classes: dict[str, Priority]) -> None:
        for tier in self.tiers:
            tier.classify(classes)

    @rule(seconds=st.floats(0, HALF_LIFE_S))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def the_sums_are_right_and_the_limits_hold(self) -> None:
        for tier, limit in zip(self.tiers, self.LIMITS, strict=True):
            assert tier.used == sum(entry.cost for entry in tier.entries.values())
            assert tier.leaving == sum(entry.cost for entry in tier.entries.values() if entry.leaving)
            assert tier.reserved >= 0
            assert tier.used <= limit
            assert tier.used + tier.reserved - tier.leaving <= limit or tier.leaving == 0

    @invariant()
    def what_is_open_stays_where_it_is(self) -> None:
        for key, home in self.home.items():
            entry = home.entries.get(key)
            assert entry is None or home.holds(key) > 0

    def teardown(self) -> None:
        for to, key in self.copies.items():
            to.drop(f"{key}.moving")
            to.end(f"{key}.moving")
            to.let_go(f"{key}.moving")
            if to is self.fast:
                self.slow.let_go(key)
        for key in set(self.open):
            for tier in self.tiers:
                tier.end(key)
        for key in self.open:
            for tier in self.tiers:
                tier.let_go(key)
        for tier, key in self.leaving:
            tier.ended(key, gone=True)
        for tier in self.tiers:
            for key in list(tier.entries):
                tier.drop(key)
            # a wish for room that was never granted ends with who had it
            assert tier.used == tier.reserved == tier.leaving == tier.held == 0
            assert not tier._groups


TestTwoTiers = TwoTiers.TestCase
TestTwoTiers.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
