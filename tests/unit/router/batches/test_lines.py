"""The lines of an input, however the bytes come; which requests are done; whose turn it is; what is asked again."""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.config import RetrySettings
from router.batches import outcome
from router.batches.asking import Answer
from router.batches.lines import BadLine, Census, Splitter, read
from router.batches.progress import WINDOW, Progress
from router.batches.records import Usage, born_at, new_id
from router.batches.slots import Slots
from router.routes import RAW_ROUTES

CHAT = "/v1/chat/completions"


@given(
    st.lists(st.binary(max_size=12).map(lambda b: b.replace(b"\n", b"")), max_size=6),
    st.lists(st.integers(1, 9), min_size=1),
)
def test_lines_are_the_same_however_they_are_cut(lines: list[bytes], cuts: list[int]) -> None:
    text = b"\n".join(lines)
    expected = [(n, one.strip()) for n, one in enumerate(text.split(b"\n"), 1) if one.strip() and len(one) <= 8]
    if not text.startswith(b"\xef\xbb\xbf"):
        splitter, found, at, turn = Splitter(8), [], 0, 0
        while at < len(text):
            size = cuts[turn % len(cuts)]
            found += splitter.feed(text[at : at + size])
            at, turn = at + size, turn + 1
        found += splitter.finish()
        assert [one for one in found if one[1] is not None] == expected
        assert {n for n, one in found if one is None} == {n for n, t in enumerate(text.split(b"\n"), 1) if len(t) > 8}


def test_a_body_goes_on_as_it_was_written() -> None:
    body = '{"model": "m", "x": [1.50, "\\u00e4"],  "n": 1e3}'
    text = f'{{"custom_id": "ä", "method": "POST", "url": "{CHAT}", "body": {body}}}'.encode()
    assert read(1, text, CHAT, 100).body == body.encode()
    with pytest.raises(BadLine) as bad:
        read(3, text, CHAT, 20)
    assert (bad.value.error.code, bad.value.error.param, bad.value.error.line) == ("body_too_large", "body", 3)


def test_an_input_of_too_many_errors_or_lines_is_not_read_on() -> None:
    census = Census(CHAT, 100, 5, 3)
    for number in range(9):
        if census.hopeless:
            break
        census.count(number, b"x")
    assert len(census.errors) == 3


@given(st.permutations(range(8)), st.data())
def test_progress(order: list[int], data: st.DataObject) -> None:
    """All below a number and some ahead say which requests are done, also after a break in between."""
    progress, done = Progress(), set()
    for number in order:
        if data.draw(st.booleans()):
            progress = Progress(progress.below, sorted(progress.ahead), progress.completed, progress.failed)
        progress.finish(number, good=number % 2 == 0)
        done.add(number)
        assert {n for n in range(8) if progress.done(n)} == done
    assert (progress.below, progress.ahead, progress.completed, progress.failed) == (8, set(), 4, 4)
    assert progress.may_begin(8 + WINDOW - 1)
    assert not progress.may_begin(8 + WINDOW)


def test_places_go_round_and_a_busy_model_holds_nobody_up() -> None:
    async def scene() -> list[str]:
        busy, order = {"b"}, []
        slots = Slots(1, lambda model: model not in busy)

        async def ask(tenant: str, model: str) -> None:
            await slots.take(tenant, model)
            order.append(tenant + model)
            await asyncio.sleep(0)
            slots.give()

        asks = [("x", "a"), ("x", "a"), ("x", "a"), ("y", "b"), ("z", "a"), ("w", "a")]
        tasks = [asyncio.create_task(ask(*one)) for one in asks]
        await asyncio.sleep(0)
        tasks[-1].cancel()
        await asyncio.wait(tasks[:3])
        assert not tasks[3].done()
        busy.clear()
        slots.serve()
        await asyncio.wait(tasks)
        assert slots.used == 0
        return order

    assert asyncio.run(scene()) == ["xa", "xa", "za", "xa", "yb"]


@pytest.mark.parametrize(
    ("path", "status", "tries", "settings", "expected"),
    [
        (CHAT, 200, 1, {}, None), (CHAT, 400, 1, {}, None), (CHAT, 500, 1, {}, None), (CHAT, 502, 1, {}, None),
        (CHAT, 429, 1, {}, 7.0), (CHAT, 503, 50, {}, 60.0), (CHAT, 502, 1, {"retry_generation": True}, 7.0),
        ("/v1/embeddings", 502, 2, {}, 7.0), ("/v1/embeddings", 502, 3, {}, None), ("/v1/embeddings", 500, 1, {}, None),
    ],
)  # fmt: skip
def test_what_is_asked_again(path: str, status: int, tries: int, settings: dict[str, bool], expected: float) -> None:
    answer = Answer(status, b"", "id", 7.0)
    assert outcome.pause_s(RAW_ROUTES[path.encode()], answer, tries, RetrySettings(**settings)) == expected


def test_what_is_written_of_an_answer() -> None:
    body = (
        b'{\n "usage": {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}\r\n}'
    )
    result = outcome.answered("batch_req_1", "a", Answer(200, body, "id"))
    assert result.line.count(b"\n") == 1
    assert json.loads(result.line)["response"]["body"] == json.loads(body)
    assert (result.good, result.usage) == (True, Usage(3, 1, 2, 0))
    odd = outcome.answered("batch_req_1", "a", Answer(200, b'{"usage": 5}', "id"))
    assert (odd.good, odd.usage) == (True, Usage())
    for content in (b"", b"Internal Server Error", b"\xff"):
        wrong = outcome.answered("batch_req_1", "a", Answer(500, content, "id"))
        assert not wrong.good
        assert json.loads(wrong.line)["error"]["code"] == "invalid_answer"


def test_ids_sort_by_time() -> None:
    ids = [new_id("file-", now) for now in (1.0, 1.001, 1e9, 2e9)]
    assert ids == sorted(ids)
    assert [born_at(one) for one in ids] == [1.0, 1.001, 1e9, 2e9]
