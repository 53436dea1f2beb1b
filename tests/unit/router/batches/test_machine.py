"""A batch whatever happens in whatever order, with two owners, a canceller, a slow store and a clock."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from msgspec.structs import replace

from helios.errors import NotFound, Unavailable
from router.batches import machine
from router.batches.ledger import Ledger, NotOurs
from router.batches.machine import NEXT, NotPossible
from router.batches.objects import Stored, Tag
from router.batches.outcome import Result
from router.batches.records import BatchRecord, LineError, Who
from router.batches.shelf import Held, Lost, Shelf

TOTAL = 12


class Memory:
    """A store in memory. ``fails``: the next write is not made; ``lies``: it is made, but its answer is lost."""

    name = "memory"

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.fails = self.lies = False

    def get(self, key: str) -> Stored:
        if key not in self.objects:
            raise NotFound(key)
        return Stored(self.objects[key], Tag(self.objects[key].decode()))

    def put(self, key: str, data: bytes) -> None:
        self._write(key, data)

    def replace(self, key: str, data: bytes, tag: Tag) -> Tag | None:
        if key not in self.objects or self.get(key).tag != tag:
            return None
        self._write(key, data)
        return Tag(data.decode())

    def _write(self, key: str, data: bytes) -> None:
        fails, lies, self.fails, self.lies = self.fails, self.lies, False, False
        if not fails:
            self.objects[key] = data
        if fails or lies:
            raise Unavailable("the store is away")

    def delete(self, key: str) -> None:
        self.objects.pop(key, None)

    def list(self, directory: str) -> list[str]:
        return sorted(key for key in self.objects if key.startswith(directory + "/"))


class Here(Shelf):
    """A shelf without threads."""

    async def _do(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)


def new(**changes: Any) -> BatchRecord:
    record = BatchRecord(
        id="batch_" + "0" * 32, who=Who("acme"), endpoint="/v1/chat/completions", input_file_id="file-" + "1" * 32,
        output_file_id="file-" + "2" * 32, error_file_id="file-" + "3" * 32, output_expires_s=9, created_at=0,
        expires_at=100,
    )  # fmt: skip
    return replace(record, **changes)


class Batches(RuleBasedStateMachine):
    """Two owners who take the batch from each other without asking, as after lapsed leases."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.store = Memory()
        self.shelf = Here(self.store)
        self.run(self.shelf.add_batch(new()))
        self.before = self.record
        self.owners: dict[int, Ledger] = {}

    def run(self, what: Any) -> Any:
        """A coroutine that never waits, since the store is here."""
        try:
            what.send(None)
        except StopIteration as end:
            return end.value
        raise AssertionError("it waits")

    @property
    def record(self) -> BatchRecord:
        held: Held = self.run(self.shelf.batch("acme", new().id))
        return held.record

    def attempt(self, who: int, what: Any) -> bool:
        """Whether it went well. What the store did not take the owner keeps, and goes on, even as one of the past."""
        try:
            self.run(what)
        except (NotOurs, Unavailable, NotPossible):
            return False
        assert self.owners[who].record.epoch == self.record.epoch
        return True

    @rule(who=st.integers(0, 1))
    def claim(self, who: int) -> None:
        held = self.run(self.shelf.batch("acme", new().id))
        if held.record.over:
            return
        try:
            held = self.run(self.shelf.save(held, machine.claimed(held.record, f"owner-{who}")))
        except (Lost, Unavailable):
            return
        self.owners[who] = Ledger(self.shelf, held, lambda: self.now)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def validate(self, data: st.DataObject) -> None:
        who = data.draw(st.sampled_from(sorted(self.owners)))
        if self.attempt(who, self.owners[who].save(lambda r: machine.validated(r, TOTAL, None, self.now))):
            assert self.record.status == "in_progress"

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), good=st.booleans())
    def answer(self, data: st.DataObject, good: bool) -> None:
        ledger = self.owners[data.draw(st.sampled_from(sorted(self.owners)))]
        open_ones = [n for n in range(ledger.record.total) if not ledger.progress.done(n)]
        if open_ones and ledger.record.status == "in_progress":
            number = data.draw(st.sampled_from(open_ones))
            ledger.add(number, Result(good, b"%d\n" % number))

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def flush(self, data: st.DataObject) -> None:
        who = data.draw(st.sampled_from(sorted(self.owners)))
        ledger = self.owners[who]
        if self.attempt(who, ledger.flush()):
            done = ledger.progress
            assert (self.record.below, set(self.record.ahead)) == (done.below, done.ahead)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        who = data.draw(st.sampled_from(sorted(self.owners)))
        ledger = self.owners[who]

        async def end() -> None:
            await ledger.flush()
            if machine.verdict(ledger.record, self.now) == "run":
                if ledger.record.status == "in_progress" and ledger.progress.below < TOTAL:
                    return
                await ledger.save(lambda r: machine.moved(r, "finalizing", self.now))
            await ledger.save(lambda r: machine.ended(r, self.now))
            assert self.record.over

        self.attempt(who, end())

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        who = data.draw(st.sampled_from(sorted(self.owners)))
        errors = [LineError(code="x", message="y")] * 200
        self.attempt(who, self.owners[who].save(lambda r: machine.failed(r, errors, self.now)))

    @rule()
    def cancel(self) -> None:
        try:
            record = self.run(self.shelf.change("acme", new().id, lambda r: machine.cancelling(r, self.now)))
        except (NotPossible, Unavailable):
            return
        assert record.status == "cancelling"

    @rule(seconds=st.sampled_from([1, 60]))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @rule(lies=st.booleans())
    def trouble(self, lies: bool) -> None:
        self.store.fails, self.store.lies = not lies, lies

    @invariant()
    def one_step_at_a_time(self) -> None:
        before, now = self.before, self.record
        self.before = now
        reachable, edge = {before.status}, {before.status}
        for _ in range(2):  # ``end`` takes two
            edge = {status for one in edge for status in NEXT[one]}
            reachable |= edge
        assert now.status in reachable
        assert now.epoch >= before.epoch
        assert now.below >= before.below
        assert (now.completed, now.failed) >= (before.completed, before.failed) or now.completed >= before.completed
        assert len(now.errors) <= machine.MAX_ERRORS

    @invariant()
    def each_result_once_and_none_without_one(self) -> None:
        record = self.record
        written = [
            int(text) for parts in (record.output, record.error) for part in parts
            for text in self.store.objects[part.key].split()
        ]  # fmt: skip
        assert len(written) == len(set(written)) == record.completed + record.failed <= record.total
        assert set(written) == set(range(record.below)) | set(record.ahead)
        if record.status == "completed":
            assert len(written) == TOTAL


TestBatches = Batches.TestCase
TestBatches.settings = settings(max_examples=25, stateful_step_count=40)


@pytest.mark.parametrize(
    ("status", "now", "verdict"),
    [
        ("validating", 99, "run"), ("validating", 100, "expire"), ("in_progress", 100, "expire"),
        ("finalizing", 100, "run"), ("cancelling", 5, "cancel"), ("cancelling", 100, "cancel"),
    ],
)  # fmt: skip
def test_what_is_to_be_done(status: Any, now: float, verdict: str) -> None:
    assert machine.verdict(new(status=status), now) == verdict


@pytest.mark.parametrize("status", NEXT)
def test_cancelling(status: Any) -> None:
    """Possible until the results are being put together; a second time changes nothing."""
    if status in ("validating", "in_progress"):
        assert machine.cancelling(new(status=status), 7.0).cancelling_at == 7
    elif status == "cancelling":
        assert machine.cancelling(new(status=status), 7.0) == new(status=status)
    else:
        with pytest.raises(NotPossible):
            machine.cancelling(new(status=status), 7.0)
