"""Sizes on the command line, as people write them."""

from __future__ import annotations

import pytest

from helios.cli.common import parse_size
from helios.errors import UsageError


@pytest.mark.parametrize(
    ("text", "size"),
    [(None, 0), ("1", 1), ("24GB", 24 * 10**9), ("24 gib", 24 << 30), ("1.5kB", 1500), ("2TiB", 2 << 40), ("7B", 7)],
)
def test_a_size_has_a_unit_or_is_in_bytes(text: str | None, size: int) -> None:
    assert parse_size("--memory", text) == size


@pytest.mark.parametrize("text", ["", "0", "0GB", "-1", "GB", "1PB", "1e9", "nan", "1,5GB", "0.1", "٣GB", "1GBs"])
def test_anything_else_is_refused_with_the_option_and_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="--memory") as caught:
        parse_size("--memory", text)
    assert "24GB" in (caught.value.hint or "")
