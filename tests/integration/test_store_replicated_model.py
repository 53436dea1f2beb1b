"""A replicated store beside a dictionary, while directories go away, come back and rot."""

from __future__ import annotations

import hashlib
import itertools
import time
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from helios.errors import NotFound
from heliosfs.store import mending
from heliosfs.store.keys import blob_key
from heliosfs.store.replicated import ReplicatedStore
from tests.support.engines import read

NAMES = ("one", "two", "three")


def blob(number: int) -> tuple[str, bytes]:
    data = b"%d" % number * (100 + number)
    return blob_key("public", hashlib.sha256(data).hexdigest()), data


def test_nothing_acknowledged_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected_log_errors) -> None:
    """As long as one directory is whole: what was stored is there, what was removed is not; in the end everywhere."""
    expected_log_errors("a copy is damaged")
    monkeypatch.setattr(mending, "LOOK_S", 0.02)
    monkeypatch.setattr(mending, "LONGEST_S", 0.05)
    numbers = itertools.count()

    class Machine(RuleBasedStateMachine):
        @initialize()
        def begin(self) -> None:
            self.root = tmp_path / str(next(numbers))
            self.root.mkdir()
            self.roots = [self.root / name for name in NAMES]
            self.away: set[Path] = set()
            self.model: dict[str, bytes] = {}
            self.store = ReplicatedStore(self.roots)
            self.settle()

        def settle(self) -> None:
            """Until everything that is here is whole."""
            end = time.monotonic() + 10
            while any(not any(str(root) in problem for root in self.away) for problem in self.store.problems()):
                assert time.monotonic() < end, self.store.problems()
                time.sleep(0.005)

        @rule(number=st.integers(0, 2))
        def put(self, number: int) -> None:
            key, data = blob(number)
            path = self.store.staging() / "file"
            path.write_bytes(data)
            self.store.put_file(key, path)
            self.model[key] = data

        @rule(number=st.integers(0, 2))
        def delete(self, number: int) -> None:
            key, _ = blob(number)
            self.store.delete(key)
            self.model.pop(key, None)

        @rule()
        def look(self) -> None:
            for number in range(3):
                key, data = blob(number)
                if key in self.model:
                    assert read(self.store, key) == data
                else:
                    with pytest.raises(NotFound):
                        self.store.info(key)
            assert [info.key for info in self.store.list("")] == sorted(self.model)

        @precondition(lambda self: len(self.away) < 2)
        @rule(which=st.integers(0, 2))
        def take_away(self, which: int) -> None:
            root = self.roots[which]
            if root not in self.away:
                self.settle()  # else the last one that is whole may go
                root.rename(root.with_suffix(".away"))
                self.away.add(root)

        @rule(which=st.integers(0, 2))
        def bring_back(self, which: int) -> None:
            root = self.roots[which]
            if root in self.away:
                root.with_suffix(".away").rename(root)
                self.away.discard(root)

        @rule(number=st.integers(0, 2), which=st.integers(0, 2))
        def rot(self, number: int, which: int) -> None:
            """A copy goes bad; who reads it notices. Another one is good."""
            self.settle()
            key, data = blob(number)
            path = self.roots[which] / key
            if key in self.model and len(self.away) < 2 and self.roots[which] not in self.away:
                path.chmod(0o644)
                path.write_bytes(b"x" * len(data))
                assert self.store.heal(key, 0, len(data), lambda found: found == data)
                assert read(self.store, key) == data

        @precondition(lambda self: not self.away)
        @rule()
        def restart(self) -> None:
            self.settle()  # what is known to be damaged is known to the process that found it only
            self.store.close()
            self.store = ReplicatedStore(self.roots)

        def teardown(self) -> None:
            if not hasattr(self, "store"):
                return
            for which in range(3):
                self.bring_back(which)
            try:
                self.settle()
                for root in self.roots:
                    found = {
                        str(path.relative_to(root)): path.read_bytes()
                        for path in root.rglob("*")
                        if path.is_file() and not str(path.relative_to(root)).startswith(".")
                    }
                    assert found == self.model
            finally:
                self.store.close()

    slow = settings(max_examples=15, stateful_step_count=25, suppress_health_check=list(HealthCheck), database=None)
    run_state_machine_as_test(Machine, settings=slow)
