"""The beginning of a prompt, and what else scheduling reads of a request."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.errors import ApiError
from router.relay.fields import read
from router.scheduling.prompt import beginning
from router.scheduling.request import FORM, OUTPUT_MAX, OUTPUT_USUAL, PROMPT_MAX, Request

USER = {"role": "user", "content": "hello"}


def start(chars: int = 100, **fields: Any) -> str:
    return beginning(read(json.dumps({"model": "m", **fields}).encode()), chars)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"prompt": "a b"}, "a b"),
        ({"prompt": ["a b", "c"]}, "a b"),
        ({"prompt": [1, 22, 3]}, "1,22,3"),
        ({"prompt": [[1, 22], [3]]}, "1,22"),
        ({"token_ids": [1, 2]}, "1,2"),
        ({"messages": [USER]}, "user\nhello"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]}, "user\nhello"),
        ({"system": "s", "messages": [USER]}, "s\nuser\nhello"),
        ({"system": [{"type": "text", "text": "s"}], "messages": [USER]}, "s\nuser\nhello"),
        ({"messages": [{"role": "system", "content": None}, USER]}, "system\n\nuser\nhello"),
        ({"input": "i"}, "i"),
        ({"input": ["i", "j"]}, "i"),
        ({"input": [5, 6]}, "5,6"),
        ({"instructions": "s", "input": [USER]}, "s\nuser\nhello"),
        ({"instructions": "s", "input": "i"}, "s\ni"),
        ({"query": "q", "documents": ["d"]}, "q"),
        ({}, ""),
        ({"messages": []}, ""),
        ({"prompt": None}, ""),
        ({"prompt": ""}, ""),
    ],
)
def test_where_the_prompt_stands_on_each_route(fields: dict[str, Any], text: str) -> None:
    assert start(**fields) == text


def test_a_conversation_begins_alike_in_every_turn() -> None:
    turns = [{"role": "system", "content": "s"}, USER]
    first = start(messages=turns)
    turns += [{"role": "assistant", "content": "hi"}, {"role": "user", "content": "more"}]
    assert start(messages=turns) == first


@settings(max_examples=60)
@given(st.text(max_size=60), st.integers(1, 40), st.booleans(), st.sampled_from(["prompt", "batch", "message"]))
def test_it_is_the_beginning_of_the_text_however_that_is_written(
    text: str, chars: int, ascii_only: bool, where: str
) -> None:
    prompts: dict[str, dict[str, Any]] = {
        "prompt": {"prompt": text},
        "batch": {"prompt": [text, "x"]},
        "message": {"messages": [{"role": "", "content": text}]},
    }
    prompt = prompts[where]
    try:
        body = json.dumps(prompt, ensure_ascii=ascii_only).encode()
    except UnicodeEncodeError:
        return
    if any("\ud800" <= char <= "\udfff" for char in text):
        beginning(read(body), chars)  # half a pair is no text
        return
    whole = "\n" + text if where == "message" else text
    assert beginning(read(body), chars) == whole[:chars]


def test_a_cut_inside_an_escape_or_a_character_shows_nowhere() -> None:
    for end in ("é", "😀", "\\", '"', "\n"):
        for ascii_only in (True, False):
            body = json.dumps({"prompt": end * 5000}, ensure_ascii=ascii_only).encode()
            for chars in (1, 2, 3, 7):
                assert beginning(read(body), chars) == end * chars


def test_a_long_list_of_ids_is_cut_between_ids() -> None:
    ids = list(range(100000, 100000 + 5000))
    assert start(40, prompt=ids) == ",".join(map(str, ids[:10]))
    assert start(40, prompt=ids) == beginning(read(json.dumps({"prompt": ids}, separators=(",", ":")).encode()), 40)


def test_hints_of_another_type_are_left_to_the_worker() -> None:
    for hint in ({"messages": 5}, {"max_tokens": "x"}, {"user": 7}, {"stream": "yes"}, {"messages": [5]}):
        fields = read(json.dumps({"model": "m", "prompt": "p", **hint}).encode())
        assert fields.model == "m"
        assert Request("m", fields).prefix_key(10) is None
    assert read(b'{"model":"m","user":"\xff"}').model == "m"
    with pytest.raises(ApiError, match="must not send"):
        read(b'{"model":"m","user":7,"kv_transfer_params":{}}')


@pytest.mark.parametrize(
    ("path", "fields", "tokens"),
    [
        ("/v1/chat/completions", {}, OUTPUT_USUAL),
        ("/v1/chat/completions", {"max_tokens": 7}, 7),
        ("/v1/chat/completions", {"max_completion_tokens": 8}, 8),
        ("/v1/responses", {"max_output_tokens": 9}, 9),
        ("/inference/v1/generate", {"sampling_params": {"max_tokens": 10}}, 10),
        ("/v1/completions", {"max_tokens": 10**30}, OUTPUT_MAX),
        ("/v1/completions", {"max_tokens": -5}, 1),
        ("/v1/embeddings", {"max_tokens": 7}, 0),
    ],
)
def test_how_many_tokens_an_answer_is_taken_to_have(path: str, fields: dict[str, Any], tokens: int) -> None:
    body = json.dumps({"model": "m", **fields}).encode()
    request = Request("m", read(body), path=path, body=body)
    assert request.output_tokens == tokens
    assert request.prompt_tokens == len(body) // 4 + 1


def test_a_prompt_with_an_image_and_an_upload_are_bounded() -> None:
    body = json.dumps({"model": "m", "messages": [{"content": "x" * 4_000_000}]}).encode()
    assert Request("m", read(body), body=body).prompt_tokens == PROMPT_MAX + 1
    assert Request("m", None, path="/v1/audio/transcriptions").tokens == FORM
