"""Signed texts: good for what they say, until they say, and for nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.errors import Forbidden
from registry.xet.tokens import ReadGrant, Signer, TokenRefused, XorbGrant

READ = ReadGrant("models/org/m", 2_000, "c" * 40)


def signer(now: float = 1_000.0, key: bytes = b"k" * 32) -> Signer:
    return Signer(key, lambda: now)


def test_a_grant_comes_back() -> None:
    xorb = XorbGrant("datasets/Zoë", 2_000, "b" * 64, 3, "c" * 40)
    for grant in (READ, xorb):
        text = signer().sign(grant)
        assert text.isascii()
        assert text.replace("-", "").replace("_", "").isalnum()
        assert signer().check(text, type(grant)) == grant


def test_it_ends() -> None:
    text = signer().sign(READ)
    assert signer(1_999.9).check(text, ReadGrant) == READ
    with pytest.raises(Forbidden, match="has ended"):
        signer(2_000).check(text, ReadGrant)


def test_it_is_good_for_one_thing_and_from_one_registry() -> None:
    text = signer().sign(READ)
    with pytest.raises(TokenRefused):
        signer().check(text, XorbGrant)
    with pytest.raises(TokenRefused):
        signer(key=b"l" * 32).check(text, ReadGrant)


@pytest.mark.parametrize("text", [None, "", "x", "=", "ü", "a" * 5000, "\udc80", "!" * 60])
def test_nonsense_is_refused(text: str | None) -> None:
    with pytest.raises(TokenRefused):
        signer().check(text, ReadGrant)


@given(st.integers(0, 10_000), st.characters(codec="ascii"))
def test_a_changed_text_is_refused(at: int, character: str) -> None:
    text = signer().sign(READ)
    at %= len(text) - 1  # the last character has bits that mean nothing
    changed = text[:at] + character + text[at + 1 :]
    if changed != text:
        with pytest.raises(TokenRefused):
            signer().check(changed, ReadGrant)
