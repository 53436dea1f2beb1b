"""A request's blocks, by a clock that the test moves: none is taken late, and none twice."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from router.disaggregation.bodies import document_of
from router.disaggregation.connectors import NIXL
from router.disaggregation.transfer import MOST, SHARE, State, Transfer

LEASE_S = 30.0
BODY = b'{"model": "m", "messages": []}'


class Life(RuleBasedStateMachine):
    """What happens to one request, in any order that its dispatches allow."""

    @initialize()
    def begin(self) -> None:
        self.now = 0.0
        self.transfer = Transfer("/v1/chat/completions", document_of(BODY), NIXL, LEASE_S, lambda: self.now)
        self.asked = 0
        self.ready_at: float | None = None
        self.number = 0
        self.taken: list[int] = []
        self.given_back = False

    @rule(seconds=st.floats(0, 40))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.transfer.wanted)
    @rule(revision=st.sampled_from("ab"))
    def prefill(self, revision: str) -> None:
        body = json.loads(self.transfer.begin(revision))
        assert (body["max_tokens"], body["stream"]) == (1, False)
        self.asked += 1

    @precondition(lambda self: self.transfer.busy)
    @rule()
    def ready(self) -> None:
        self.number += 1
        self.transfer.ready(json.dumps({"number": self.number}).encode(), 3)
        self.ready_at, self.given_back = self.now, False

    @precondition(lambda self: self.transfer.busy)
    @rule()
    def failed(self) -> None:
        self.transfer.failed()

    @precondition(lambda self: not self.transfer.busy)
    @rule()
    def sent_again(self) -> None:
        before = self.transfer.state
        self.transfer.again()
        if before is State.READY and self.ready_at is not None and self.now - self.ready_at <= SHARE * LEASE_S:
            assert self.transfer.state is State.READY, "nobody has read them"

    @rule(revision=st.sampled_from("ab"))
    def take(self, revision: str) -> None:
        fits = self.transfer.fits(revision)
        body = self.transfer.take(revision)
        assert bool(body) == fits
        if body:
            found: dict[str, Any] = json.loads(body)
            number = found.pop("kv_transfer_params")["number"]
            assert found == json.loads(BODY)
            assert self.transfer.revision == revision
            assert self.ready_at is not None
            assert self.now - self.ready_at <= SHARE * LEASE_S
            assert number == self.number
            assert number not in self.taken or self.given_back
            self.taken.append(number)
            self.given_back = False

    @rule()
    def the_connection_was_stale(self) -> None:
        self.given_back = self.given_back or self.transfer.state is State.TAKEN
        self.transfer.give_back()

    @invariant()
    def bounded(self) -> None:
        if hasattr(self, "transfer"):
            assert self.asked <= MOST


Life.TestCase.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
TestLife = Life.TestCase
