"""Classes that a registry tells a node: they count where nobody here has said otherwise."""

from __future__ import annotations

from types import SimpleNamespace

import trio

from helios.errors import NotFound, Unavailable
from helios.names import RepoId
from heliosfs.tiers.keeping import Pin
from heliosfs.tiers.policy import Priority
from heliosfs.tiers.told import ToldClasses

ONE, TWO = RepoId.parse("org/one"), RepoId.parse("org/two")
C1, C2 = "1" * 40, "2" * 40


class Node:
    """What a mount knows, and which classes its blobs have."""

    def __init__(self) -> None:
        self.seen = {(ONE, C1): {"a", "shared"}, (TWO, C2): {"b", "shared"}}
        self.named = {(ONE, C1): ["main", "prod"], (TWO, C2): ["main"]}
        self.given: dict[tuple[RepoId, str], str] = {}
        self.problem: Exception | None = None
        self.pins: list[Pin] = []
        self.kept: dict[str, tuple[list[str], Priority]] = {}
        self.told_classes = ToldClasses(self, self, self)

    def priorities(self, timeout_s):
        if self.problem is not None:
            raise self.problem
        return dict(self.given)

    def commits(self, most):
        return list(self.seen)

    def refs_at(self, repo, commit):
        return self.named[repo, commit]

    async def told(self, repo, commit, summary):
        files = {name: SimpleNamespace(sha256=name, size=1) for name in self.seen[repo, commit]}
        return summary(SimpleNamespace(files=files | {"empty": SimpleNamespace(sha256="e", size=0)}))

    def all(self):
        return self.pins

    def keep(self, key, blobs, priority):
        self.kept[key] = (list(blobs), priority)

    def drop(self, key):
        self.kept.pop(key)

    def classes(self, **given: str) -> dict[str, Priority]:
        """After the registry was asked: class by blob, ``one`` for org/one, ``one_prod`` for its ref prod."""
        repos = {"one": ONE, "two": TWO}
        self.given = {(repos[n.partition("_")[0]], n.partition("_")[2]): c for n, c in given.items()}

        async def main() -> None:
            await self.told_classes.ask()
            await self.told_classes.look()

        trio.run(main)
        return {blob: priority for blobs, priority in self.kept.values() for blob in blobs}


def test_a_models_blobs_get_its_class_and_lose_it_again():
    node = Node()
    assert node.classes(one="critical") == {"a": Priority.CRITICAL, "shared": Priority.CRITICAL}
    assert node.classes(one="critical", two="scratch") == {
        "a": Priority.CRITICAL,
        "shared": Priority.CRITICAL,
        "b": Priority.SCRATCH,
    }
    assert node.classes() == {}


def test_what_a_normal_model_has_too_is_not_scratch():
    assert Node().classes(one="scratch") == {"a": Priority.SCRATCH}
    assert Node().classes(one="scratch", two="scratch") == dict.fromkeys(["a", "b", "shared"], Priority.SCRATCH)


def test_a_refs_class_counts_before_its_models():
    assert Node().classes(one="scratch", one_prod="critical") == dict.fromkeys(["a", "shared"], Priority.CRITICAL)
    assert Node().classes(one="critical", one_prod="normal") == {}


def test_what_somebody_pinned_here_keeps_its_class():
    node = Node()
    node.pins = [Pin(str(ONE), "main", C1, "normal", ["a", "shared"])]
    assert node.classes(one="scratch", two="scratch") == {"b": Priority.SCRATCH}


def test_what_was_told_holds_while_the_registry_is_away():
    node = Node()
    told = node.classes(one="critical")
    node.problem = Unavailable("away")
    assert node.classes() == told
    node.problem = NotFound("an older one")
    assert node.classes() == {}
