"""What the operator remembers of the registry's answers, without a registry."""

from __future__ import annotations

import pytest

from helios.errors import DeadlineExceeded, Forbidden, NotFound, Unavailable
from helios.registry_answers import Place
from orchestrator.reconcile.observed import Answer
from orchestrator.registry import FACTS_S, FORGET_S, MOST, Heard, Memory, Question

A, B = "a" * 40, "b" * 40
MAIN = Question("org/m", "main", pull=True)


def here(commit: str = A) -> Heard:
    return Heard(Place("models/org/m", "main", "here", commit, 100, 100))


def place(state: str, **more) -> Heard:
    return Heard(Place("models/org/m", "main", state, **more))


def test_it_is_asked_at_once_and_then_as_often_as_is_wanted():
    memory = Memory()
    assert memory.look(MAIN, 0.0, 60.0).answer is None
    assert memory.due(0.0, 8) == [MAIN]
    assert memory.due(0.0, 8) == [], "it is being asked"
    assert memory.heard(MAIN, here(), 1.0)
    found = memory.look(MAIN, 1.0, 60.0).answer
    assert found is not None
    assert (found.commit, found.checked_at, found.problem) == (A, 1.0, "")
    assert memory.due(60.9, 8) == []
    assert memory.due(61.0, 8) == [MAIN]
    assert not memory.heard(MAIN, here(), 61.0), "nothing new"
    memory.due(200.0, 8)
    assert memory.heard(MAIN, here(B), 200.0)
    memory.look(MAIN, 201.0, 5.0)
    assert memory.due(206.0, 8) == [MAIN], "somebody wants to know more often"


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (Unavailable("http://r does not answer"), "RegistryUnreachable"),
        (DeadlineExceeded("too slow"), "RegistryUnreachable"),
        (NotFound("no such"), "NotFound"),
        (Forbidden("not yours"), "Forbidden"),
    ],
)
def test_what_fails_is_said_with_since_when_and_tried_again_later_and_later(error, problem: str):
    memory = Memory()
    memory.look(MAIN, 0.0, 60.0)
    waits, now = [], 10.0
    for _ in range(8):
        assert memory.due(now, 8) == [MAIN]
        memory.heard(MAIN, Heard(error=error), now)
        at = next(step for step in range(1, 100) if memory.due(now + step, 8))
        memory.heard(MAIN, Heard(error=error), now)
        waits.append(at)
        now += 1000
        memory.look(MAIN, now, 60.0)
    assert waits[0] == 2
    assert max(waits) == 60
    answer = memory.look(MAIN, now, 60.0).answer
    assert answer is not None
    assert (answer.commit, answer.problem, answer.since) == (None, problem, 10.0)
    memory.due(now, 8)
    assert memory.heard(MAIN, here(), now)
    assert memory.look(MAIN, now, 60.0).answer == Answer(A, now)


@pytest.mark.parametrize(
    ("heard", "pull", "problem", "words"),
    [
        (place("nowhere", reason="the upstream has no such repository"), True, "NotFound", "no such repository"),
        (place("unknown", reason="the upstream does not answer"), True, "UpstreamUnreachable", "does not answer"),
        (place("upstream", commit=A, bytes=100, held=35), True, "Fetching", "30%"),
        (place("partial", commit=A, bytes=100, held=35), False, "NotHere", "source.pull is Never"),
    ],
)
def test_what_is_not_all_there_is_no_commit_and_says_why(heard: Heard, pull: bool, problem: str, words: str):
    memory, question = Memory(), Question("org/m", "main", pull=pull)
    memory.look(question, 0.0, 60.0)
    memory.due(0.0, 8)
    memory.heard(question, heard, 5.0)
    answer = memory.look(question, 5.0, 60.0).answer
    assert answer is not None
    assert (answer.commit, answer.problem) == (None, problem)
    assert words in answer.message
    assert bool(memory.due(8.0, 8)) == (problem == "Fetching")


def test_facts_of_a_commit_and_who_signs_it_later():
    memory, question = Memory(), Question("org/m", A, facts=True)
    assert memory.look(question, 0.0, FACTS_S).facts is None
    memory.due(0.0, 8)
    memory.heard(question, here(), 0.0)
    facts = memory.look(question, 0.0, FACTS_S).facts
    assert facts is not None
    assert (facts.size_bytes, facts.signer) == (100, None)
    assert memory.due(FACTS_S, 8) == [question]
    assert memory.heard(question, Heard(here().place, "me@example.com"), FACTS_S)
    memory.due(2 * FACTS_S, 8)
    assert not memory.heard(question, Heard(error=Unavailable("down")), 2 * FACTS_S), "what is known stays"
    kept = memory.look(question, 200.0, FACTS_S).facts
    assert kept is not None
    assert kept.signer == "me@example.com"


def test_what_keeps_facts_from_being_known_is_known_until_they_are():
    memory, question = Memory(), Question("org/m", A, facts=True)
    memory.look(question, 0.0, FACTS_S)
    memory.due(0.0, 8)
    assert memory.heard(question, Heard(error=Forbidden("not yours")), 0.0)
    facts = memory.look(question, 0.0, FACTS_S).facts
    assert facts is not None
    assert (facts.problem, facts.message) == ("Forbidden", "not yours")
    assert memory.heard(question, Heard(here().place, "me@example.com"), 5.0)
    known = memory.look(question, 5.0, FACTS_S).facts
    assert known is not None
    assert (known.signer, known.problem) == ("me@example.com", "")


def test_a_commit_that_is_nowhere_has_no_facts():
    memory, question = Memory(), Question("org/m", A, facts=True)
    memory.look(question, 0.0, FACTS_S)
    memory.due(0.0, 8)
    assert memory.heard(question, place("nowhere", reason="no such commit"), 0.0)
    facts = memory.look(question, 0.0, FACTS_S).facts
    assert facts is not None
    assert (facts.problem, facts.message) == ("NotFound", "no such commit")


def test_a_clock_that_is_set_back_delays_no_question_for_long():
    memory = Memory()
    memory.look(MAIN, 1e6, 60.0)
    memory.due(1e6, 8)
    memory.heard(MAIN, here(), 1e6)
    memory.look(MAIN, 100.0, 60.0)
    assert memory.due(100.0, 8) == []
    assert memory.due(160.0, 8) == [MAIN]


def test_it_is_bounded():
    memory = Memory()
    for number in range(MOST + 5):
        memory.look(Question("org/m", f"v{number}"), float(number), 60.0)
    assert len(memory.due(float(MOST) + 5, MOST * 2)) <= MOST
    memory.look(MAIN, 20_000.0, 60.0)
    assert memory.due(20_000.0 + FORGET_S, 10) == [MAIN], "the others are forgotten"
    assert not memory.heard(Question("org/m", "v9999"), here(), 30_000.0)
