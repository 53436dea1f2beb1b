"""One queue for several processes: fair over all of them, bounded, never standing, whoever dies."""

from __future__ import annotations

import pytest

from router.admission.line_owner import CALL_S, SETTLE_S
from router.admission.line_there import AGAIN_S, SILENT_S
from router.admission.line_words import Freed, Left, Stand
from tests.support.line_site import Request, Site


def drain(site: Site) -> list[str]:
    """End what is at the worker, one after another; who was called, in order."""
    for _ in range(1000):
        busy = [(member, request) for member in site.members for request in member.at_worker]
        if not busy:
            return site.called()
        busy[0][0].ends(busy[0][1])
        site.deliver_all()
    raise AssertionError("it goes on for ever")


def test_tenants_share_and_classes_come_first_whichever_process_they_came_to() -> None:
    site = Site()
    one, two = site.members
    one.comes("m", "x")
    site.deliver_all()
    for _ in range(3):
        one.comes("m", "a")
    for _ in range(3):
        two.comes("m", "b")
    two.comes("m", "h", rank=0)
    site.deliver_all()
    assert [name[0] for name in drain(site)] == ["h", "a", "b", "a", "b", "a", "b"]


def test_a_tenant_s_requests_are_in_order_over_processes() -> None:
    site = Site()
    one, two = site.members
    one.comes("m")
    site.deliver_all()
    for member in (two, one, two, two, one):
        member.comes("m")
        site.deliver_all()
    assert drain(site) == ["t2", "t3", "t4", "t5", "t6"]


def test_what_passed_in_another_process_counts() -> None:
    """Who took much without waiting goes after who took nothing."""
    site = Site(per_worker=4)
    one, two = site.members
    for _ in range(4):
        one.comes("m", "a", cost=100.0)
    site.later(1)
    two.comes("m", "a")
    site.deliver_all()
    two.comes("m", "b")
    site.deliver_all()
    one.ends(one.at_worker[0])
    site.deliver_all()
    assert [name[0] for name in site.called()] == ["b"]


def test_the_bounds_are_those_of_all_and_whoever_has_most_loses_one() -> None:
    site = Site(most=4)
    one, two = site.members
    one.comes("m", "x")
    site.deliver_all()
    mine = [one.comes("m", "a") for _ in range(4)]
    site.deliver_all()
    other = two.comes("m", "b")
    site.deliver_all()
    assert [request.outcome for request in mine] == ["", "", "", "pushed out"]
    assert not other.outcome
    again = one.comes("m", "a")
    site.deliver_all()
    assert again.outcome == "refused"
    assert one.line.waiting("m") == 4
    assert one.line.retry_after_s("m", 4) > 0


def test_the_limit_of_a_model_is_that_of_all_processes_and_leaves_other_models_alone() -> None:
    site = Site(limits={"m": 2})
    one, two = site.members
    for model in ("m", "n"):
        one.comes(model, "x")
    site.deliver_all()
    mine = [member.comes("m", "a") for member in (one, two)]
    site.deliver_all()
    refused = one.comes("m", "a")
    site.deliver_all()
    assert refused.outcome == "refused"
    assert one.line.retry_after_s("m", 2) > 0
    other = two.comes("m", "b")
    site.deliver_all()
    assert [request.outcome for request in (*mine, other)] == ["", "pushed out", ""], "tenants share it"
    assert [one.comes("n").outcome for _ in range(5)] == [""] * 5
    site.limits["m"] = 3
    again = one.comes("m", "c")
    site.deliver_all()
    assert again.waits, "it may be changed at any time"


def test_a_process_on_its_own_keeps_its_part_of_a_model_s_limit() -> None:
    site = Site(limits={"m": 3}, owned=False)
    one = site.members[0]
    one.comes("m")
    one.comes("m")
    site.later(SILENT_S + 0.5)
    assert [one.comes("m").outcome for _ in range(3)] == ["", "refused", "refused"], "half of 3, rounded up, is 2"


def test_everybody_is_told_where_he_stands_among_all() -> None:
    site = Site()
    one, two = site.members
    one.comes("m")
    site.deliver_all()
    asked = []
    for member in (one, two, one, two):
        asked.append(member.comes("m"))
        site.deliver_all()
    site.later(0.2)
    assert [r.member.line.ahead("m", r.ticket) for r in asked if r.ticket is not None] == [0, 1, 2, 3]
    one.leaves(asked[0])
    site.later(1.2)
    assert [r.member.line.ahead("m", r.ticket) for r in asked[1:] if r.ticket is not None] == [0, 1, 2]


def test_an_owner_of_a_very_long_queue_is_heard_all_the_same() -> None:
    site = Site(most=10_000)
    one = site.members[0]
    for _ in range(6_000):
        one.comes("m")
    site.deliver_all()
    for _ in range(5):
        site.later(SILENT_S / 4)
        assert not one.line.alone
    assert site.called() == []


def test_nobody_overtakes_those_who_wait_in_another_process() -> None:
    site = Site()
    one, two = site.members
    first = one.comes("m")
    site.deliver_all()
    waits = one.comes("m")
    site.deliver_all()
    one.at_worker.remove(first)
    site.in_flight["m"] -= 1  # nobody is told
    late = two.comes("m")
    assert late.waits
    site.deliver_all()
    assert (waits.outcome, late.outcome) == ("called", "")


def test_a_place_that_nobody_told_of_is_found() -> None:
    site = Site()
    one, two = site.members
    first = one.comes("m")
    site.deliver_all()
    waits = two.comes("m")
    site.deliver_all()
    one.ends(first)
    assert isinstance(one.up.pop(), Freed)  # lost
    assert waits.waits
    site.later(0.1)
    assert waits.outcome == "called"


def test_a_dead_process_holds_no_place() -> None:
    site = Site(most=2)
    one, two = site.members
    one.comes("m")
    site.deliver_all()
    for _ in range(2):
        two.comes("m")
    site.deliver_all()
    site.dies(two)
    site.deliver_all()
    assert site.owner is not None
    assert site.owner.line.room.requests == 0
    waits = one.comes("m")
    site.deliver_all()
    drain(site)
    assert waits.outcome == "called"


def test_a_process_that_dies_when_it_is_called_leaves_the_place_to_the_next() -> None:
    site = Site()
    one, two = site.members
    first = one.comes("m")
    site.deliver_all()
    two.comes("m")
    site.deliver_all()
    waits = one.comes("m")
    site.deliver_all()
    two.stopped = True
    one.ends(first)
    site.deliver_all()
    assert not waits.outcome, "the other one is called"
    site.dies(two)
    site.deliver_all()
    assert waits.outcome == "called"


def test_a_process_that_does_not_answer_is_passed_over() -> None:
    site = Site()
    one, two = site.members
    first = one.comes("m")
    site.deliver_all()
    stuck = [two.comes("m") for _ in range(2)]
    site.deliver_all()
    waits = one.comes("m")
    site.deliver_all()
    two.stopped = True
    one.ends(first)
    site.later(CALL_S + 0.3)
    assert waits.outcome == "called"
    two.stopped = False
    site.later(0.5)
    assert [request.outcome for request in stuck] == ["", ""], "the place is taken: it waits on"
    assert len(drain(site)) == 3


def test_who_finds_no_place_is_the_first_again() -> None:
    site = Site()
    one, two = site.members
    first = one.comes("m")
    site.deliver_all()
    waits, later = two.comes("m"), two.comes("m")
    site.deliver_all()
    one.ends(first)
    while site.owner is not None and not two.down:
        site.deliver_up(one) if one.up else site.deliver_in(site.owner) if site.owner.inbox else site.deliver_out(
            site.owner
        )
    quick = Request(one, "m", "quick")  # as a retry, which goes before those who wait
    one.begin(quick)
    site.later(1)
    assert (waits.waits, later.waits) == (True, True)
    one.ends(quick)
    site.later(0.5)
    assert (waits.outcome, later.outcome) == ("called", "")


def test_a_new_owner_is_told_of_all_in_the_order_in_which_they_came() -> None:
    site = Site()
    one, two = site.members
    one.comes("m")
    site.deliver_all()
    for member in (one, two, two, one, two):
        site.later(0.1)
        member.comes("m")
    site.later(0.1)
    site.control_dies()
    site.later(0.5)
    one.ends(one.at_worker[0])
    site.later(0.2)
    assert site.called() == []
    site.takes_over()
    site.later(SETTLE_S + 0.1)
    assert site.called() == ["t2"]
    assert drain(site) == ["t2", "t3", "t4", "t5", "t6"]


def test_an_old_owner_that_is_alive_still_says_nothing_that_counts() -> None:
    site = Site()
    one, two = site.members
    first = one.comes("m")
    site.deliver_all()
    waits = two.comes("m")
    site.deliver_all()
    site.takes_over()
    site.later(1)
    one.ends(first)
    site.deliver_all()
    assert waits.outcome == "called"
    assert [control.line.room.requests for control in site.controls] == [0, 0]
    site.control_dies()  # the one before is the owner again, and knows what it is told now
    waits = two.comes("m")
    site.later(1)
    two.ends(two.at_worker[0])
    site.later(0.2)
    assert waits.outcome == "called"


@pytest.mark.parametrize("how", ["dead", "silent", "never there"])
def test_without_an_owner_each_process_goes_on_with_its_part(how: str) -> None:
    site = Site(most=4, owned=how != "never there")
    one, two = site.members
    first = one.comes("m")
    site.deliver_all()
    if how == "dead":
        site.control_dies()
    elif how == "silent":
        site.owner.inbox = type("Deaf", (list,), {"append": lambda self, one: None})()  # type: ignore[union-attr]
        site.owner.line.tick = lambda: None  # type: ignore[method-assign, union-attr]
    waits, others = two.comes("m"), [one.comes("m") for _ in range(3)]
    site.later(SILENT_S - 0.2)
    one.ends(first)
    assert waits.waits, "for a moment an owner is waited for"
    site.later(0.4)
    assert sum(request.outcome == "called" for request in (waits, *others)) == 1
    site.later(SILENT_S)
    refused = one.comes("m")
    assert refused.outcome == "refused", "its part is 2"
    drain(site)
    site.later(0.2)
    drain(site)
    site.later(0.2)
    drain(site)
    assert not [request for request in (waits, *others) if request.waits]


def test_after_it_was_alone_a_process_goes_by_the_owner_again() -> None:
    site = Site()
    one, two = site.members
    first = one.comes("m")
    site.deliver_all()
    site.control_dies()
    waits = [two.comes("m")]
    site.later(0.1)
    waits.append(one.comes("m"))
    site.later(SILENT_S + 1)
    assert one.line.alone
    assert two.line.alone
    site.takes_over()
    site.later(0.5)
    assert [one.line.alone, two.line.alone] == [False, False]
    one.ends(first)
    site.deliver_all()
    assert [request.outcome for request in waits] == ["called", ""]


def test_what_is_lost_is_said_again() -> None:
    site = Site()
    one, two = site.members
    first = one.comes("m")
    site.deliver_all()
    kept, lost, gone = two.comes("m"), two.comes("n"), one.comes("m")
    assert lost.outcome == "passed"
    site.deliver_all()
    lost = two.comes("m")
    assert isinstance(two.up.pop(), Stand)
    one.leaves(gone)
    assert isinstance(one.up.pop(), Left)
    site.later(AGAIN_S + 1)
    assert site.owner is not None
    assert site.owner.line.room.requests == 2
    one.ends(first)
    site.deliver_all()
    assert kept.outcome == "called"
    two.ends(kept)
    site.deliver_all()
    assert lost.outcome == "called"


@pytest.mark.parametrize("lost", ["call", "answer", "refusal"])
def test_a_call_that_is_lost_or_its_answer_is_said_again(lost: str) -> None:
    site = Site(most=2)
    one, two = site.members
    first = one.comes("m")
    site.deliver_all()
    waits = two.comes("m")
    site.deliver_all()
    assert site.owner is not None
    one.ends(first)
    site.deliver_up(one)
    site.deliver_in(site.owner)
    if lost == "call":
        site.owner.out.clear()
    else:
        site.deliver_out(site.owner)
        if lost == "refusal":
            one.begin(Request(one, "m", "quick"))
        site.deliver_down(two)
        two.up.clear()
    site.later(2 * CALL_S + 0.5)
    assert waits.waits is (lost == "refusal")
    drain(site)
    site.later(1)
    assert waits.outcome == "called"
    assert site.owner.line.room.requests == 0


def test_who_need_not_wait_costs_no_word() -> None:
    site = Site(per_worker=1000)
    one = site.members[0]
    for _ in range(500):
        one.comes("m")
        one.ends(one.at_worker[0])
    assert not one.up
    site.now += 1
    one.line.tick()
    assert len(one.up) == 1
