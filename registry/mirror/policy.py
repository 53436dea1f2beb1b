"""How a ref of an upstream repository is followed: rules and decisions, no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto
from fnmatch import fnmatchcase
from typing import Final

from helios.config import MirrorRule
from helios.names import RepoId
from registry.metadata.mirror import FollowedRef

DEFAULT: Final = MirrorRule()


class Step(Enum):
    """What a request for a revision needs first."""

    HELD = auto()
    """Nothing: it is known here."""
    LOCAL = auto()
    """Nothing, and the upstream must not be asked: what is not here does not exist."""
    LEARN = auto()
    """The upstream has to be asked what the revision is."""
    RENEW = auto()
    """The upstream should be asked whether the ref has moved; what is known may be served if that fails."""


def rule_for(rules: Sequence[MirrorRule], repo: RepoId, ref: str) -> MirrorRule:
    """The first rule that matches; ``datasets/org/*`` matches datasets, other patterns models only."""
    name = repo.id if repo.kind == "models" else f"{repo.kind}/{repo.id}"
    for rule in rules:
        both = rule.repo == "*" or fnmatchcase(name, rule.repo)
        if both and fnmatchcase(ref, rule.ref):
            return rule
    return DEFAULT


def step_for_ref(rule: MirrorRule, known: FollowedRef | None, now: float) -> Step:
    """What to do about a ref that is followed, or is to be."""
    if known is None:
        return Step.LOCAL if rule.policy == "local" else Step.LEARN
    if rule.policy in ("pin", "local"):
        return Step.HELD
    return Step.RENEW if not 0 <= now - known.checked < rule.ttl_s else Step.HELD


def after_answer(rule: MirrorRule, known: FollowedRef | None, commit: str) -> tuple[str, str | None]:
    """Where the ref points once the upstream has said ``commit``, and the move that then waits for approval."""
    if known is None or known.commit == commit or rule.policy != "approve":
        return commit, None
    return known.commit, commit
