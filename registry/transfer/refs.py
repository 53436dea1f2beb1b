"""Whether a ref here may follow another registry's: never over what somebody did here since it last did."""

from __future__ import annotations

from collections.abc import Sequence

from helios.errors import IntegrityError
from registry.metadata.repositories import KINDS, Move


def obstacle(
    old: str | None, history: Sequence[str], author: str, followed: Move | None, last: Move | None
) -> str | None:
    """Why a ref that is at ``old`` here (None: nowhere) stays there; None where it may go to ``history[0]``.

    ``history`` are the peer's commits from there back, ``author`` is who follows it. ``followed`` is the last move that
    followed any peer, ``last`` the last move of all.
    """
    if old is None:
        return None
    if followed is not None and followed.new != old:
        return f"somebody moved the ref here, to {old}, since it last followed"
    if followed is not None and followed.author == author:
        return None
    if old not in history:
        return f"the ref is at {old} here, which the peer's history does not hold"
    if last is not None and last.new == old and last.old in history[: history.index(old)]:
        return f"somebody set the ref back here, from {last.old} to {old}"
    return None


def check_kind(kind: str, whose: str) -> str:
    """What a ref is at another registry; raises IntegrityError for what no ref is."""
    if kind not in KINDS:
        raise IntegrityError(f"{whose} says that a ref is a {kind[:80]!r}; it can be a {', '.join(KINDS)}")
    return kind
