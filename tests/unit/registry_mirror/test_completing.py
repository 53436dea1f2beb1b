"""Where refs point when snapshots are published at the same time as somebody pulls."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from helios.config import MirrorRule
from helios.names import RepoId
from tests.support.mirrored import Elsewhere, MirrorBySteps, whole
from tests.unit.registry.conftest import Registry

REPO = RepoId.parse("org/m")
OLD, NEW = [(b"old", False)], [(b"new", True)]


@pytest.fixture
def mirror(parts: Registry, upstream: Elsewhere, tmp_path: Path) -> Iterator[MirrorBySteps]:
    """``main`` is asked for once, then pinned."""
    rules = [MirrorRule(policy="pin")]
    made = MirrorBySteps(upstream, parts.catalog, parts.sessions, tmp_path, whole, rules=rules, keep_s=1000.0)
    yield made
    made.close()


def pulled_while_the_old_one_completes(
    mirror: MirrorBySteps, upstream: Elsewhere, parts: Registry, *, known: bool
) -> tuple[dict[str, str], str, str]:
    """Returns where the refs point in the end, and the two commits; ``known``: the mirror has the new one's listing."""
    old = upstream.push(REPO, "main", OLD)
    mirror.ask(REPO, "main")
    found = mirror.found(REPO, "main")
    assert found is not None
    new = upstream.push(REPO, "main", NEW)
    if known:
        mirror.ask(REPO, new)
    mirror.pull(REPO, "main")

    def complete() -> None:
        mirror.read(found, "0.bin")
        assert parts.catalog.refs(REPO) == {"main": new}
        mirror.mirror._completing.complete(found.snapshot, None)
        (completion,) = (pull for pull in mirror.pulls._running.values() if pull.revision == old)
        mirror.pulls._run(completion)
        assert completion.error is None
        assert parts.catalog.refs(REPO) == {"main": old}, "the mirror has not heard of the pull yet"

    mirror.meanwhile(complete)
    while mirror.go_on():
        pass
    assert mirror.mirror.commit_of(REPO, "main") == new
    return parts.catalog.refs(REPO), old, new


@pytest.mark.parametrize("known", [False, True])
def test_a_snapshot_that_is_published_late_does_not_undo_a_pull(
    mirror: MirrorBySteps, upstream: Elsewhere, parts: Registry, known: bool
) -> None:
    """The ref of the catalog and the one that is followed end at the same place."""
    refs, old, new = pulled_while_the_old_one_completes(mirror, upstream, parts, known=known)
    assert refs == {"main": new}
    assert parts.catalog.holds(REPO, old)


def test_a_snapshot_that_is_published_after_a_pull_moves_nothing(
    mirror: MirrorBySteps, upstream: Elsewhere, parts: Registry
) -> None:
    old = upstream.push(REPO, "main", OLD)
    mirror.ask(REPO, "main")
    found = mirror.found(REPO, "main")
    assert found is not None
    new = upstream.push(REPO, "main", NEW)
    pull = mirror.pull(REPO, "main")
    while pull.commit is None and mirror.go_on():
        pass
    mirror.read(found, "0.bin")
    while mirror.go_on():
        pass
    assert parts.catalog.holds(REPO, old)
    assert parts.catalog.refs(REPO) == {"main": new}


def test_one_whose_repository_was_removed_before_the_mirror_heard_of_it_is_gone(
    mirror: MirrorBySteps, upstream: Elsewhere, parts: Registry
) -> None:
    upstream.push(REPO, "main", OLD)
    mirror.ask(REPO, "main")

    def removed() -> None:
        parts.catalog.delete_repo(REPO)
        mirror.ask(REPO, "main")

    mirror.pull(REPO, "main")
    mirror.meanwhile(removed)
    assert mirror.go_on()
    assert not parts.catalog.holds(REPO, "main")
