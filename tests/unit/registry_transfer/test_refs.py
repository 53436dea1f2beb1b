"""Which refs follow a peer: the newest commit is ``c``, before it were ``b`` and ``a``."""

from __future__ import annotations

import pytest

from registry.metadata.repositories import Move
from registry.transfer.refs import obstacle

US, OTHER = "replica of https://core", "replica of https://other"


def move(old: str | None, new: str | None, author: str) -> Move:
    return Move("main", old, new, author, 0)


@pytest.mark.parametrize(
    ("old", "followed", "last", "why"),
    [
        (None, None, None, None),
        (None, move("a", "b", US), move("b", None, "ada"), None),  # removed here: it comes back
        ("b", move("a", "b", US), move("a", "b", US), None),
        ("x", move("a", "x", US), move("a", "x", US), None),  # they threw x away
        ("b", move("a", "b", US), move("a", "b", "ada"), None),  # moved, and moved back again
        ("a", move("a", "b", US), move("b", "a", "ada"), "somebody moved"),
        ("x", move("a", "b", US), move("b", "x", "ada"), "somebody moved"),
        ("b", move("a", "b", OTHER), move("a", "b", OTHER), None),
        ("x", move("a", "x", OTHER), move("a", "x", OTHER), "does not hold"),
        ("a", move("a", "b", OTHER), move("b", "a", "ada"), "somebody moved"),
        ("a", None, move(None, "a", "ada"), None),  # pushed here first, and there since
        ("b", None, move("a", "b", "bundle"), None),
        ("a", None, move("b", "a", "ada"), "set the ref back"),
        ("a", None, move("x", "a", "ada"), None),
        ("x", None, move(None, "x", "ada"), "does not hold"),
    ],
)
def test_a_ref_follows_unless_somebody_moved_it(
    old: str | None, followed: Move | None, last: Move | None, why: str | None
) -> None:
    found = obstacle(old, ["c", "b", "a"], US, followed, last)
    assert (found is None) if why is None else (found is not None and why in found)
