"""A request's blocks, by a clock that the test moves: none is taken late, none twice, and of two workers that have the
request at once nobody's answer counts before the prompt was computed."""

from __future__ import annotations

import itertools
import json
from typing import Any, ClassVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from router.disaggregation.bodies import document_of
from router.disaggregation.connectors import CACHE_THRESHOLD, MOONCAKE, NIXL, NIXL_PUSH, SGLANG, SHARED_STORAGE, Shape
from router.disaggregation.transfer import MOST, SHARE, State, Transfer
from router.errors import ApiError

LEASE_S = 30.0
BODY = b'{"model": "m", "messages": []}'
PEER = {
    "remote_engine_id": b'"e"', "remote_host": b'"p"', "remote_port": b"5600", "tp_size": b"1",
    "bootstrap_addr": b'"http://p:8998"', "engine_id": b'"e-0"', "bootstrap_host": b'"p"', "bootstrap_port": b"8998",
}  # fmt: skip
ROWS = (NIXL, NIXL_PUSH, MOONCAKE, SHARED_STORAGE, CACHE_THRESHOLD, SGLANG)


def mark_of(body: dict[str, Any]) -> Any:
    """What of a body belongs to one attempt alone."""
    params = body.get("kv_transfer_params") or {}
    return params.get("number") or params.get("transfer_id") or body.get("bootstrap_room")


class Life(RuleBasedStateMachine):
    """What happens to one request, in any order that its dispatches allow: also by an attempt that has another one
    beside it, or whose time is over, and says so late."""

    rows: ClassVar[tuple[Any, ...]] = ROWS

    @initialize(data=st.data())
    def begin(self, data: Any) -> None:
        self.row = data.draw(st.sampled_from(self.rows))
        self.now = 0.0
        numbers = itertools.count(1)
        self.transfer = Transfer(
            "/v1/chat/completions", document_of(BODY), self.row, LEASE_S, lambda: self.now, lambda _: next(numbers), 0.8
        )
        self.asked = self.withdrawn = 0
        self.ready_at: float | None = None
        self.ticket = 0
        self.asked_marks: list[Any] = []
        self.marks: list[Any] = []
        self.number = 0
        self.sent = False
        """Whether the worker that answers has what is for it."""
        self.good = False
        """Whether what it has was computed."""

    @rule(seconds=st.floats(0, 40))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.transfer.to_probe)
    @rule(revision=st.sampled_from("ab"))
    def probe(self, revision: str) -> None:
        self.transfer.probe(revision)
        self.ticket, self.sent, self.good = self.transfer.ticket, False, False

    @precondition(lambda self: self.transfer.probing and self.sent)
    @rule(enough=st.booleans())
    def it_was_asked(self, enough: bool) -> None:
        if enough:
            self.transfer.had()
        else:
            self.transfer.missed()
            assert not self.transfer.to_probe, "once is enough"
            self.sent = False

    @precondition(lambda self: self.transfer.wanted and not self.transfer.to_probe)
    @rule(revision=st.sampled_from("ab"))
    def prefill(self, revision: str) -> None:
        body = json.loads(self.transfer.begin(revision, PEER, b"id"))
        assert body["stream"] is False
        assert (body.get("max_tokens") == 1) is self.row.capped
        if self.row.shape is Shape.CONCURRENT:
            assert mark_of(body) not in self.asked_marks, "no two attempts have one mark"
            self.asked_marks.append(mark_of(body))
        if self.row.own_ids:
            assert self.transfer.identity.startswith(b"id-")
        self.asked += 1
        self.ticket, self.sent, self.good = self.transfer.ticket, False, False

    @precondition(lambda self: self.transfer.busy and not self.transfer.probing)
    @rule()
    def ready(self) -> None:
        self.number += 1
        self.transfer.ready(json.dumps({"number": self.number}).encode(), 3)
        self.ready_at, self.good = self.now, True
        assert self.transfer.taken is (self.sent and self.row.shape is Shape.CONCURRENT)

    @precondition(lambda self: self.transfer.busy and not self.transfer.probing)
    @rule(wrong=st.booleans())
    def failed(self, wrong: bool) -> None:
        self.transfer.failed(ApiError(400, "c", "m") if wrong else None)
        self.good = False
        assert not self.transfer.taken, "what the other one answers does not count"
        assert self.transfer.undone is not self.row.alone
        assert (self.transfer.refusal is not None) <= (not self.row.alone)

    @precondition(lambda self: self.transfer.paired and self.sent)
    @rule()
    def the_other_one_refused(self) -> None:
        self.transfer.given_up()
        assert self.transfer.taken, "its answer goes on"
        self.withdrawn += 1

    @precondition(lambda self: not self.transfer.busy)
    @rule()
    def sent_again(self) -> None:
        before = self.transfer.state
        self.transfer.again()
        fresh = self.row.keeps or (self.ready_at is not None and self.now - self.ready_at <= SHARE * LEASE_S)
        if before is State.READY and fresh:
            assert self.transfer.state is State.READY, "nobody has read them"
        else:
            self.sent = self.good = False

    @rule(revision=st.sampled_from("ab"), mine=st.booleans())
    def take(self, revision: str, mine: bool) -> None:
        probing, paired = self.transfer.probing, self.transfer.paired
        fits = self.transfer.fits(revision)
        body = self.transfer.take(self.ticket if mine else self.ticket - 1, revision)
        if not mine:
            assert not body, "another attempt has nothing to do with them"
            return
        assert bool(body) == (probing or fits or (paired and not self.sent))
        if not body:
            return
        found: dict[str, Any] = json.loads(body)
        if self.row is CACHE_THRESHOLD:
            assert found.pop("cache_hit_threshold") == (0.8 if probing else 0)
        elif not paired:
            assert self.transfer.revision == revision
            assert self.ready_at is not None
            assert self.row.keeps or self.now - self.ready_at <= SHARE * LEASE_S
        mark = mark_of(found)
        if self.row.shape is Shape.CONCURRENT:
            assert mark == self.asked_marks[-1], "both workers have the same"
        if not self.row.keeps:
            assert mark not in self.marks
        self.marks.append(mark)
        for name in ("kv_transfer_params", "bootstrap_host", "bootstrap_port", "bootstrap_room"):
            found.pop(name, None)
        assert found == json.loads(BODY)
        self.sent = True

    @rule(mine=st.booleans())
    def the_connection_was_stale(self, mine: bool) -> None:
        before = self.transfer.state
        lost = self.transfer.lost(self.ticket if mine else self.ticket - 1)
        assert lost is (mine and before in (State.TAKEN, State.PAIRED))
        if not lost:
            assert self.transfer.state is before
        else:
            assert not self.transfer.fits(self.transfer.revision), "who may have read them has them alone"
            self.withdrawn += 1

    @rule(mine=st.booleans())
    def the_attempt_is_over(self, mine: bool) -> None:
        before = self.transfer.state
        self.transfer.left(self.ticket if mine else self.ticket - 1)
        if not mine:
            assert self.transfer.state is before
            return
        assert not self.transfer.busy
        if before is State.PAIRED and not self.sent:
            self.withdrawn += 1

    @invariant()
    def bounded(self) -> None:
        if hasattr(self, "transfer"):
            assert self.asked - self.withdrawn <= MOST


Life.TestCase.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
TestLife = Life.TestCase
