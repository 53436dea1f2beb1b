"""Messages between processes: cut anywhere, passed on to whom they concern, collections that end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.config import WorkerSettings
from router.admission import line_words as words
from router.discovery.progress import Phase, Progress
from router.discovery.registration import Lease
from router.processes.hub import COLLECT_S, EVERY_S, HANGS_S, Hub
from router.processes.members import Member, Members, Role
from router.processes.messages import (
    MAX_FRAME,
    AnyMessage,
    Applied,
    Collect,
    Collected,
    Counted,
    Deposed,
    Draining,
    Failed,
    Frames,
    FromLine,
    Gone,
    Known,
    Leaving,
    Membership,
    Owned,
    Progressed,
    Reading,
    Ready,
    Registered,
    States,
    Stop,
    ToLine,
    Wakes,
    Wanted,
    Woken,
    WorkerState,
    encode,
)
from router.processes.tally import Family, Sample
from router.worker_metrics import WorkerMetrics

UP = WorkerState("up", "", {"m": {"id": "m", "max_model_len": 10}})
counter = Family("c", "counter", "C", [Sample("c_total", (("m", "x"),), 2.0)])
ALL: list[AnyMessage] = [
    Ready(), Leaving(), Stop(), Stop(True), States({"http://a:1": UP}), Failed("http://a:1", "refused"), Collect(7),
    Membership("file", [WorkerSettings(model="m", url="http://a:1")], 3), Applied(3), Counted(7, [counter]),
    Collected(7, b"text"), Known(), Draining(), Wanted("org/m"), Progressed(Progress("org/m", Phase.FETCHING, 1, 2)),
    Reading("http://a:1", WorkerMetrics(1.5, 2, 3, 4, 0.5, frozenset({"lora"}))),
    Wakes(["m"], 3), Woken("m", "40%", "no GPU", 1.5), Owned(2), Deposed(), Gone(3),
    ToLine([
        words.Anew(), words.Stand(1, "m", "t", 1, 1.0, 5.0, 10, 7.5), words.Left(1), words.Back(1),
        words.Passed("m", "t", 1, 1.0, 5.0, 2), words.Freed("m"),
    ], 3),
    FromLine(2, [
        words.Call(1), words.Out(1, True, 4, 0.5), words.Queues(["m"]), words.Standing("m", 1, 0.5, [(1, 0)]),
    ]),
    Registered("w1", Lease((WorkerSettings(model="m", url="http://a:1"),), 7.5)), Registered("w1", None),
]  # fmt: skip


@given(st.lists(st.integers(1, 40), max_size=40))
def test_messages_cut_anywhere_come_whole(cuts: list[int]) -> None:
    data, frames, found = b"".join(encode(message) for message in ALL), Frames(), list[AnyMessage]()
    for size in [*cuts, len(data)]:
        piece, data = data[:size], data[size:]
        found += frames.feed(piece)
    assert found == ALL


@pytest.mark.parametrize(
    ("data", "why"),
    [((MAX_FRAME + 1).to_bytes(4, "big"), "a frame of"), (b"\0\0\0\1\xc1", "malformed"), (b"\0\0\0\1\x01", "object")],
)
def test_what_is_no_message_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Frames().feed(data)


class Scene:
    """A hub with one control process (1) and two data processes (2, 3)."""

    def __init__(self) -> None:
        self.now = 0.0
        self.sent: list[tuple[int, AnyMessage]] = []
        self.members = Members(2, 4, 10, lambda: self.now)
        self.hub = Hub(self.members, lambda number, message: self.sent.append((number, message)), lambda: self.now)
        self.members.plan()
        for number in (1, 2, 3):
            self.hub.handle(self.member(number), Ready())

    def says(self, number: int, message: AnyMessage) -> list[tuple[int, AnyMessage]]:
        self.sent.clear()
        self.hub.handle(self.members.all[number], message)
        return list(self.sent)

    def dies(self, number: int) -> None:
        gone = self.members.ended(number)
        assert gone is not None
        self.sent.clear()
        self.hub.ended(gone)

    def member(self, number: int) -> Member:
        return self.members.all[number]


def test_what_the_control_process_decides_goes_to_all_and_to_those_that_come_later() -> None:
    scene = Scene()
    assert scene.says(1, States({"a": UP})) == [(2, States({"a": UP})), (3, States({"a": UP}))]
    assert scene.says(2, States({"a": WorkerState("down", "")})) == []  # it is not for it to say
    scene.says(1, States({"b": UP}))
    scene.sent.clear()
    scene.hub.started(scene.member(2))
    assert scene.sent == [(2, States({"a": UP, "b": UP})), (2, Owned(1)), (2, Known())]
    scene.hub.keep({"b"})
    scene.sent.clear()
    scene.hub.started(scene.member(2))
    assert scene.sent == [(2, States({"b": UP})), (2, Owned(1)), (2, Known())]


def workers(*names: str) -> list[WorkerSettings]:
    return [WorkerSettings(model="m", url=f"http://{name}:1") for name in names]


def test_a_worker_that_left_is_released_when_no_process_will_begin_anything_there() -> None:
    scene = Scene()
    told = scene.says(1, Membership("file", workers("a", "b")))
    assert told == [(number, Membership("file", workers("a", "b"), 1)) for number in (2, 3)]
    scene.says(1, Membership("file", workers("b")))
    scene.says(2, Applied(2))
    assert scene.hub.released() == set()  # 3 has not heard yet
    scene.says(3, Applied(1))
    assert scene.hub.released() == set()
    scene.says(3, Applied(2))
    assert scene.hub.released() == {"http://a:1"}
    assert scene.hub.released() == set()


def test_a_worker_that_comes_back_or_is_known_elsewhere_is_not_released() -> None:
    scene = Scene()
    scene.says(1, Membership("file", workers("a", "b")))
    scene.says(1, Membership("cluster", workers("b")))
    scene.says(1, Membership("file", []))
    scene.says(1, Membership("file", workers("a")))
    scene.says(1, Membership("file", []))
    scene.says(1, Membership("file", workers("a")))
    for number in (2, 3):
        scene.says(number, Applied(6))
    assert scene.hub.released() == set()


def test_a_process_that_died_holds_no_worker_and_one_that_comes_hears_of_all() -> None:
    scene = Scene()
    scene.says(1, Membership("file", workers("a")))
    scene.says(1, Membership("cluster", workers("b")))
    scene.says(1, Membership("file", []))
    scene.says(2, Applied(3))
    gone = scene.members.ended(3)
    assert gone is not None
    scene.hub.ended(gone)
    assert scene.hub.released() == {"http://a:1"}
    scene.sent.clear()
    scene.hub.started(scene.member(2))
    assert [message for _, message in scene.sent] == [
        Membership("cluster", workers("b"), 2),
        Membership("file", [], 3),
        Owned(1),
        Known(),
    ]


def test_what_is_known_of_a_worker_ends_when_no_source_names_it_any_more() -> None:
    scene = Scene()
    scene.hub.keep({"http://b:1"})
    scene.says(1, Membership("file", workers("a", "b")))
    scene.says(1, States({"http://a:1": WorkerState("up", "", cordoned=True), "http://b:1": UP}))
    scene.says(1, Membership("file", []))
    scene.sent.clear()
    scene.hub.started(scene.member(2))
    assert scene.sent[1:] == [(2, States({"http://b:1": UP})), (2, Owned(1)), (2, Known())]  # of the configuration


def test_registrations_outlive_the_control_process_that_granted_them() -> None:
    scene = Scene()
    one, two = (Registered(name, Lease(tuple(workers(name)), 9.0)) for name in ("a", "b"))
    assert scene.says(1, one) == []  # of no interest to data processes
    scene.says(1, two)
    scene.says(1, Registered("a", None))
    assert scene.says(2, one) == []
    scene.members.renew(10)
    new = next(a.member for a in scene.members.plan() if a.member.role is Role.CONTROL)
    scene.sent.clear()
    scene.hub.started(new)
    scene.hub.started(scene.member(2))
    assert scene.sent == [(new.number, two), (new.number, Known()), (2, Owned(1)), (2, Known())]
    assert scene.says(1, one) == [(new.number, one)]  # until the new one serves


def test_models_are_asked_for_at_the_control_process_and_the_answer_goes_to_all_that_relay() -> None:
    scene = Scene()
    assert scene.says(3, Wanted("org/m")) == [(1, Wanted("org/m"))]
    told = Progressed(Progress("org/m", Phase.NOWHERE))
    assert scene.says(1, told) == [(2, told), (3, told)]
    reading = Reading("http://a:1", WorkerMetrics(1.5, 2, 3, 4, 0.5))
    assert scene.says(1, reading) == [(2, reading), (3, reading)]
    assert scene.says(2, reading) == []


def test_of_two_control_processes_the_later_one_counts() -> None:
    scene = Scene()
    scene.members.renew(10)
    new = next(a.member for a in scene.members.plan() if a.member.role is Role.CONTROL)
    assert scene.says(1, States({"a": UP})) != []  # until the other one checks
    scene.says(new.number, Ready())
    assert scene.says(1, States({"a": UP})) == []
    assert scene.says(new.number, States({"a": UP})) != []
    assert scene.says(2, Failed("a", "refused")) == [(new.number, Failed("a", "refused"))]


def test_who_owns_what_all_share_is_told_and_hears_whose_words_it_hears() -> None:
    scene = Scene()
    assert scene.says(3, Wakes(["m"])) == [(1, Wakes(["m"], 3))]
    assert scene.says(3, Wakes(["m"], 2)) == [(1, Wakes(["m"], 3))]  # whose it is says the supervisor
    assert scene.says(3, ToLine([words.Back(1)])) == [(1, ToLine([words.Back(1)], 3))]
    call, all_of_them = FromLine(3, [words.Call(1)]), FromLine(0, [words.Queues(["m"])])
    assert scene.says(1, call) == [(3, call)]
    assert scene.says(1, all_of_them) == [(2, all_of_them), (3, all_of_them)]
    assert scene.says(1, FromLine(9, [words.Call(1)])) == []  # it has ended
    assert scene.says(2, call) == []
    assert scene.says(1, Woken("m", "40%")) == [(2, Woken("m", "40%")), (3, Woken("m", "40%"))]
    scene.members.renew(10)
    new = next(a.member for a in scene.members.plan() if a.member.role is Role.CONTROL)
    told = scene.says(new.number, Ready())
    others = [number for number, one in scene.members.all.items() if one.role is Role.DATA]
    assert told == [(1, Deposed()), *[(number, Owned(new.number)) for number in others]]
    assert scene.says(2, Wakes([])) == [(new.number, Wakes([], 2))]
    assert scene.says(1, Woken("m")) == []
    scene.dies(3)
    assert scene.sent == [(1, Gone(3)), (new.number, Gone(3))]
    scene.dies(new.number)  # the one before is alive still: its word counts again
    others.remove(3)
    assert scene.sent == [(number, Owned(1)) for number in others]
    scene.dies(1)
    assert scene.sent == [(number, Owned(0)) for number in others]


def test_a_collection_asks_all_and_answers_when_all_have() -> None:
    scene = Scene()
    asked = scene.says(2, Collect(5))
    assert [number for number, _ in asked] == [1, 2, 3]
    number = asked[0][1].number  # type: ignore[union-attr]
    assert scene.says(2, Counted(number, [counter])) == []
    assert scene.says(1, Counted(number, [])) == []
    ((to, answer),) = scene.says(3, Counted(number, [counter]))
    assert (to, answer.number, answer.silent) == (2, 5, 0)  # type: ignore[union-attr]
    assert b'c_total{m="x"} 4.0' in answer.text  # type: ignore[union-attr]


def test_who_asks_while_one_runs_is_served_by_the_next() -> None:
    scene = Scene()
    first = scene.says(2, Collect(1))[0][1].number  # type: ignore[union-attr]
    assert scene.says(3, Collect(1)) == []
    scene.says(1, Counted(first, []))
    scene.says(2, Counted(first, []))
    after = scene.says(3, Counted(first, []))
    assert [type(message) for _, message in after] == [Collected, Collect, Collect, Collect]


def test_the_silent_and_the_dead_hold_nobody_up() -> None:
    scene = Scene()
    number = scene.says(2, Collect(1))[0][1].number  # type: ignore[union-attr]
    scene.says(1, Counted(number, []))
    scene.says(2, Counted(number, [counter]))
    scene.sent.clear()
    gone = scene.members.ended(3)
    assert gone is not None
    scene.hub.ended(gone)
    assert [to for to, message in scene.sent if isinstance(message, Collected)] == [2]
    scene.says(2, Collect(2))
    scene.now += COLLECT_S
    scene.sent.clear()
    scene.hub.tick()
    ((to, answer),) = scene.sent
    assert (to, answer.number, answer.silent) == (2, 2, 2)  # type: ignore[union-attr]
    assert b'c_total{m="x"} 2.0' in answer.text  # type: ignore[union-attr]  # what it said before


def test_it_asks_by_itself_from_time_to_time() -> None:
    scene = Scene()
    scene.now += EVERY_S
    assert scene.hub.next_s() <= scene.now
    scene.sent.clear()
    scene.hub.tick()
    assert [type(message) for _, message in scene.sent] == [Collect] * 3
    assert scene.hub.next_s() > scene.now


def test_a_process_that_answers_nothing_any_more_hangs() -> None:
    scene = Scene()
    named = []
    for _ in range(30):
        scene.now += EVERY_S / 2
        scene.sent.clear()
        scene.hub.tick()
        for to, message in list(scene.sent):
            if isinstance(message, Collect) and to != 3:
                scene.says(to, Counted(message.number, []))
        named += [(member.number, scene.now) for member in scene.hub.hanging()]
        if named:
            break
    ((number, when),) = named
    assert number == 3
    assert HANGS_S <= when <= HANGS_S + 2 * EVERY_S


def test_a_supervisor_that_slept_takes_nobody_for_hanging() -> None:
    scene = Scene()
    scene.now += 10 * HANGS_S
    scene.hub.tick()
    assert scene.hub.hanging() == []
