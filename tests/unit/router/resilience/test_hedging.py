"""When a late request gets a second attempt: the delay, the budget, and who may be asked."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.config import HedgeSettings, HedgingSettings, RetrySettings, RouterSettings
from helios.errors import UsageError
from router.resilience import hedging
from router.resilience.budget import TTL_S, RetryBudget
from router.resilience.hedging import ENOUGH, KEPT, Hedge, Hedges
from router.resilience.latency import PER_OCTAVE
from router.routes import RAW_ROUTES
from router.worker_metrics import WorkerMetrics
from router.workers import Workers, parse_worker

CHAT, EMBED, FORM = (RAW_ROUTES[path] for path in (b"/v1/chat/completions", b"/v1/embeddings",
                                                   b"/v1/audio/transcriptions"))  # fmt: skip
EMBEDDINGS = EMBED.path
STEP = 2 ** (1 / PER_OCTAVE)
"""How exactly times are known: to this factor."""


def hedge(rule: HedgeSettings, ratio: float = 1.0, floor_per_s: float = 1.0) -> Hedge:
    return Hedge(rule, RetryBudget(ratio, floor_per_s, lambda: 50.0))


def test_a_fixed_delay_needs_no_past() -> None:
    assert hedge(HedgeSettings(after_s=0.5)).delay_s(EMBEDDINGS, False) == 0.5


@given(st.lists(st.floats(0.001, 100), min_size=ENOUGH, max_size=2 * ENOUGH), st.sampled_from([50, 90, 95, 99]))
def test_a_percentile_of_what_was_usual(times: list[float], percentile: int) -> None:
    """A share of the requests is late, however many of them were overtaken: of those only that much is known."""
    rule = hedge(HedgeSettings(percentile=percentile, least_s=0.0001))
    for number, seconds in enumerate(times):
        assert number >= ENOUGH or rule.delay_s(EMBEDDINGS, False) is None
        rule.took(EMBEDDINGS, False, seconds)
    delay = rule.delay_s(EMBEDDINGS, False)
    assert delay is not None
    share = percentile / 100 * len(times)
    assert sum(one <= delay for one in times) >= share - 1e-6
    assert sum(one <= delay / STEP / 1.0001 for one in times) < share + 1e-6
    assert rule.delay_s(EMBEDDINGS, True) is None  # streams are another matter
    assert rule.delay_s("/v1/score", False) is None


@given(st.floats(0.01, 10), st.integers(0, ENOUGH), st.floats(1, 10))
def test_those_that_were_overtaken_do_not_lower_the_delay(usual: float, late: int, more: float) -> None:
    """What is known of one that was overtaken at the delay is that it takes longer: the percentile stays."""
    rule = hedge(HedgeSettings(percentile=90))
    for _ in range(10 * ENOUGH):
        rule.took(EMBEDDINGS, False, usual)
    before = rule.delay_s(EMBEDDINGS, False)
    assert before is not None
    for _ in range(late):
        rule.took(EMBEDDINGS, False, before * more)
        now = rule.delay_s(EMBEDDINGS, False)
        assert now is not None
        assert now >= before


def test_what_is_old_is_forgotten_and_a_delay_has_a_least() -> None:
    rule = hedge(HedgeSettings(percentile=95, least_s=0.2))
    for _ in range(KEPT):
        rule.took(EMBEDDINGS, False, 3.0)
    for _ in range(20 * KEPT):
        rule.took(EMBEDDINGS, False, 0.01)
    assert rule.delay_s(EMBEDDINGS, False) == 0.2


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 2), st.integers(0, 2)), max_size=60))
def test_second_attempts_are_few_and_have_a_reason_not_to_be(steps: list[tuple[bool, bool, int, int]]) -> None:
    rule = hedge(HedgeSettings(after_s=1), ratio=0.25, floor_per_s=0.2)
    requests = sent = 0
    for comes, queued, others, spare in steps:
        if comes:
            rule.request()
            requests += 1
        why = rule.refusal(queued=queued, others=others, spare=min(spare, others))
        if not others:
            assert why == "nobody"
        elif queued or not spare:
            assert why == "busy"
        else:
            within = sent + 1 <= 0.2 * TTL_S + 0.25 * requests
            assert why == ("" if within else "budget")
            sent += why == ""


def test_which_requests_may_have_one() -> None:
    rules = HedgingSettings(models={"m": HedgeSettings(after_s=1)})
    hedges = Hedges(RouterSettings(hedging=rules), lambda: 0.0)
    assert hedges.of("m", EMBED) is not None
    assert hedges.of("n", EMBED) is None
    assert hedges.of("m", CHAT) is None
    hedges = Hedges(RouterSettings(hedging=rules, retries=RetrySettings(retry_generation=True)), lambda: 0.0)
    assert hedges.of("m", CHAT) is hedges.of("m", EMBED)
    assert hedges.of("m", FORM) is None
    assert hedging.make(RouterSettings(), lambda: 0.0) is None


def test_who_may_be_asked() -> None:
    now = 100.0
    rules = HedgingSettings(models={"m": HedgeSettings(after_s=1)}, max_in_flight=2)
    hedges = Hedges(RouterSettings(hedging=rules, scrape_interval_s=2), lambda: now)
    workers = Workers([parse_worker(f"m=http://{name}:1") for name in "abcde"], lambda: now)
    free, busy, waiting, ejected, stale = workers.of("m")
    for _ in range(2):
        workers.lease(busy)
    waiting.metrics = WorkerMetrics(at=now - 1, sent=0, running=4, waiting=1, kv_usage=0.5)
    stale.metrics = WorkerMetrics(at=now - 7, sent=0, running=4, waiting=1, kv_usage=0.5)
    ejected.guard.eject("slow")
    assert hedges.spare(workers.of("m")) == [free, stale]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"models": {"m": HedgeSettings()}}, "needs either after_s or percentile"),
        ({"models": {"m": HedgeSettings(after_s=1, percentile=95)}}, "needs either after_s or percentile"),
        ({"models": {"m": HedgeSettings(after_s=-1)}}, "after_s must be more than 0"),
        ({"models": {"m": HedgeSettings(percentile=20)}}, "at least 50 and below 100"),
        ({"models": {"m": HedgeSettings(percentile=100)}}, "at least 50 and below 100"),
        ({"models": {"m": HedgeSettings(percentile=95, least_s=0)}}, "least_s must be more than 0"),
        ({"models": {"fast": HedgeSettings(after_s=1)}}, "'fast' is an alias"),
        ({"budget_ratio": 1.5}, "budget_ratio is a share"),
        ({"budget_floor_per_s": -1}, "budget_floor_per_s must not be less than 0"),
        ({"max_in_flight": 0}, "max_in_flight must be 1 at least"),
    ],
)
def test_settings_that_can_not_work_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        hedging.make(RouterSettings(hedging=HedgingSettings(**settings), aliases={"fast": "m"}), lambda: 0.0)
