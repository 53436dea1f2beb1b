"""A late request and its two attempts: one answer, from the one that begins first, and nothing is left of the other."""

from __future__ import annotations

from typing import cast

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from helios.config import FallbackRule, FallbackTarget, HedgeSettings, HedgingSettings, RetrySettings
from router.kv.asking import Lookups
from router.membership import CONFIGURATION
from router.relay.upstream import Connection
from router.resilience.hedging import ENOUGH
from router.workers import parse_worker
from tests.support.relaying import BODY, CHAT, EMBED, EVENT, EVENTS, LAST, TRACEPARENT, FakeConnection, Scene

AFTER_S = 0.5
HEDGING = HedgingSettings(models={"m": HedgeSettings(after_s=AFTER_S)}, budget_floor_per_s=1)
GENERATION = RetrySettings(retry_generation=True, budget_floor_per_s=10)
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"
ERROR = b"HTTP/1.1 %b\r\ncontent-length: 2\r\n\r\n{}"


def late(scene: Scene) -> tuple[FakeConnection, FakeConnection]:
    """Both attempts: the first one is late, the second one has just been sent."""
    scene.started()
    first = scene.connected()
    scene.later(AFTER_S)
    return first, scene.connected()


def test_the_second_attempt_s_answer_counts_when_it_begins_first() -> None:
    scene = Scene(path=EMBED, hedging=HEDGING)
    first, second = late(scene)
    assert scene.in_flight == 2
    assert first.asked.partition(b"\r\n\r\n")[2] == second.asked.partition(b"\r\n\r\n")[2] == BODY
    assert second.asked.startswith(b"POST /base/v1/embeddings HTTP/1.1\r\nhost: b:1\r\n")
    second.comes(OK)
    assert scene.text.startswith(b"HTTP/1.1 200")
    assert (first.ended, second.ended) == ("aborted", "kept")
    assert scene.counted("hedges", model="m", result="won") == 1
    scene.settled()
    assert [(guard.asked, guard.failed) for guard in scene.guards[:2]] == [(0, 0), (1, 0)]


def test_the_first_one_s_counts_when_it_comes_after_all() -> None:
    scene = Scene(path=EMBED, hedging=HEDGING)
    first, second = late(scene)
    first.comes(OK)
    assert (first.ended, second.ended) == ("kept", "aborted")
    assert scene.counted("hedges", model="m", result="lost") == 1
    scene.settled()
    assert [(guard.asked, guard.failed) for guard in scene.guards[:2]] == [(1, 0), (0, 0)]


@pytest.mark.parametrize("connects", ["before", "afterwards"])
def test_the_second_attempt_has_the_request_s_id_and_trace_with_a_span_of_its_own(connects: str) -> None:
    scene = Scene(path=EMBED, hedging=HEDGING)
    scene.started()
    if connects == "before":
        first = scene.connected()
    scene.relay.bits = lambda count: 11
    scene.later(AFTER_S)
    second = scene.connected()
    if connects == "afterwards":  # the connection to the first worker was what took so long
        asker, first = scene.pool.connecting[0].asker, scene.pool.connection(reused=False)
        assert asker is not None
        scene.pool.connecting[0].asker = None
        asker.connected(cast(Connection, first))
    assert TRACEPARENT in first.asked
    assert TRACEPARENT.replace(b"%016x" % 10 + b"-01", b"%016x" % 11 + b"-01") in second.asked
    assert b"x-request-id: id-1\r\n" in first.asked
    assert b"x-request-id: id-1\r\n" in second.asked


@pytest.mark.parametrize(
    "how",
    ["off", "another model", "generation", "not urgent", "one worker", "fell back", "answered", "client left"],
)
def test_no_second_attempt(how: str) -> None:
    scene = Scene(
        path=CHAT if how == "generation" else EMBED,
        hedging={"off": None, "another model": HedgingSettings(models={"n": HedgeSettings(after_s=AFTER_S)})}.get(
            how, HEDGING
        ),
        urgent=how != "not urgent",
        workers=["m=http://a:1"] if how == "one worker" else ["m=http://a:1", "m=http://b:1", "n=http://c:1",
                                                            "n=http://d:1"],
        fallbacks=[FallbackRule(model="m", to=[FallbackTarget(model="n")])] if how == "fell back" else [],
    ).started()  # fmt: skip
    if how == "fell back":
        for _ in range(2):
            scene.connecting().not_connected("connection refused")
    connection = scene.connected()
    if how == "answered":
        connection.comes(OK[:-1])
    elif how == "client left":
        scene.exchange.gone()
    made = len(scene.pool.connecting)
    scene.later(5)
    assert len(scene.pool.connecting) == made
    assert scene.counted("unhedged", model="m", reason="nobody") == (how == "one worker")


def test_no_second_attempt_at_workers_that_are_busy_or_beyond_the_budget() -> None:
    scene = Scene(path=EMBED, hedging=HedgingSettings(models=HEDGING.models, max_in_flight=1))
    leases = [scene.workers.lease(worker) for worker in scene.workers.all]
    scene.started()
    scene.connected()
    scene.later(AFTER_S)
    assert len(scene.pool.connecting) == 1
    assert scene.counted("unhedged", model="m", reason="busy") == 1
    for lease in leases:
        lease.end()
    scene = Scene(path=EMBED, hedging=HedgingSettings(models=HEDGING.models, budget_floor_per_s=0))
    scene.started()
    scene.connected()
    scene.later(AFTER_S)
    assert len(scene.pool.connecting) == 1
    assert scene.counted("unhedged", model="m", reason="budget") == 1


def test_a_worker_that_was_overtaken_is_known_to_be_slow_and_not_to_fail() -> None:
    scene = Scene(path=EMBED, hedging=HEDGING)
    _, second = late(scene)
    scene.later(1)
    (slow, fast, _) = scene.workers.all
    second.comes(OK)
    assert slow.first_byte[False].value(scene.now) == pytest.approx(AFTER_S + 1)
    assert fast.first_byte[False].value(scene.now) == pytest.approx(1)
    assert (slow.guard.failed, slow.guard.recent.count, slow.guard.clear) == (0, 1, True)
    assert slow.guard.life.unheard_since is not None  # it still owes an answer, if it hangs


def test_the_percentile_is_of_first_attempts() -> None:
    rule = HedgeSettings(percentile=95)
    scene = Scene(path=EMBED, hedging=HedgingSettings(models={"m": rule}))
    assert scene.relay.hedges is not None
    hedge = scene.relay.hedges.of("m", scene.exchange._said.route)
    assert hedge is not None
    for _ in range(ENOUGH):
        hedge.took("/v1/embeddings", False, 1.0)
    scene.started()
    scene.connected()
    scene.later(0.9)
    assert len(scene.pool.connecting) == 1
    scene.later(0.3)
    scene.connected().comes(OK)
    scene.settled()


# --- heads and errors ---


def test_a_stream_s_head_waits_for_its_first_byte() -> None:
    """vLLM sends it at once; that is no sign of an answer."""
    scene = Scene(path=CHAT, hedging=HEDGING, retries=GENERATION)
    scene.started()
    first = scene.connected()
    first.comes(EVENTS)
    assert not scene.text
    scene.later(AFTER_S)
    second = scene.connected()
    second.comes(EVENTS)
    second.comes(EVENT)
    assert scene.text.endswith(b"\r\n\r\n" + EVENT)
    assert first.ended == "aborted"
    second.comes(EVENT + LAST)
    assert scene.text.endswith(EVENT + EVENT + LAST)
    scene.settled()


def test_a_comment_decides_as_any_byte_does() -> None:
    scene = Scene(path=CHAT, hedging=HEDGING, retries=GENERATION)
    scene.started()
    first = scene.connected()
    first.comes(EVENTS + b"e\r\n: keep-alive\n\n\r\n")
    assert b": keep-alive" in scene.text
    scene.later(5)
    assert len(scene.pool.connecting) == 1


def test_an_empty_answer_is_one() -> None:
    scene = Scene(path=EMBED, hedging=HEDGING)
    _, second = late(scene)
    second.comes(b"HTTP/1.1 204 No\r\n\r\n")
    assert scene.text.startswith(b"HTTP/1.1 204")
    scene.settled()


@pytest.mark.parametrize("status", [b"400 No", b"404 No", b"429 No", b"500 No", b"503 No"])
def test_an_error_of_the_second_attempt_reaches_nobody_while_the_first_goes_on(status: bytes) -> None:
    scene = Scene(path=EMBED, hedging=HEDGING)
    first, second = late(scene)
    second.comes(ERROR % status)
    assert second.ended in ("kept", "aborted")
    assert not scene.text
    first.comes(OK)
    assert scene.text.startswith(b"HTTP/1.1 200")
    assert scene.counted("hedges", model="m", result="failed") == 1
    scene.settled()


@pytest.mark.parametrize(("status", "passed"), [(b"400 No", True), (b"429 No", False), (b"500 No", False)])
def test_an_error_of_the_first_one_counts_where_it_is_about_the_request(status: bytes, passed: bool) -> None:
    scene = Scene(path=EMBED, hedging=HEDGING)
    first, second = late(scene)
    first.comes(ERROR % status)
    assert bool(scene.text) == passed
    if not passed:
        second.comes(OK)
        assert scene.text.startswith(b"HTTP/1.1 200")
    scene.settled()


@pytest.mark.parametrize("how", ["breaks", "garbage", "hung", "not connected"])
def test_one_that_dies_leaves_the_other_to_go_on(how: str) -> None:
    for dies in (0, 1):
        scene = Scene(path=EMBED, hedging=HEDGING).started()
        legs = [scene.connected()] if how != "not connected" or dies else []
        scene.later(AFTER_S)
        if how == "not connected":
            scene.pool.connecting[dies].asker.not_connected("connection refused")  # type: ignore[union-attr]
            scene.pool.connecting[dies].asker = None
            if not dies:
                legs = [scene.connected()]
        else:
            legs.append(scene.connected())
            _die(scene, legs.pop(dies), how)
        assert not scene.text
        assert scene.in_flight == 1
        legs[0].comes(OK)
        assert scene.text.startswith(b"HTTP/1.1 200")
        assert scene.counted("retries", reason="broke") == 0
        scene.settled()


def _die(scene: Scene, leg: FakeConnection, how: str) -> None:
    if how == "breaks":
        leg.breaks(stale=False)
    elif how == "garbage":
        leg.comes(b"NONSENSE\r\n\r\n")
    else:
        (worker,) = (one for one in scene.workers.all if b"host: " + one.address.authority + b"\r\n" in leg.asked)
        scene.relay.hung(worker)


def test_when_both_have_failed_the_request_goes_on_as_after_any_failure() -> None:
    workers = ["m=http://a:1", "m=http://b:1", "m=http://c:1"]
    scene = Scene(path=EMBED, hedging=HEDGING, workers=workers)
    first, second = late(scene)
    first.breaks(stale=False)
    second.breaks(stale=False)
    third = scene.connected()
    assert b"host: c:1\r\n" in third.asked  # neither of those that had it
    scene.later(5)
    assert len(scene.pool.connecting) == 3  # one second attempt for a request
    third.comes(OK)
    assert scene.text.startswith(b"HTTP/1.1 200")
    scene.settled()
    scene = Scene(path=EMBED, hedging=HEDGING)
    for leg in late(scene):
        leg.comes(ERROR % b"500 No")
    assert scene.text.startswith(b"HTTP/1.1 500")
    scene.settled()


def test_each_attempt_has_a_deadline_of_its_own() -> None:
    scene = Scene(path=EMBED, hedging=HEDGING)
    _, second = late(scene)
    scene.later(60 - AFTER_S)
    assert not scene.text
    assert scene.in_flight == 1
    scene.later(AFTER_S)
    assert scene.text.startswith(b"HTTP/1.1 504")
    assert second.ended == "aborted"
    scene.settled()


def test_a_client_that_leaves_leaves_nothing() -> None:
    scene = Scene(path=EMBED, hedging=HEDGING)
    legs = late(scene)
    scene.exchange.gone()
    assert [leg.ended for leg in legs] == ["aborted", "aborted"]
    assert scene.counted("hedges", model="m", result="gone") == 1
    assert [guard.asked for guard in scene.guards] == [0, 0, 0]
    scene.settled()


class RaceModel(RuleBasedStateMachine):
    """Anything may happen to either attempt, at any time."""

    scene: Scene
    written = b""

    @initialize(
        path=st.sampled_from([CHAT, EMBED]), idle=st.booleans(), renames=st.booleans(), asks=st.booleans(),
        falls_back=st.booleans(), generation=st.booleans(), late=st.booleans(),
    )  # fmt: skip
    def start(
        self, path: bytes, idle: bool, renames: bool, asks: bool, falls_back: bool, generation: bool, late: bool
    ) -> None:
        to = [FallbackTarget(model="n"), FallbackTarget(model="g", url="http://cloud/v1")]
        self.scene = Scene(
            path=path, hedging=HEDGING, renames=renames, retries=RetrySettings(retry_generation=generation, most=3),
            workers=["m=http://a:1", "m=http://b:1", "m=http://d:1", "n=http://c:1"],
            fallbacks=[FallbackRule(model="m", to=to)] if falls_back else [],
        )  # fmt: skip
        self.generation, self.path = generation, path
        if asks:
            self.scene.relay.lookups = cast(Lookups, self.scene.index)
        self.scene.started(idle=idle)
        if late and not asks:
            if not idle:
                self.scene.connected()
            self.scene.later(AFTER_S)

    @precondition(lambda self: self.scene.index.told)
    @rule()
    def index_says(self) -> None:
        self.scene.index.says(None)

    @property
    def asked(self) -> list[FakeConnection]:
        return [one for one in self.scene.pool.made if one.asker is not None]

    @precondition(lambda self: any(one.asker for one in self.scene.pool.connecting))
    @rule(well=st.booleans(), data=st.data())
    def connects(self, well: bool, data: st.DataObject) -> None:
        waiting = [one for one in self.scene.pool.connecting if one.asker is not None]
        one = data.draw(st.sampled_from(waiting))
        asker, one.asker = one.asker, None
        assert asker is not None
        if well:
            asker.connected(cast(Connection, self.scene.pool.connection(reused=False)))
        else:
            asker.not_connected("connection refused")

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def answer_comes(self, data: st.DataObject) -> None:
        connection = data.draw(st.sampled_from(self.asked))
        if connection.framing.head is None:
            heads = [EVENTS, EVENTS + EVENT, OK, b"NONSENSE\r\n\r\n", *(ERROR % s for s in (b"503 No", b"400 No"))]
            connection.comes(data.draw(st.sampled_from(heads)))
        else:
            connection.comes(data.draw(st.sampled_from([EVENT, EVENT + LAST, LAST, b"garbage"])))

    @precondition(lambda self: self.asked)
    @rule(stale=st.booleans(), data=st.data())
    def connection_breaks(self, stale: bool, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.asked)).breaks(stale)

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def a_worker_is_found_to_hang(self, data: st.DataObject) -> None:
        self.scene.relay.hung(data.draw(st.sampled_from(list(self.scene.workers.all))))

    @precondition(lambda self: not self.scene.exchange.response_complete)
    @rule(paused=st.booleans())
    def client_is_slow(self, paused: bool) -> None:
        self.scene.exchange.pause() if paused else self.scene.exchange.resume()

    @rule(seconds=st.sampled_from([AFTER_S, AFTER_S, AFTER_S, 11, 59.5]))
    def time_passes(self, seconds: float) -> None:
        self.scene.later(seconds)

    @precondition(lambda self: not self.scene.exchange.response_complete)
    @rule(there=st.sampled_from(["abd", "ad", "b"]))
    def workers_change(self, there: str) -> None:
        texts = [f"m=http://{name}:1" for name in there]
        self.scene.workers.apply(CONFIGURATION, [parse_worker(text) for text in texts])

    @precondition(lambda self: not self.scene.exchange.response_complete)
    @rule(how=st.sampled_from(["not yet", "not yet", "not yet", "cut", "gone"]))
    def it_ends(self, how: str) -> None:
        if how == "cut":
            self.scene.relay.cut()
        elif how == "gone":
            self.scene.exchange.gone()

    @invariant()
    def there_are_two_attempts_at_most_and_one_once_an_answer_has_begun(self) -> None:
        scene = getattr(self, "scene", None)
        if scene is None:
            return
        connecting = sum(one.asker is not None for one in scene.pool.connecting)
        under_way = connecting + len(self.asked)
        assert scene.in_flight <= under_way == len(scene.relay.dispatches)
        safe = self.generation or self.path == EMBED
        assert under_way <= (2 if safe and not scene.text else 1)
        assert sum(guard.life.waiting for guard in scene.guards) <= under_way
        taken = [scene.counted("hedges", model="m", result=one) for one in ("won", "lost", "failed", "gone")]
        assert sum(taken) <= 1

    @invariant()
    def nothing_is_held_afterwards(self) -> None:
        scene = getattr(self, "scene", None)
        if scene is None:
            return
        assert len(scene.client.over) <= 1
        assert scene.text.count(b"HTTP/1.1 ") <= 1
        assert scene.text.startswith(self.written)
        self.written = scene.text
        if scene.exchange.response_complete:
            scene.settled()
        else:
            assert scene.exchange in scene.relay.active
            assert scene.relay.dispatches or scene.index.told


TestRace = RaceModel.TestCase
TestRace.settings = hypothesis_settings(
    max_examples=150, stateful_step_count=15, suppress_health_check=[HealthCheck.too_slow]
)
