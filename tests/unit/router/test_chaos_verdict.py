"""The verdict of the chaos tests excuses what it must and nothing else, and their clients see each wrong byte."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.chaos import answers
from tests.support.chaos.fleet import Timeline
from tests.support.chaos.load import Asked, Client, End, Question
from tests.support.chaos.verdict import Journal, Verdict, judge

STREAM = Question("r", "stream", 7, 3, 0)
CHAT = Question("r", "chat", 7, 3, 0)
EVENTS = answers.stream(7, 3)
FAILED = answers.chunk(b'data: {"error":{"message":"m","code":"worker_lost"}}\n\n')


def asked(kind: str, end: End, **fields: Any) -> Asked:
    return Asked("r", kind, 10.0, 11.0, end, **fields)


def verdict(
    one: Asked, takers: tuple[str, ...] = (), spoilers: tuple[str, ...] = (), *, killed: dict[str, float] | None = None,
    routers: tuple[float, ...] = (), not_taken: tuple[str, ...] = (),
) -> Verdict:  # fmt: skip
    journal, found = Journal(), Verdict()
    journal.takers["r"] += takers
    journal.spoilers["r"] |= set(spoilers)
    judge([one], journal, Timeline(killed or {}, list(routers)), not_taken, found)
    return found


BAD = {"status": 502, "code": "worker_lost"}


@pytest.mark.parametrize(
    ("one", "what"),
    [
        (asked("stream", End.CUT, worker="1.1"), {"takers": ("1.1",), "spoilers": ("1.1",)}),
        (asked("stream", End.CUT, worker="1.1"), {"takers": ("1.1",), "killed": {"1.1": 10.5}}),
        (asked("embedding", End.CUT, worker="1.1"), {"takers": ("1.1",), "killed": {"1.1": 10.5}}),
        (asked("chat", End.ERROR, **BAD), {"takers": ("1.1",), "spoilers": ("1.1",)}),
        (asked("chat", End.ERROR, **BAD), {"takers": ("1.1",), "killed": {"1.1": 10.5}}),
        (asked("chat", End.ERROR, **BAD), {"killed": {"1.1": 10.5}}),
        (asked("embedding", End.BROKEN), {"routers": (10.5,)}),
    ],
)
def test_what_had_to_fail(one: Asked, what: dict[str, Any]) -> None:
    found = verdict(one, **what)
    assert (found.lost, found.twice, found.allowed.total()) == ([], [], 1)


@pytest.mark.parametrize(
    ("one", "what"),
    [
        (asked("stream", End.CUT, worker="1.1"), {"takers": ("1.1",)}),
        (asked("stream", End.CUT, worker="1.1"), {"takers": ("1.1",), "killed": {"2.1": 10.5}}),
        (asked("stream", End.CUT, worker="1.1"), {"takers": ("1.1",), "killed": {"1.1": 12.0}}),
        (asked("embedding", End.ERROR, **BAD), {"takers": ("1.1",), "spoilers": ("1.1",)}),
        (asked("chat", End.ERROR, **BAD), {"takers": ("1.1",)}),
        (asked("chat", End.ERROR, status=503), {"killed": {"1.1": 10.5}}),
        (asked("chat", End.ERROR, status=504), {"takers": ("1.1",), "spoilers": ("1.1",)}),
        (asked("chat", End.BROKEN), {"killed": {"1.1": 10.5}}),
        (asked("chat", End.WRONG), {"takers": ("1.1",), "spoilers": ("1.1",), "routers": (10.5,)}),
        (asked("chat", End.LATE), {"takers": ("1.1",), "spoilers": ("1.1",), "routers": (10.5,)}),
    ],
)
def test_what_was_lost(one: Asked, what: dict[str, Any]) -> None:
    found = verdict(one, **what)
    assert (len(found.lost), found.allowed.total()) == (1, 0)


def test_a_generation_is_not_begun_twice_without_need() -> None:
    right = asked("chat", End.RIGHT)
    assert len(verdict(right, ("1.1", "2.1")).twice) == 1
    assert len(verdict(right, ("1.1", "2.1", "3.1"), ("1.1", "2.1")).twice) == 1  # a stale connection: once
    assert verdict(right, ("1.1", "2.1"), ("1.1",)).twice == []
    assert verdict(right, ("1.1", "2.1"), not_taken=("1.1",)).twice == []
    assert verdict(right, ("1.1", "2.1"), killed={"1.1": 10.5}).twice == []
    assert verdict(asked("embedding", End.RIGHT), ("1.1", "2.1")).twice == []


@pytest.mark.parametrize(
    ("question", "got", "end", "code"),
    [
        (STREAM, b"".join(EVENTS), End.RIGHT, ""),
        (STREAM, b"".join(EVENTS[:2]), End.CUT, ""),
        (STREAM, b"".join(EVENTS)[:-1], End.CUT, ""),
        (STREAM, b"".join(EVENTS[:2]) + FAILED, End.CUT, "worker_lost"),
        (STREAM, FAILED, End.CUT, "worker_lost"),
        (STREAM, b"".join(EVENTS[:2]) + FAILED + answers.END, End.WRONG, ""),  # looks whole
        (STREAM, b"".join(EVENTS[:2]) + answers.END, End.WRONG, ""),
        (STREAM, EVENTS[0] + EVENTS[2], End.WRONG, ""),
        (STREAM, b"".join(EVENTS[:2])[:-3] + FAILED, End.WRONG, ""),  # inside another event
        (STREAM, b"".join(EVENTS).replace(b"0", b"1", 1), End.WRONG, ""),
        (CHAT, answers.whole(7, 3), End.RIGHT, ""),
        (CHAT, answers.whole(7, 3)[:-1], End.CUT, ""),
        (CHAT, answers.whole(7, 3).replace(b"c-7", b"c-8"), End.WRONG, ""),
    ],
)
def test_clients_know_each_byte(question: Question, got: bytes, end: End, code: str) -> None:
    found = Client(("", 0))._compared(question, got, "1.1")
    assert (found[0], found[2]) == (end, code)
