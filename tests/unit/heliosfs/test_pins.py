"""Classes of blobs: whatever pins and volumes come and go, a blob has the highest class that it was given."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from heliosfs.tiers.keeping import KeepingFiles, Pin
from heliosfs.tiers.pins import NAMES, Pins
from heliosfs.tiers.policy import Priority

BLOBS = st.sets(st.sampled_from("abcdefgh"), max_size=6)
KEYS = st.sampled_from(["volume:1", "volume:2", "volume:3", "told:scratch"])
REVISIONS = st.sampled_from(["main", "v1", "v2"])


def recounted(given: list[tuple[Priority, Any]]) -> dict[str, Priority]:
    """The classes, counted anew."""
    classes: dict[str, Priority] = {}
    for priority, blobs in given:
        for blob in blobs:
            classes[blob] = max(priority, classes.get(blob, priority))
    return classes


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self._directory = tempfile.TemporaryDirectory()
        self.pinned: dict[tuple[str, str], tuple[str, set[str]]] = {}
        self.start()

    def start(self) -> None:
        self.told: Any = None
        self.kept: dict[str, tuple[Priority, set[str]]] = {}
        self.pins = Pins(KeepingFiles(Path(self._directory.name)), self.tell)

    def tell(self, classes: Any) -> None:
        self.told = classes

    @rule(key=KEYS, blobs=BLOBS, priority=st.sampled_from(Priority))
    def keep(self, key: str, blobs: set[str], priority: Priority) -> None:
        self.pins.keep(key, blobs, priority)
        self.kept[key] = (priority, blobs)

    @rule(key=KEYS)
    def drop(self, key: str) -> None:
        self.pins.drop(key)
        self.kept.pop(key, None)

    @rule(revision=REVISIONS, blobs=BLOBS, name=st.sampled_from(sorted(NAMES)), commit=st.sampled_from(["c1", "c2"]))
    def pin(self, revision: str, blobs: set[str], name: str, commit: str) -> None:
        trio.run(self.pins.pin, "models/o/m", revision, commit, blobs, name)
        self.pinned[revision, commit] = (name, blobs)
        for other in [key for key in self.pinned if key[0] == revision and key[1] != commit]:
            del self.pinned[other]

    @rule(revision=REVISIONS | st.sampled_from(["c1", "c2"]))
    def unpin(self, revision: str) -> None:
        gone = trio.run(self.pins.unpin, "models/o/m", revision)
        assert {(pin.revision, pin.commit) for pin in gone} == {key for key in self.pinned if revision in key}
        self.pinned = {key: pin for key, pin in self.pinned.items() if revision not in key}

    @rule()
    def restart(self) -> None:
        """Pins last, what volumes keep they say again."""
        self.start()

    @invariant()
    def every_blob_has_the_highest_class(self) -> None:
        given = [(NAMES[name], blobs) for name, blobs in self.pinned.values()]
        assert dict(self.told) == recounted([*given, *self.kept.values()])

    def teardown(self) -> None:
        self._directory.cleanup()


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
TestPins = Machine.TestCase


def test_a_pin_that_names_a_blob_twice_or_a_class_of_later_can_be_taken_back(tmp_path: Path) -> None:
    files, told = KeepingFiles(tmp_path), []
    files.save_pins([Pin("models/o/m", "main", "c", "of-tomorrow", ["a", "a", "b"])])
    pins = Pins(files, lambda classes: told.append(dict(classes)))
    trio.run(pins.unpin, "models/o/m", "main")
    assert told == [{"a": Priority.PINNED, "b": Priority.PINNED}, {}]
