"""Classes: a ref's counts before its repository's, and another process's are seen."""

from __future__ import annotations

import pytest

from helios.errors import InvalidInput, NotFound
from helios.names import RepoId
from registry.catalog import Catalog
from registry.priorities import Priorities
from tests.unit.registry.conftest import Registry

ONE, TWO = RepoId.parse("org/one"), RepoId.parse("org/two")


def test_a_refs_class_counts_before_its_repositorys(registry: Registry) -> None:
    given = registry.catalog.priorities
    assert given.rank(ONE, "main") == 1
    given.put(ONE, None, "scratch", "me")
    given.put(ONE, "prod", "critical", "me")
    assert [given.rank(ONE, ref) for ref in ("main", "prod")] == [2, 0]
    assert given.rank(TWO, "prod") == 1
    given.put(ONE, "prod", "normal", "you")
    assert given.rank(ONE, "prod") == 1
    assert [(each.ref, each.priority, each.author) for each in given.all()] == [
        ("", "scratch", "me"),
        ("prod", "normal", "you"),
    ]
    given.remove(ONE, None)
    assert given.rank(ONE, "main") == 1
    with pytest.raises(NotFound):
        given.remove(ONE, None)


def test_what_another_process_gives_is_seen(registry: Registry) -> None:
    """After the question that every request asks where processes share a database (registry/fresh.py)."""
    mine = registry.catalog
    assert mine.priorities.rank(ONE, "main") == 1
    other = (
        Catalog(registry.database, registry.store)
        if registry.url is None
        else Registry.open(registry.root, registry.url).catalog
    )
    other.priorities.put(ONE, None, "critical", "")
    mine.confirm()
    assert mine.priorities.rank(ONE, "main") == 0
    if registry.url is not None:
        other.database.close()


@pytest.mark.parametrize("ref", ["c" * 40, "a..b", ""])
def test_a_class_is_for_a_repository_or_a_ref(registry: Registry, ref: str) -> None:
    with pytest.raises(InvalidInput):
        registry.catalog.priorities.put(ONE, ref, "critical", "")


def test_there_are_three_classes(registry: Registry) -> None:
    with pytest.raises(InvalidInput, match="critical, normal, scratch"):
        Priorities(registry.database).put(ONE, None, "urgent", "")
