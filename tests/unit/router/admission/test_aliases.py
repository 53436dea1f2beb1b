"""Aliases: the model's name in a body is replaced where it counts, and not a byte else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helios.errors import UsageError
from router.admission.aliases import check, replaced
from router.errors import ApiError
from router.relay.model_name import PLACES

TRAPS = [
    "fast", '"model":"fast"', '{"model": "fast"}', '\\"model\\": \\"fast\\"', 'x"', "\\", "{", "}", "[", "ü\u2028",
]  # fmt: skip
texts = st.sampled_from(TRAPS) | st.text(max_size=5)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts | st.just({"model": "fast"}),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
pairs = st.lists(st.tuples(texts.filter(lambda name: name != "model"), values), max_size=4)


@settings(max_examples=60)
@given(pairs, pairs, st.sampled_from([(",", ":"), (" ,\n", " :\t")]), st.booleans())
def test_only_the_document_s_own_model_changes(
    before: Any, after: Any, separators: tuple[str, str], ascii: bool
) -> None:
    members = [*before, ("model", "fast"), *after]
    texts = [json.dumps(name) + separators[1] + json.dumps(value, ensure_ascii=ascii, separators=separators)
             for name, value in members]  # fmt: skip
    body = ("{" + separators[0].join(texts) + "}").encode("utf-8", "surrogatepass")
    try:
        json.loads(body.decode())
    except ValueError:
        return
    texts[len(before)] = json.dumps("model") + separators[1] + '"org/model@1"'
    wanted = ("{" + separators[0].join(texts) + "}").encode()
    if body.count(b'"model"') > PLACES:
        return
    assert replaced(body, "fast", "org/model@1") == wanted


def test_of_two_the_last_counts() -> None:
    assert replaced(b'{"model":"fast","model":"fast"}', "fast", "m") == b'{"model":"fast","model":"m"}'


def test_an_escaped_value_is_the_same_name() -> None:
    assert replaced(b'{"model":"f\\u0061st\\/1"}', "fast/1", 'a"b') == b'{"model":"a\\"b"}'


@pytest.mark.parametrize(
    "body",
    [b'{"mod\\u0065l":"fast"}', b'{"model":"fast","mod\\u0065l":"fast"}',
     b'{"model":"fast","x":[' + b",".join([b'{"model":"fast"}'] * (PLACES + 1)) + b"]}"],
)  # fmt: skip
def test_a_body_that_hides_the_name_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        replaced(body, "fast", "m")
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "alias_not_supported", "model")


@pytest.mark.parametrize("aliases", [{"a": "b", "b": "c"}, {"": "b"}, {"a": ""}, {"a": "a"}])
def test_aliases_that_can_not_be(aliases: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"router\.aliases"):
        check(aliases)
