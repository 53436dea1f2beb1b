"""Retries are a share of the requests plus a floor, whatever comes when."""

from __future__ import annotations

from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from router.resilience.budget import TTL_S, RetryBudget


class Scene:
    def __init__(self, ratio: float, floor_per_s: float) -> None:
        self.now = 50.0
        self.budget = RetryBudget(ratio, floor_per_s, lambda: self.now)

    def takes(self) -> int:
        """How many retries are allowed now."""
        count = 0
        while self.budget.take():
            count += 1
        return count


def test_a_share_of_the_requests() -> None:
    scene = Scene(0.2, 0)
    assert scene.takes() == 0
    for _ in range(100):
        scene.budget.request()
    assert scene.takes() == 20
    scene.now += TTL_S - 1
    assert scene.takes() == 0
    scene.now += 1  # those requests paid; new retries need new ones
    assert scene.takes() == 0


def test_a_floor_for_little_traffic() -> None:
    scene = Scene(0.0, 0.5)
    assert scene.takes() == 5
    scene.now += TTL_S
    assert scene.takes() == 5


@given(st.integers(0, 200), st.integers(0, 100), st.integers(0, 30))
def test_what_is_allowed_at_once(requests: int, percent: int, floor: int) -> None:
    scene = Scene(percent / 100, floor / 10)
    for _ in range(requests):
        scene.budget.request()
    assert scene.takes() == (requests * percent * 10 + floor * 1000) // 1000


class BudgetModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.scene = Scene(0.25, 0.3)
        self.requests: list[int] = []
        self.retries: list[int] = []

    @rule(count=st.integers(1, 9))
    def requests_come(self, count: int) -> None:
        for _ in range(count):
            self.scene.budget.request()
            self.requests.append(int(self.scene.now))

    @rule()
    def retry(self) -> None:
        oldest = int(self.scene.now) - TTL_S
        requests = sum(at > oldest for at in self.requests)
        retries = sum(at > oldest for at in self.retries)
        assert self.scene.budget.take() == (retries + 1 <= 0.25 * requests + 0.3 * TTL_S + 1e-9)
        if retries + 1 <= 0.25 * requests + 0.3 * TTL_S + 1e-9:
            self.retries.append(int(self.scene.now))

    @rule(seconds=st.sampled_from([0.3, 1, 4, 25]))
    def time_passes(self, seconds: float) -> None:
        self.scene.now += seconds


TestBudget = BudgetModel.TestCase
TestBudget.settings = hypothesis_settings(max_examples=40, stateful_step_count=40)
