"""A front store beside a dictionary, while the cloud fails and comes back, the disk goes away, and processes die."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine

from helios.errors import HeliosError, NotFound, Unavailable
from heliosfs.store.front import near as near_module
from heliosfs.store.front import uploads
from heliosfs.store.front.waiting import NAME, Op
from tests.support.front_store import LIMIT, RECORD, Front, blob, read, until

TORN = st.sampled_from([b"", b"0", b"12345678 + public/blobs/a"])
NOWHERE: frozenset[bytes | None] = frozenset({None})


@pytest.mark.parametrize("back", [True, False], ids=["back", "through"])
def test_like_a_dictionary_that_nothing_breaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, back: bool) -> None:
    for name, value in (("FIRST_S", 0.002), ("LONGEST_S", 0.01), ("LOOK_S", 0.01), ("IDLE_S", 0.005)):
        monkeypatch.setattr(uploads, name, value)
    monkeypatch.setattr(near_module, "LOOK_S", 0.005)
    numbers = itertools.count()

    class Machine(RuleBasedStateMachine):
        @initialize()
        def begin(self) -> None:
            root = tmp_path / str(next(numbers))
            root.mkdir()
            self.it = Front(root, back=back)
            self.model: dict[str, frozenset[bytes | None]] = {}
            """What may be there under a key (None: nothing): one thing, unless something was not acknowledged."""
            self.away = False

        @property
        def whole(self) -> bool:
            return not self.away and not self.it.cloud.down

        @property
        def unknown(self) -> bool:
            """Whether this process was started without the disk: then it gives what the cloud has."""
            return self.it.near.disk is None

        def allowed(self, key: str) -> frozenset[bytes | None]:
            return self.model.get(key, NOWHERE)

        def act(self, key: str, act: Callable[[], None], after: bytes | None) -> bool:
            """Whether it was acknowledged; an error is right only while something is broken."""
            try:
                act()
            except HeliosError as error:
                if self.whole and "lost" not in error.message:
                    raise
                self.model[key] = self.allowed(key) | {after}
                return False
            self.model[key] = frozenset({after})
            return True

        @rule(number=st.integers(0, 5))
        def put_blob(self, number: int) -> None:
            key, data = blob(number)
            path = self.it.store.staging() / "file"
            path.write_bytes(data)
            self.act(key, lambda: self.it.store.put_file(key, path), data)
            path.unlink(missing_ok=True)

        @rule(version=st.integers(0, 3))
        def put_record(self, version: int) -> None:
            """As a publish does: what is there goes first."""
            data = b"record %d" % version
            if self.act(RECORD, lambda: self.it.store.delete(RECORD), None):
                self.act(RECORD, lambda: self.it.store.put_bytes(RECORD, data), data)

        @rule(number=st.integers(0, 6))
        def delete(self, number: int) -> None:
            key = RECORD if number == 6 else blob(number)[0]
            self.act(key, lambda: self.it.store.delete(key), None)

        @rule(number=st.integers(0, 6), start=st.integers(0, 900))
        def look(self, number: int, start: int) -> None:
            key = RECORD if number == 6 else blob(number)[0]
            try:
                found: bytes | None = read(self.it.store, key)
            except NotFound:
                found = None
            except Unavailable:
                assert not self.whole
                return
            if not (self.unknown and found is not None and found == self.in_cloud(key)):
                assert found in self.allowed(key)
            if found is not None and start < len(found):
                part = memoryview(bytearray(min(100, len(found) - start)))
                with contextlib.suppress(NotFound, Unavailable):
                    self.it.store.read_into(key, start, part)
                    assert bytes(part) == found[start : start + 100]

        def in_cloud(self, key: str) -> bytes | None:
            try:
                return (self.it.cloud_root / key).read_bytes()
            except FileNotFoundError:
                return None

        @rule()
        def listing(self) -> None:
            try:
                found = {info.key: info.size for info in self.it.store.list("")}
            except Unavailable:
                assert not self.whole
                return
            if self.unknown:
                return
            for key in found.keys() | self.model.keys():
                assert found.get(key) in {None if data is None else len(data) for data in self.allowed(key)}

        @rule()
        def cloud_fails(self) -> None:
            self.it.cloud.down = True

        @rule()
        def cloud_works(self) -> None:
            self.it.cloud.down = False

        @rule(what=st.sampled_from(["put", "delete"]))
        def an_answer_is_lost(self, what: str) -> None:
            self.it.cloud.lose.add(what)

        @precondition(lambda self: not self.away)
        @rule()
        def settle(self) -> None:
            self.it.cloud.down = False
            self.it.settle()

        @rule(torn=TORN)
        def die(self, torn: bytes) -> None:
            self.it.die()
            for path in (self.it.front / NAME, self.it.near._missed.path):
                if path.exists():
                    with path.open("ab") as file:
                        file.write(torn)
            self.it.open()

        @precondition(lambda self: not self.away)
        @rule(how=st.sampled_from(["gone", "damaged"]))
        def die_and_lose_the_journal(self, how: str) -> None:
            """Removals that waited there are forgotten."""
            self.it.die()
            for key, item in self.it.near.waiting.items.items():
                if item.op is Op.DELETE:
                    self.model[key] = self.allowed(key) | {self.in_cloud(key)}
            path = self.it.front / NAME
            if how == "gone":
                path.unlink()
            else:
                path.write_bytes(path.read_bytes()[:10] + b"x" + path.read_bytes()[11:])
            self.it.open()

        @rule()
        def close_and_open(self) -> None:
            self.it.store.close()
            self.it.open()

        @precondition(lambda self: not self.away)
        @rule(refuses=st.booleans())
        def take_away(self, refuses: bool) -> None:
            self.it.take_away(refuses=refuses)
            self.away = True

        @precondition(lambda self: self.away)
        @rule(fresh=st.booleans())
        def bring_back(self, fresh: bool) -> None:
            self.it.bring_back()
            self.away = False
            if fresh:
                self.close_and_open()
            else:
                until(lambda: self.it.near.writable() is not None)

        @invariant()
        def bounded(self) -> None:
            if hasattr(self, "it"):
                popular = self.it.near.popular
                assert popular.used + popular.reserved <= LIMIT
                if not self.away and not self.it.near._missed:
                    files = [path for path in self.it.front.glob("public/**/*") if path.is_file()]
                    assert sum(path.stat().st_size for path in files) <= LIMIT

        def teardown(self) -> None:
            if not hasattr(self, "it"):
                return
            try:
                if self.away:
                    self.bring_back(True)
                self.it.cloud.down = False
                self.it.cloud.lose.clear()
                self.it.settle()
                for key in self.model:
                    try:
                        found: bytes | None = read(self.it.store, key)
                    except NotFound:
                        found = None
                    assert found in self.allowed(key)
                    assert self.in_cloud(key) == found, "the cloud has all of it, and nothing else"
            finally:
                self.it.store.close()

    slow = settings(
        max_examples=20, stateful_step_count=30, suppress_health_check=list(HealthCheck), database=None, deadline=None
    )
    run_machine(Machine, settings=slow)
    assert threading.active_count() < 50
