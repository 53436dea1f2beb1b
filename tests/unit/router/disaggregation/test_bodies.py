"""The two bodies of a disaggregated request, by route: what vLLM gets, field by field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.disaggregation.bodies import CAPS, document_of, for_decode, for_prefill, why_whole
from router.disaggregation.connectors import NIXL, NIXL_PUSH, SGLANG

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MESSAGES, GENERATE = "/v1/messages", "/inference/v1/generate"
ASKS = {
    "do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None, "remote_block_ids": None,
    "remote_host": None, "remote_port": None,
}  # fmt: skip
BLOCKS = {
    "do_remote_prefill": True, "do_remote_decode": False, "remote_block_ids": [[11, 12]], "remote_engine_id": "e",
    "remote_request_id": "chatcmpl-1", "remote_host": "10.0.0.5", "remote_port": 5600, "new": {"of": "tomorrow"},
}  # fmt: skip


def prefill(path: str, body: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(for_prefill(path, document_of(json.dumps(body).encode()), NIXL, {}))
    return found


def decode(body: dict[str, Any]) -> dict[str, Any]:
    document, values = document_of(json.dumps(body).encode()), {"answer": json.dumps(BLOCKS).encode()}
    found: dict[str, Any] = json.loads(for_decode(CHAT, document, NIXL, values))
    return found


@pytest.mark.parametrize(
    ("path", "body", "becomes"),
    [
        (
            CHAT,
            {
                "model": "m", "messages": [], "max_tokens": 50, "max_completion_tokens": 60, "min_tokens": 5,
                "stream": True, "stream_options": {"include_usage": True}, "temperature": 0.5,
            },
            {
                "model": "m", "messages": [], "max_tokens": 1, "max_completion_tokens": 1, "stream": False,
                "temperature": 0.5,
            },
        ),
        (
            CHAT, {"model": "m", "messages": []},
            {"model": "m", "messages": [], "max_tokens": 1, "max_completion_tokens": 1, "stream": False},
        ),
        (
            COMPLETIONS, {"model": "m", "prompt": "a", "max_tokens": 9, "min_tokens": 9},
            {"model": "m", "prompt": "a", "max_tokens": 1, "stream": False},
        ),
        (
            RESPONSES,
            {"model": "m", "input": "a", "max_output_tokens": 9, "stream": True, "store": True, "background": True},
            {"model": "m", "input": "a", "max_output_tokens": 1, "stream": False, "store": False, "background": False},
        ),
        (
            MESSAGES, {"model": "m", "messages": [], "max_tokens": 9, "thinking": {"budget_tokens": 5}},
            {"model": "m", "messages": [], "max_tokens": 1, "stream": False, "thinking": {"budget_tokens": 5}},
        ),
        (
            GENERATE, {"token_ids": [1], "sampling_params": {"max_tokens": 9, "min_tokens": 3, "top_k": 4}},
            {"token_ids": [1], "stream": False, "sampling_params": {"max_tokens": 1, "top_k": 4}},
        ),
        (GENERATE, {"token_ids": [1]}, {"token_ids": [1], "stream": False, "sampling_params": {"max_tokens": 1}}),
    ],
)  # fmt: skip
def test_limits_are_one_for_prefill_and_the_clients_own_for_the_answer(
    path: str, body: dict[str, Any], becomes: dict[str, Any]
) -> None:
    assert prefill(path, body) == becomes | {"kv_transfer_params": ASKS}
    assert decode(body) == body | {"kv_transfer_params": BLOCKS}


@given(
    st.dictionaries(
        st.text(max_size=8),
        st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda c: st.lists(c, max_size=3)),
        max_size=6,
    )
)
def test_whatever_else_a_body_says_goes_on_as_it_came(body: dict[str, Any]) -> None:
    assert decode(body) == body | {"kv_transfer_params": BLOCKS}
    for path, caps in CAPS.items():
        ours = {*caps.ones, *caps.away, *caps.off, caps.inside, "kv_transfer_params"}
        assert {k: v for k, v in prefill(path, body).items() if k not in ours} == {
            k: v for k, v in body.items() if k not in ours
        }


def test_values_keep_their_spelling() -> None:
    document = document_of(b'{"a": 1.50e3, "b": "\\u00e9", "c" : { "d":[ 1 ] }, "a": 2.0}')
    assert (
        for_decode(CHAT, document, NIXL, {"answer": b"{}"})
        == b'{"a":2.0,"b":"\\u00e9","c":{ "d":[ 1 ] },"kv_transfer_params":{}}'
    )


@pytest.mark.parametrize(
    ("path", "body", "why"),
    [
        (CHAT, {"n": 1}, ""),
        (CHAT, {"n": None, "prompt_logprobs": None, "echo": False}, ""),
        (CHAT, {"n": 2}, "several_answers"),
        (COMPLETIONS, {"prompt": "a", "best_of": 3}, "several_answers"),
        (GENERATE, {"token_ids": [1], "sampling_params": {"n": 3}}, "several_answers"),
        (GENERATE, {"token_ids": [1], "sampling_params": "odd"}, ""),
        (CHAT, {"prompt_logprobs": 1}, "whole_prompt"),
        (COMPLETIONS, {"prompt": "a", "echo": True}, "whole_prompt"),
        (CHAT, {"use_beam_search": True}, "whole_prompt"),
        (COMPLETIONS, {"prompt": ["a"]}, ""),
        (COMPLETIONS, {"prompt": [1, 2, 3]}, ""),
        (COMPLETIONS, {"prompt": [[1, 2, 3]]}, ""),
        (COMPLETIONS, {"prompt": ["a", "b"]}, "several_prompts"),
        (COMPLETIONS, {"prompt": [[1], [2]]}, "several_prompts"),
        (COMPLETIONS, {"prompt": []}, "several_prompts"),
        (RESPONSES, {"input": "a", "previous_response_id": "resp_1"}, "kept_state"),
        (RESPONSES, {"input": "a", "previous_response_id": None}, ""),
        ("/v1/embeddings", {"input": "a"}, "route"),
    ],
)
def test_what_can_not_be_split(path: str, body: dict[str, Any], why: str) -> None:
    assert why_whole(path, document_of(json.dumps(body).encode())) == why


def test_the_engine_that_caps_its_own_prefill_gets_the_clients_limits() -> None:
    """Its one token is the answer's first: what would be another request there would be another answer."""
    body = {"model": "m", "max_tokens": 50, "min_tokens": 5, "stream": True, "stream_options": {"include_usage": True}}
    values = {"bootstrap_host": b'"p"', "bootstrap_port": b"8998", "room": b"7"}
    document = document_of(json.dumps(body).encode())
    room = {"bootstrap_host": "p", "bootstrap_port": 8998, "bootstrap_room": 7}
    assert json.loads(for_prefill(CHAT, document, SGLANG, values)) == {
        "model": "m", "max_tokens": 50, "min_tokens": 5, "stream": False, **room,
    }  # fmt: skip
    assert json.loads(for_decode(CHAT, document, SGLANG, values)) == body | room


def test_a_value_that_may_be_missing_takes_its_field_along_and_another_one_is_an_error() -> None:
    values = {
        "remote_engine_id": b'"e"', "remote_host": b'"p"', "remote_port": b"5600", "tp_size": b"2",
        "request_id": b'"id"', "transfer_id": b'"xfer"',
    }  # fmt: skip
    params = json.loads(for_decode(CHAT, {}, NIXL_PUSH, values))["kv_transfer_params"]
    assert "pp_size" not in params
    assert params["tp_size"] == 2
    with pytest.raises(KeyError):
        for_decode(CHAT, {}, NIXL_PUSH, {})


def test_where_a_route_takes_the_id_from_the_body_both_workers_find_it_there() -> None:
    values = {"request_id": b'"id-1"', "transfer_id": b'"x"'}
    assert json.loads(for_prefill(RESPONSES, {}, NIXL_PUSH, values))["request_id"] == "resp_id-1"
    assert "request_id" not in json.loads(for_prefill(CHAT, {}, NIXL_PUSH, values))
