"""Cards: the YAML at the head of a README."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.card import MAX_CARD, read_card, tags_of


def test_a_card():
    card = read_card(
        b"\xef\xbb\xbf---\r\nlicense: mit\r\ntags:\r\n- a\r\n- 3\r\nwhen: 2026-01-31\r\n---\r\n# Title\n---\n"
    )
    assert card == {"license": "mit", "tags": ["a", 3], "when": "2026-01-31"}
    assert tags_of(card) == ["a", "license:mit"]


def test_tags_come_once_and_in_order():
    card = {"tags": ["x", "de", "x"], "language": "de", "library_name": "x", "base_model": ["o/m", ""], "datasets": "d"}
    assert tags_of(card) == ["x", "de", "dataset:d", "base_model:o/m"]


@pytest.mark.parametrize(
    "text",
    [
        b"", b"# Title", b"---\nno end", b"---\n- a list\n---\n", b"---\na: [\n---\n", b"---\nx: .nan\n---\n",
        b"---\na: &a [1,1]\nb: [*a,*a]\n---\n", b"---\n" + b"[" * 5000 + b"]" * 5000 + b"\n---\n",
        b"---\na: !!python/object/apply:os.system [id]\n---\n", b"---\n? {a: b}\n: c\n---\n",
        b"---\na: " + b"x" * MAX_CARD + b"\n---\n", b"--- \xff\n\xff: 1\n",
    ],
)  # fmt: skip
def test_what_is_no_card_is_none(text):
    assert read_card(text) == {}


@given(st.binary(max_size=200))
def test_no_text_breaks_it(text):
    json.dumps(read_card(b"---\n" + text + b"\n---\n"))
    assert all(isinstance(tag, str) for tag in tags_of(read_card(b"---\n" + text + b"\n---\n")))
