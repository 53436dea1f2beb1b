"""What routers are told of a worker, and when."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from helios.errors import UsageError
from helios.launch.worker.registering import FIRST_S, PACE, Call, Heard, Leases, addresses, checked

LEASE_S = 30.0


def leases(*routers: str) -> Leases:
    found = Leases(LEASE_S)
    found.names(routers)
    return found


def test_a_worker_registers_renews_in_time_and_takes_it_back():
    found = leases("a")
    assert found.due(0.0) == []
    found.want(True)
    assert found.due(0.0) == [Call("a", True)]
    found.said(Call("a", True), Heard.YES, 0.0)
    assert found.due(LEASE_S / PACE - 0.1) == []
    assert found.next_due == LEASE_S / PACE
    assert found.due(LEASE_S / PACE) == [Call("a", True)]
    found.want(False)
    assert found.due(5.0) == [Call("a", False)]
    found.said(Call("a", False), Heard.YES, 5.0)
    assert (found.held, found.due(100.0), found.next_due) == (0, [], None)


def test_a_router_that_fails_is_told_again_soon_and_the_others_go_on():
    found = leases("a", "b")
    found.want(True)
    found.said(Call("a", True), Heard.NO, 0.0)
    found.said(Call("b", True), Heard.YES, 0.0)
    assert found.due(FIRST_S) == [Call("a", True)]
    pauses = []
    now = FIRST_S
    for _ in range(8):
        found.said(Call("a", True), Heard.NO, now)
        due = found.next_due
        assert due is not None
        pauses.append(due - now)
        now = due
        found.said(Call("b", True), Heard.YES, now)
    assert pauses == sorted(pauses)
    assert pauses[-1] == LEASE_S / PACE, "not slower than it would be renewed"


def test_what_may_have_arrived_is_taken_back():
    """A call whose answer was lost may have registered it."""
    found = leases("a")
    found.want(True)
    found.said(Call("a", True), Heard.PERHAPS, 0.0)
    found.want(False)
    assert found.due(0.1) == [Call("a", False)]
    assert found.held == 1
    found = leases("a")
    found.want(True)
    found.said(Call("a", True), Heard.NO, 0.0)
    found.want(False)
    assert (found.due(0.1), found.held) == ([], 0), "nobody waits for a router that never heard of it"


def test_a_change_while_a_call_is_under_way_is_said_after_it():
    found = leases("a")
    found.want(True)
    (call,) = found.due(0.0)
    found.want(False)
    found.said(call, Heard.YES, 1.0)
    assert found.due(1.0) == [Call("a", False)]


def test_a_new_router_hears_of_it_and_one_that_is_gone_is_forgotten():
    found = leases("a")
    found.want(True)
    found.said(Call("a", True), Heard.YES, 0.0)
    found.names(["b"])
    assert found.due(1.0) == [Call("b", True)]
    found.said(Call("a", True), Heard.YES, 1.0)
    assert found.held == 0


class Routers(RuleBasedStateMachine):
    """Against routers that believe for LEASE_S what they were told; answers get lost."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.leases = leases("a", "b")
        self.believe: dict[str, float] = {}
        self.wanted = False
        self.well_since = 0.0

    @rule(there=st.booleans())
    def want(self, there: bool) -> None:
        if there is not self.wanted:
            self.well_since = self.now
        self.wanted = there
        self.leases.want(there)

    @rule(seconds=st.floats(0.1, 3.0), lost=st.sampled_from(["", "", "", "call", "answer"]))
    def turn(self, seconds: float, lost: str) -> None:
        self.now += seconds
        for call in self.leases.due(self.now):
            if lost != "call":
                if call.there:
                    self.believe[call.router] = self.now + LEASE_S
                else:
                    self.believe.pop(call.router, None)
            heard = Heard.PERHAPS if lost == "answer" else Heard.NO if lost else Heard.YES
            self.leases.said(call, heard, self.now)
        if lost:
            self.well_since = self.now

    @invariant()
    def routers_know(self) -> None:
        know = {router for router, until in self.believe.items() if until > self.now}
        if self.now - self.well_since > LEASE_S / PACE + 3.1:
            assert know == ({"a", "b"} if self.wanted else set())
        assert not (know and not self.wanted and not self.leases.held), "what is held is known to be"


TestRouters = Routers.TestCase


def test_all_addresses_of_a_name_are_meant():
    assert addresses("http://127.0.0.1:8481") == ["http://127.0.0.1:8481"]
    assert addresses("http://[::1]:8481/prefix/") == ["http://[::1]:8481/prefix"]
    assert "http://127.0.0.1:8481" in addresses("http://localhost:8481")


@pytest.mark.parametrize(
    "url", ["router:8481", "https://router:8481", "http://", "http://r:x", "http://r:1/?a=1", "ftp://r"]
)
def test_what_is_no_administration_is_refused(url):
    with pytest.raises(UsageError, match=r"worker\.routers"):
        checked([url])
    checked(["http://router:8481", "http://10.0.0.1", "http://[fd00::1]:8481"])
