"""Reading the model from a JSON body, beside Python's own parser."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.errors import ApiError
from router.relay.fields import read


def model_of(body: bytes) -> str | None:
    return read(body).model


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
OTHER = st.dictionaries(st.text().filter(lambda k: k not in ("model", "vllm_xargs", "sampling_params")), JSON)


@settings(max_examples=50)
@given(OTHER, st.text(), st.booleans())
def test_model_is_found_in_any_document(other: dict[str, Any], model: str, ascii_only: bool) -> None:
    other.pop("kv_transfer_params", None)
    other.pop("ec_transfer_params", None)
    body = json.dumps({**other, "model": model}, ensure_ascii=ascii_only)
    try:
        encoded = body.encode()
    except UnicodeEncodeError:
        return
    try:
        model.encode()
    except UnicodeEncodeError:  # half of a surrogate pair has no UTF-8
        with pytest.raises(ApiError, match="not valid JSON"):
            model_of(encoded)
    else:
        assert model_of(encoded) == model


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    try:
        model = model_of(body)
    except ApiError as error:
        status = error.status
    else:
        status = 400 if model is None else 200
        assert model is None or json.loads(body)["model"] == model
    assert status in (200, 400)


def test_the_last_of_two_counts_as_in_vllm() -> None:
    body = b'{"model":"a","model":"b"}'
    assert model_of(body) == json.loads(body)["model"] == "b"


@pytest.mark.parametrize("prefix", ["", "vllm_xargs.", "sampling_params.extra_args."])
@pytest.mark.parametrize("name", ["kv_transfer_params", "ec_transfer_params"])
@pytest.mark.parametrize("value", [{}, {"do_remote_prefill": True}, "x", 0, [], False])
def test_transfer_parameters_are_refused_wherever_vllm_reads_them(prefix: str, name: str, value: Any) -> None:
    document: Any = {name: value}
    for key in reversed(prefix.split(".")[:-1]):
        document = {key: document}
    with pytest.raises(ApiError) as refused:
        model_of(json.dumps({"model": "m", **document}).encode())
    assert (refused.value.code, refused.value.param) == ("forbidden_parameter", prefix + name)


@pytest.mark.parametrize(
    "document",
    [
        {"kv_transfer_params": None},
        {"messages": [{"kv_transfer_params": 1}]},
        {"vllm_xargs": None, "sampling_params": None},
        {"vllm_xargs": [1], "sampling_params": "x"},
        {"sampling_params": {"extra_args": 5}},
        {"vllm_xargs": {"session_id": "s"}},
    ],
)
def test_what_vllm_would_not_read_is_left_to_it(document: Any) -> None:
    assert model_of(json.dumps({"model": "m", **document}).encode()) == "m"


@pytest.mark.parametrize(
    "name",
    [
        "bootstrap_host", "bootstrap_port", "bootstrap_room", "bootstrap_pair_key", "disagg_prefill_dp_rank",
        "cache_hit_threshold",
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", [{}, "x", 0, [1], False])
@pytest.mark.parametrize("other", [{}, {"max_tokens": "odd"}])
def test_what_says_where_sglang_takes_memory_from_is_refused(name: str, value: Any, other: Any) -> None:
    with pytest.raises(ApiError) as refused:
        model_of(json.dumps({"model": "m", name: value, **other}).encode())
    assert (refused.value.code, refused.value.param) == ("forbidden_parameter", name)
    assert model_of(json.dumps({"model": "m", name: None}).encode()) == "m"
