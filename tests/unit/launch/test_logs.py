"""Logs as they are shown: nothing is lost however they come, and no line is longer than the bound."""

from __future__ import annotations

import io
import json
import sys
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.home import Home
from helios.launch.logs import CUT, KEPT, LINE, Followers, Lines, recorded
from helios.launch.processes import Children


@given(st.lists(st.text(st.characters(exclude_categories=["C", "Z"]), max_size=9)), st.lists(st.integers(1, 7)))
def test_nothing_is_lost_however_it_is_cut(lines: list[str], sizes: list[int]) -> None:
    ends = ["\n", "\r\n", "\r"]
    text = "".join(line + ends[n % 3] for n, line in enumerate(lines)).encode()
    feed, found, at = Lines(), [], 0
    for size in [*sizes, len(text)]:
        found += feed.feed(text[at : at + size])
        at += size
    assert found + feed.end() == [line for line in lines if line]


def test_a_long_line_is_cut_and_what_follows_is_whole():
    lines = Lines()
    found = [line for _ in range(5) for line in lines.feed(b"x" * KEPT)]
    assert found == []
    assert lines.feed(b"x\nnext\nlast") == ["x" * LINE + CUT, "next"]
    assert lines.end() == ["last"]
    assert lines.end() == []
    assert lines.feed(b"x" * LINE + b"\n") == ["x" * LINE]


def test_all_that_a_worker_wrote_is_shown_behind_its_name(helios_home: Home, wait_for: Any) -> None:
    out = io.StringIO()
    code = "import sys; print('one', flush=True); print('two', file=sys.stderr, flush=True); print('last', end='')"
    with Followers(out) as followers, Children(helios_home) as children:
        child = children.start("vllm-decode-1", [sys.executable, "-c", code])
        followers.follow(child)
        wait_for(lambda: child.poll() is not None, what="the end")
    assert sorted(out.getvalue().splitlines()) == [f"vllm-decode-1 | {word}" for word in ("last", "one", "two")]


def test_what_is_written_while_it_is_ended_is_shown_too(helios_home: Home, wait_for: Any) -> None:
    out = io.StringIO()
    code = """
import signal, time
def end(*_):
    print("shutting down", flush=True)
    raise SystemExit(0)
signal.signal(signal.SIGTERM, end)
print("up", flush=True)
time.sleep(60)
"""
    with Followers(out) as followers, Children(helios_home) as children:
        followers.follow(children.start("vllm", [sys.executable, "-c", code]))
        wait_for(lambda: "up" in out.getvalue(), what="its first line")
    assert out.getvalue() == "vllm | up\nvllm | shutting down\n"


def test_a_slow_reader_holds_no_worker_up(helios_home: Home, wait_for: Any) -> None:
    class Slow(io.StringIO):
        taken = threading.Event()

        def write(self, text: str) -> int:
            self.taken.wait(30)
            return super().write(text)

    out = Slow()
    with Followers(out) as followers, Children(helios_home) as children:
        child = children.start("vllm", [sys.executable, "-c", "print('line\\n' * 100_000)"])
        followers.follow(child)
        wait_for(lambda: child.poll() is not None, what="its end, with nobody who takes its lines")
        out.taken.set()
    assert len(out.getvalue().splitlines()) == 100_000


def test_a_second_start_keeps_the_log_of_the_first(helios_home: Home, wait_for: Any) -> None:
    out = io.StringIO()
    with Followers(out) as followers, Children(helios_home) as children:
        for word in ("first", "second"):
            child = children.start("vllm", [sys.executable, "-c", f"print({word!r})"])
            followers.follow(child)
            wait_for(lambda child=child: child.poll() is not None, what="the end")  # type: ignore[misc]
            children.stop(child)
    assert child.log.read_text() == "second\n"
    assert (helios_home.logs / "vllm.log.1").read_text() == "first\n"
    assert sorted(out.getvalue().splitlines()) == ["vllm | first", "vllm | second"]


@pytest.mark.parametrize(
    ("line", "level"),
    [
        ("INFO 11-30 22:38:39 [core.py:402] init engine", "info"),
        ("(EngineCore pid=412) WARNING 11-30 [x.py:1] slow", "warning"),
        ("(EngineCore pid=412) ERROR 11-30 [x.py:1] broken", "error"),
        ("Traceback (most recent call last):", "info"),
        ("{not json", "info"),
    ],
)
def test_a_line_becomes_a_record_with_its_level(line: str, level: str) -> None:
    record = json.loads(recorded("vllm", line))
    assert (record["level"], record["logger"], record["message"]) == (level, "vllm", line)
    assert record["time"].endswith("Z")


def test_a_line_that_is_a_record_already_stays_as_it_is() -> None:
    line = '{"level": "INFO", "msg": "x"}'
    assert recorded("vllm", line) == line
