"""Sealed addresses: for one object, until they end, by one key."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.errors import Forbidden
from registry.seals import Seals
from registry.xet.tokens import Signer

KEYS = st.from_regex(r"public/(blobs|packs)/[0-9a-f]{2}/[0-9a-f]{1,64}", fullmatch=True)


def seals(now: list[float], key: bytes = b"k" * 32, needed: bool = True) -> Seals:
    return Seals(Signer(key, lambda: now[0]), lambda: needed)


def mark(url: str) -> str:
    path, _, text = url.partition("?seal=")
    assert path == "/x"
    return text


@given(KEYS, KEYS, st.floats(1, 1e6))
def test_a_seal_is_for_one_object_and_ends(key, other, seconds):
    now = [1e9]
    mine = seals(now)
    text = mark(mine.seal("/x", key, seconds))
    mine.check(key, text)
    seals(now).check(key, text)  # another process with the same database
    for wrong in (seals(now, b"o" * 32), mine):
        if wrong is not mine or key != other:
            with pytest.raises(Forbidden):
                wrong.check(other, text)
    now[0] += seconds + 1
    with pytest.raises(Forbidden):
        mine.check(key, text)


@given(st.text())
def test_nothing_else_is_a_seal(text):
    with pytest.raises(Forbidden):
        seals([1e9]).check("public/blobs/00/00", text)


@given(KEYS, st.integers(0, 100), st.characters())
def test_a_changed_seal_is_none(key, at, character):
    mine = seals([1e9])
    text = mark(mine.seal("/x", key, 60))
    changed = text[:at] + character + text[at + 1 :]
    if changed != text:
        with pytest.raises(Forbidden):
            mine.check(key, changed)


def test_where_everybody_may_read_none_is_needed():
    seals([1e9], needed=False).check("public/blobs/00/00", None)
