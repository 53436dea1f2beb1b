"""Messages that get lost, come twice or come from somebody else: what is taken is a true story, or forgotten."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from router.kv import stream as stream_module
from router.kv.index import KvIndex
from router.kv.stream import Stream
from router.kv.wire import pack
from tests.support.kv_events import BLOCK, Cache, Log, decode


class Taken:
    """A sink that notes what it is told."""

    def __init__(self) -> None:
        self.payloads: list[bytes] = []
        self.asked: list[int] = []
        self.forgotten = 0

    def take(self, payload: bytes) -> None:
        self.payloads.append(payload)

    def forget(self) -> None:
        self.payloads.clear()
        self.forgotten += 1

    def ask(self, first: int) -> None:
        self.asked.append(first)

    @property
    def text(self) -> str:
        return b"".join(self.payloads).decode()


def opened(*, replays: bool = True) -> tuple[Taken, Stream]:
    sink = Taken()
    stream = Stream(sink, replays=replays)
    stream.opened()
    return sink, stream


def answer(stream: Stream, *messages: tuple[int, bytes]) -> None:
    for message in messages:
        stream.replayed(*message)
    stream.replay_ended()


def log(text: str, first: int = 0) -> list[tuple[int, bytes]]:
    return [(number, letter.encode()) for number, letter in enumerate(text, first)]


def test_who_joins_late_asks_for_all() -> None:
    sink, stream = opened()
    assert sink.asked == [0]
    stream.live(3, b"d")
    assert sink.text == ""
    answer(stream, *log("abcd"))
    stream.live(4, b"e")
    assert (sink.text, stream._last, stream.asking, sink.forgotten) == ("abcde", 4, False, 0)


def test_a_gap_is_filled() -> None:
    sink, stream = opened()
    answer(stream, *log("ab"))
    stream.live(4, b"e")
    stream.live(5, b"f")
    assert (sink.text, sink.asked) == ("ab", [0, 1])
    answer(stream, *log("bcdef", 1))
    stream.live(6, b"g")
    assert (sink.text, sink.forgotten, stream.gaps) == ("abcdefg", 0, 1)


def test_a_gap_that_is_too_old_is_a_new_beginning() -> None:
    sink, stream = opened()
    answer(stream, *log("ab"))
    stream.live(9, b"j")
    answer(stream, *log("hij", 7))
    assert (sink.text, sink.forgotten, stream._last) == ("hij", 1, 9)


def test_without_replays_a_gap_is_a_new_beginning_and_so_is_a_new_connection() -> None:
    sink, stream = opened(replays=False)
    stream.live(5, b"f")
    stream.live(6, b"g")
    assert sink.text == "fg"
    stream.live(8, b"i")
    assert (sink.text, sink.forgotten, sink.asked) == ("i", 1, [])
    stream.closed()
    stream.opened()
    assert (sink.text, sink.forgotten) == ("", 2)
    stream.live(9, b"j")
    assert sink.text == "j"


def test_another_process_at_the_same_address_is_noticed() -> None:
    sink, stream = opened()
    answer(stream, *log("abc"))
    for other, asks in (("ABCDE", [2, 0]), ("A", [2, 0]), ("", [2, 0])):
        sink.asked.clear()
        stream.closed()
        stream.opened()
        for message in log(other)[stream._last or 0 :]:
            stream.replayed(*message)
            if sink.asked == asks:
                break  # the first answer is given up
        if sink.asked != asks:
            stream.replay_ended()
        assert sink.asked == asks
        assert sink.text == ""
        answer(stream, *log(other))
        assert sink.text == other
        stream.closed()
        stream.lost()
        stream.opened()
        answer(stream, *log("abc"))
    stream.live(3, b"d")
    stream.live(0, b"A")  # without a new connection that was seen
    assert sink.text == ""
    answer(stream, *log("A"))
    assert sink.text == "A"


def test_the_same_process_after_a_lost_connection_keeps_its_blocks() -> None:
    sink, stream = opened()
    answer(stream, *log("abc"))
    stream.closed()
    stream.opened()
    answer(stream, *log("cde", 2))
    assert (sink.text, sink.forgotten) == ("abcde", 0)


def test_no_answer_is_a_new_beginning() -> None:
    sink, stream = opened()
    stream.live(3, b"d")
    stream.replay_failed()
    assert sink.text == "d"
    stream.audit()
    assert not stream.asking  # who never answered isn't asked
    stream.live(5, b"f")
    stream.live(6, b"g")
    stream.replay_failed()
    assert (sink.text, sink.forgotten) == ("fg", 1)


def test_an_audit_finds_what_was_lost_at_the_end() -> None:
    sink, stream = opened()
    answer(stream, *log("ab"))
    stream.audit()
    stream.audit()
    assert sink.asked == [0, 1]
    answer(stream, *log("bc", 1))
    assert (sink.text, stream.asking) == ("abc", False)


def test_the_first_message_of_all_is_missed_like_any_other() -> None:
    sink, stream = opened()
    answer(stream)
    stream.live(1, b"b")
    assert (sink.text, sink.asked, stream.gaps) == ("", [0, 0], 1)
    answer(stream, *log("ab"))
    assert (sink.text, stream.asking) == ("ab", False)
    sink, stream = opened()
    answer(stream)
    stream.live(1, b"b")
    answer(stream)  # it says that there is none, twice
    assert stream.asking
    answer(stream)
    assert (sink.text, stream.asking) == ("b", False)


def test_what_is_not_to_be_had_is_asked_for_twice() -> None:
    sink, stream = opened()
    answer(stream, *log("ab"))
    stream.live(5, b"f")
    answer(stream, *log("b", 1))  # perhaps given before the others were published
    assert stream.asking
    answer(stream, *log("b", 1))
    assert (sink.text, sink.forgotten, stream.asking) == ("f", 1, False)


def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "WAITING_BYTES", 10)
    sink, stream = opened()
    for message in log("abcdefghijklmnopqrst"):
        stream.live(*message)
    assert stream._waiting_bytes == 10
    answer(stream, *log("abc"))
    assert sink.asked == [0, 2]
    answer(stream, *log("cdefghijklmnopqrst", 2))
    assert (sink.text, stream._waiting_bytes) == ("abcdefghijklmnopqrst", 0)


class Follower:
    """A stream and the index behind it: the sink of the model below."""

    def __init__(self) -> None:
        self.index, self.asked = KvIndex(), -1

    def take(self, payload: bytes) -> None:
        for event in decode(payload):
            assert event is not None
            for _ in event.act(self.index.rank("w", 0)):
                pass

    def forget(self) -> None:
        self.index.forget("w")

    def ask(self, first: int) -> None:
        self.asked = first


class StreamModel(RuleBasedStateMachine):
    """A worker, its publisher, and a wire that loses messages, connections and answers."""

    def __init__(self) -> None:
        super().__init__()
        self.sink = Follower()
        self.stream = Stream(self.sink, replays=True)
        self.cache, self.log, self.life = Cache(), Log(kept=6), 0
        self.wire: list[tuple[int, bytes]] = []
        self.connected = False
        self.whole = False
        """Whether all there was had come once: what begins after an answer that failed knows nothing of before."""
        self.asked: list[list[int]] = []

    def publish(self) -> None:
        payload = self.cache.flush(ts=float(self.life))
        if payload:
            message = self.log.publish(payload)
            if self.connected:
                self.wire.append(message)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=BLOCK, max_size=BLOCK * 4))
    def request(self, tokens: list[int]) -> None:
        self.asked.append([*tokens, 0])
        self.cache.compute(tokens)
        self.publish()

    @precondition(lambda self: self.cache.copies)
    @rule(data=st.data())
    def evict(self, data: Any) -> None:
        self.cache.remove(data.draw(st.sampled_from(sorted(self.cache.copies, key=repr))))
        self.publish()

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.publish()

    @rule()
    def restart(self) -> None:
        self.life += 1
        self.cache, self.log = Cache(self.life), Log(kept=6)
        self.disconnect()

    @precondition(lambda self: not self.connected)
    @rule()
    def connect(self) -> None:
        self.connected = True
        self.stream.opened()

    @rule()
    def disconnect(self) -> None:
        if self.connected:
            self.connected = False
            self.wire.clear()
            self.stream.closed()

    @precondition(lambda self: self.wire)
    @rule(lost=st.booleans())
    def deliver(self, lost: bool) -> None:
        message = self.wire.pop(0)
        if not lost:
            self.stream.live(*message)

    @precondition(lambda self: self.stream.asking)
    @rule(upto=st.integers(0, 6), whole=st.booleans())
    def reply(self, upto: int, whole: bool) -> None:
        self.answer(None if whole else upto)

    def answer(self, upto: int | None) -> None:
        """The publisher's answer to the last question; one that breaks off is given up at its deadline."""
        first = self.sink.asked
        self.sink.asked = -1
        for message in self.log.replay(first)[:upto]:
            self.stream.replayed(*message)
            if self.sink.asked >= 0:
                return  # asked anew, which gives this answer up
        if upto is None:
            self.whole = self.whole or first == 0
            self.stream.replay_ended()
        else:
            self.whole = False
            self.stream.replay_failed()

    @rule()
    def settle(self) -> None:
        """All that is on the way comes, and nothing is lost: then every claim is true, and complete if it can be."""
        if not self.connected:
            self.connect()
        while self.wire or self.stream.asking:
            if self.wire:
                self.deliver(lost=False)
            else:
                self.answer(None)
        self.stream.audit()
        while self.stream.asking:
            self.answer(None)
        for prompt in self.asked[-10:]:
            claim = self.sink.index.score(pack(prompt), ["w"]).get("w", 0)
            truth = self.cache.longest(prompt)
            assert claim <= truth
            if self.whole and self.log.number <= self.log.kept:
                assert claim == truth


TestStream = StreamModel.TestCase
TestStream.settings = settings(max_examples=150, stateful_step_count=40, suppress_health_check=[HealthCheck.too_slow])
