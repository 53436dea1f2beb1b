"""Scanning a multipart form in pieces: forms written by a real client, cut anywhere."""

from __future__ import annotations

from itertools import pairwise

import pytest
from httpx import Request
from hypothesis import given, settings
from hypothesis import strategies as st

from router.errors import ApiError
from router.relay.form import FIELD_MAX, PARTS_MAX, FormScan


def scan(body: bytes, content_type: bytes, cuts: list[int] | None = None) -> str | None:
    scanner = FormScan(content_type)
    edges = [0, *sorted(cut % (len(body) + 1) for cut in cuts or []), len(body)]
    for begin, end in pairwise(edges):
        scanner.feed(body[begin:end])
    return scanner.finish()


@settings(max_examples=50)
@given(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=50),
    st.binary(max_size=2000),
    st.dictionaries(st.sampled_from(["language", "prompt", "temperature"]), st.text(st.characters(codec="utf-8"))),
    st.lists(st.integers(0, 10_000), max_size=8),
)
def test_model_is_found_in_any_form_however_it_is_cut(
    model: str, file: bytes, fields: dict[str, str], cuts: list[int]
) -> None:
    request = Request("POST", "http://h/", data={**fields, "model": model}, files={"file": ("a.wav", file)})
    assert scan(request.read(), request.headers["content-type"].encode(), cuts) == model


@given(st.binary(max_size=500))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    try:
        found = scan(body, b"multipart/form-data; boundary=b")
    except ApiError as error:
        found = str(error.status)
    assert found in (None, "400")


def part(name: str, value: bytes, more: str = "") -> bytes:
    return f'--b\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + value + b"\r\n"


TYPE = b'multipart/form-data; charset=x; boundary="b"'


def test_a_file_that_is_called_model_is_not_the_model() -> None:
    body = part("model", b"tiny", '; filename="m"') + b"--b--\r\n"
    assert scan(body, TYPE) is None


@pytest.mark.parametrize(
    "body",
    [
        part("model", b"a") + part("model", b"a") + b"--b--\r\n",
        part("model", b"a"),
        part("model", b"x" * (FIELD_MAX + 1)) + b"--b--\r\n",
        part("model", b"\xff") + b"--b--\r\n",
        part("x", b"") * (PARTS_MAX + 1) + b"--b--\r\n",
        part("vllm_xargs", b'{"kv_transfer_params": "x"}') + b"--b--\r\n",
        part("ec_transfer_params", b"") + b"--b--\r\n",
        part("bootstrap_host", b"10.0.0.1") + b"--b--\r\n",
        b"--b\r\nX: " + b"x" * 100_000 + b"\r\n\r\n\r\n--b--\r\n",
        b"",
    ],
)
def test_forms_that_are_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as refused:
        scan(body, TYPE)
    assert refused.value.status == 400


@pytest.mark.parametrize(
    "kind",
    [
        b"",
        b"application/json",
        b"multipart/form-data",
        b"multipart/mixed; boundary=b",
        b"multipart/form-data; boundary=" + b"x" * 400,
    ],
)
def test_other_types_are_refused(kind: bytes) -> None:
    with pytest.raises(ApiError) as refused:
        FormScan(kind)
    assert refused.value.status == 400
