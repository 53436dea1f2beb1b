"""Prompts of the APIs beside chat: what ``/tokenize`` is asked is what vLLM renders, or nothing is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest

from router.kv.tokens import prompt_of

GOLDEN: Final = Path(__file__).parents[3] / "golden" / "vllm" / "rendered.jsonl"
RECORDED: Final[list[dict[str, Any]]] = [json.loads(line) for line in GOLDEN.read_text().splitlines()]
ENCODED: Final = {"type": "reasoning", "summary": [], "encrypted_content": "x"}


def question(path: str, body: dict[str, Any]) -> Any:
    prompt = prompt_of(path, json.dumps({"model": "tiny", **body}).encode())
    return None if prompt is None else json.loads(prompt.question)


@pytest.mark.parametrize("line", RECORDED, ids=lambda line: json.dumps(line["body"])[16:80])
def test_what_is_asked_gives_the_tokens_that_vllm_makes(line: dict[str, Any]) -> None:
    """Of a real vLLM (``tests.support.render_capture``): a question that changes wants a new record."""
    assert question(line["path"], line["body"]) == line["question"]
    if line["question"] is not None:
        assert line["tokens"] == line["rendered"]


def test_the_record_has_requests_of_both_kinds_for_each_api() -> None:
    kinds = {(line["path"], line["question"] is None) for line in RECORDED}
    assert len(kinds) == 2 * len({line["path"] for line in RECORDED}) == 6


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"input": "x", "previous_response_id": "resp_1"}),
        ("/v1/responses", {"input": "x", "previous_input_messages": [{"role": "user"}]}),
        ("/v1/responses", {"input": "x", "truncation": "auto"}),
        ("/v1/responses", {"input": "x", "tools": None}),
        ("/v1/responses", {"input": []}),
        ("/v1/responses", {"input": [1]}),
        ("/v1/responses", {}),
        ("/v1/responses", {"input": [{"type": "item_reference", "id": "msg_1"}]}),
        ("/v1/responses", {"input": [ENCODED, {"role": "user", "content": "x"}]}),
        ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "a"}]}]}),
        ("/v1/messages", {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}),
        ("/v1/messages", {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "x"}]}]}),
        ("/v1/messages", {"messages": [{"role": "user", "content": []}]}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "x"}], "system": [{"type": "image"}]}),
        ("/v1/messages", {"messages": "x"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "x"}], "tools": []}),
    ],
)
def test_nothing_is_asked_about_what_only_a_worker_knows(path: str, body: dict[str, Any]) -> None:
    assert question(path, body) is None


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
def test_a_salt_goes_along_and_bytes_that_are_no_text_do_not(path: str) -> None:
    body = {"input": "x", "messages": [{"role": "user", "content": "x"}], "cache_salt": "s"}
    prompt = prompt_of(path, json.dumps(body).encode())
    assert prompt is not None
    assert prompt.salt == "s"
    assert prompt_of(path, b'{"input": "\xff", "messages": [{"role": "user", "content": "\xff"}]}') is None
