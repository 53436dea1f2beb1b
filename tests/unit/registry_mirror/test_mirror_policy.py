"""Decisions about refs, what is believed for how long, and who a caller is: no I/O."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.config import MirrorRule
from helios.names import RepoId
from registry.metadata.mirror import FollowedRef
from registry.mirror.asking import Caller
from registry.mirror.brief import Brief
from registry.mirror.policy import DEFAULT, Step, after_answer, rule_for, step_for_ref

MODEL, DATA = RepoId.parse("org/name"), RepoId.parse("org/name", "datasets")
A, B = "a" * 40, "b" * 40


def followed(commit=A, checked=100.0, pending=None) -> FollowedRef:
    return FollowedRef("models/org/name", "main", commit, checked, pending)


def test_the_first_rule_that_matches_counts():
    rules = [
        MirrorRule(repo="org/*", ref="v*", policy="pin"),
        MirrorRule(repo="datasets/org/*", policy="local"),
        MirrorRule(repo="org/name", policy="approve"),
    ]
    assert rule_for(rules, MODEL, "v1").policy == "pin"
    assert rule_for(rules, MODEL, "main").policy == "approve"
    assert rule_for(rules, DATA, "main").policy == "local"
    assert rule_for(rules, RepoId.parse("gpt2"), "main") is DEFAULT
    assert rule_for([MirrorRule(ttl_s=5)], DATA, "main").ttl_s == 5


@pytest.mark.parametrize(
    ("policy", "known", "now", "step"),
    [
        ("ttl", None, 100, Step.LEARN),
        ("pin", None, 100, Step.LEARN),
        ("approve", None, 100, Step.LEARN),
        ("local", None, 100, Step.LOCAL),
        ("ttl", followed(), 399, Step.HELD),
        ("ttl", followed(), 400, Step.RENEW),
        ("ttl", followed(), 50, Step.RENEW),  # the clock was set back: nobody knows how old it is
        ("approve", followed(), 400, Step.RENEW),
        ("pin", followed(), 10**9, Step.HELD),
        ("local", followed(), 10**9, Step.HELD),
    ],
)
def test_when_the_upstream_is_asked(policy, known, now, step):
    assert step_for_ref(MirrorRule(policy=policy), known, now) is step


@given(
    st.sampled_from(["ttl", "pin", "approve"]),
    st.none() | st.builds(followed, st.sampled_from([A, B]), st.just(0.0), st.none() | st.sampled_from([A, B])),
    st.sampled_from([A, B]),
)
def test_only_approval_moves_what_waits_for_it(policy, known, said):
    points_at, pending = after_answer(MirrorRule(policy=policy), known, said)
    assert pending in (None, said)
    assert points_at != pending
    if known is not None and policy == "approve":
        assert points_at == known.commit
    else:
        assert (points_at, pending) == (said, None)


def test_what_is_believed_is_forgotten_in_time_and_bounded():
    now = 0.0
    brief = Brief(2, lambda: now)
    brief.put("a", 1, 10)
    brief.put("b", 2, 20)
    assert brief.get("a") == 1
    now = 10.0
    assert brief.get("a") is None
    assert brief.get("b") == 2
    brief.put("c", 3, 10)
    brief.put("d", 4, 10)
    assert [brief.get(key) for key in "bcd"] == [None, 3, 4]
    brief.drop("c")
    brief.drop("c")
    assert brief.get("c") is None
    brief.clear()
    assert brief.get("d") is None


def test_what_was_read_before_a_write_is_not_believed_after_it():
    """Cold clients at once: one reads that nothing is known, another one learns it, and the first remembers nothing."""
    brief = Brief(8, lambda: 0.0)
    for forget in (lambda: brief.drop("a"), brief.clear):

        def load(forget=forget):
            forget()  # somebody writes meanwhile
            return "old"

        assert brief.load("a", load, 10) == "old"
        assert brief.get("a") is None
    assert brief.load("a", lambda: "new", 10) == "new"
    assert brief.load("a", lambda: "newer", 10) == "new"


@pytest.mark.parametrize(
    ("header", "token"),
    [
        (None, None),
        ("", None),
        ("Bearer hf_x", "hf_x"),
        ("bearer  hf_x ", "hf_x"),
        ("Basic dTpw", None),
        ("Bearer", None),
        ("Bearer a b", None),
        ("Bearer ü", None),
        ("Bearer a\x00b", None),
        (f"Bearer {'x' * 5000}", None),
    ],
)
def test_a_caller_is_a_token_that_never_shows(header, token):
    caller = Caller.of(header)
    assert caller.token == token
    assert caller.as_token == (token or False)
    if token is not None:
        assert token not in repr(caller)
        assert token not in caller.id
        assert caller.id != Caller.of("Bearer other").id
    else:
        assert caller.id == ""
