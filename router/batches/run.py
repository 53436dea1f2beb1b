"""One batch from its input to its output, by its owner.

    validate the input -> ask each line that is not done -> end

While that goes on, a beat flushes what is done and renews the claim three times in a lease; an owner that could not do
so for a whole lease stops, since others may have taken the batch by then. Whoever cancels the batch changes its record,
which the next beat finds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final

import msgspec

from helios.config import RouterSettings
from helios.errors import HeliosError, NotFound, Unavailable
from helios.metrics import RouterMetrics
from router.batches import machine, outcome
from router.batches.asking import Answer, NoAnswer
from router.batches.ledger import Ledger, NotOurs
from router.batches.lines import BadLine, Census, Splitter, Wanted, read
from router.batches.machine import MAX_ERRORS, NotPossible
from router.batches.outcome import Result
from router.batches.records import FileRecord, LineError, Part, Who, new_id
from router.batches.shelf import Shelf
from router.batches.slots import Slots
from router.errors import ApiError
from router.routes import RAW_ROUTES, InferenceRoute

log = logging.getLogger("helios.router")

MAX_WAITING: Final = 8 << 20
"""Bytes of lines that a batch has in memory, but for one that is longer alone."""
SLICE: Final = 128 << 10
"""Bytes of an input that are looked at before others have their turn."""
BEATS: Final = 3
"""Renewals in the time of a lease."""
LAST_S: Final = 5.0
"""What giving a batch up may take, in seconds."""

Ask = Callable[[Who, InferenceRoute, bytes, str], Awaitable[Answer]]
"""Asks the data plane for somebody: the route, the body, the request's id. Raises NoAnswer, and ApiError where he may
ask nothing any more."""


class Tools(msgspec.Struct, frozen=True):
    """What all runs share. ``now`` gives unix seconds, ``clock`` seconds."""

    shelf: Shelf
    slots: Slots
    ask: Ask
    settings: RouterSettings
    metrics: RouterMetrics
    now: Callable[[], float] = time.time
    clock: Callable[[], float] = time.monotonic


class _NoInput(Exception):
    """The input file is not there any more."""


class Run:
    """One run of a batch, which ``ledger`` holds."""

    def __init__(self, tools: Tools, ledger: Ledger) -> None:
        self._tools, self._ledger = tools, ledger
        self._route = RAW_ROUTES[ledger.record.endpoint.encode()]
        self._working: asyncio.Task[None] | None = None
        self._leaving = False
        self._moved = asyncio.Event()
        self._bytes = 0
        self._idle: set[asyncio.Task[None]] = set()
        """Lines that nobody was asked for yet."""
        ledger.changed = self._changed

    def leave(self) -> None:
        """Begin nothing more; what is under way may end."""
        self._leaving = True
        self._moved.set()
        for task in self._idle:
            task.cancel()

    async def run(self) -> None:
        """To the batch's end, or as far as it goes; then it is nobody's. Raises NotOurs and HeliosError, in a group."""
        try:
            async with asyncio.TaskGroup() as tasks:
                beat = tasks.create_task(self._beat())
                await self._steps()
                beat.cancel()
        finally:
            if not self._ledger.record.over:
                await self._give_back()

    async def _give_back(self) -> None:
        """Where that can't be, the lease lapses."""
        try:
            async with asyncio.timeout(LAST_S):
                await self._ledger.flush()
                await self._ledger.save(machine.released)
        except (NotOurs, HeliosError, TimeoutError) as error:
            log.info("a batch is left as it is", extra={**self._names(), "reason": str(error)})

    async def _steps(self) -> None:
        try:
            if self._ledger.record.status == "validating" and self._runs:
                await self._validate()
            if self._ledger.record.status == "in_progress" and self._runs:
                await self._work()
            if self._wanted and self._left:  # for others to go on with
                return
            await self._end()
        except _NoInput:
            error = LineError(code="input_file_not_found", message="The input file is not there any more.")
            await self._fail([error])

    @property
    def _wanted(self) -> bool:
        return machine.verdict(self._ledger.record, self._tools.now()) == "run"

    @property
    def _runs(self) -> bool:
        return self._wanted and not self._leaving

    # --- the claim ---

    async def _beat(self) -> None:
        ledger, clock, lease_s = self._ledger, self._tools.clock, self._tools.settings.batches.lease_s
        while True:
            try:
                async with asyncio.timeout(lease_s / BEATS):
                    await ledger.full.wait()
            except TimeoutError:
                pass
            try:
                async with asyncio.timeout(max(0.0, ledger.saved_at + lease_s - clock())):
                    await ledger.flush()
                self._moved.set()
            except (HeliosError, TimeoutError) as error:
                if clock() - ledger.saved_at >= lease_s:
                    raise Unavailable(f"the store did not take a batch's record for {lease_s:g} s") from None
                log.warning("a batch's results wait for the store", extra={**self._names(), "reason": str(error)})
                await asyncio.sleep(lease_s / BEATS / BEATS)

    def _changed(self) -> None:
        """Somebody else has changed the record: he wants no more of it."""
        if self._working is not None and not self._wanted:
            self._working.cancel()

    # --- the input ---

    async def _lines(self) -> AsyncIterator[tuple[int, bytes | None]]:
        """The lines that are requests, from the first. Raises _NoInput."""
        record, shelf, splitter = self._ledger.record, self._tools.shelf, Splitter()
        try:
            file = await shelf.file(record.tenant, record.input_file_id)
            async for content in shelf.read_parts(file.parts):
                for start in range(0, len(content), SLICE):
                    for line in splitter.feed(content[start : start + SLICE]):
                        yield line
                    await asyncio.sleep(0)
        except NotFound:
            raise _NoInput from None
        for line in splitter.finish():
            yield line

    async def _validate(self) -> None:
        settings, record, now = self._tools.settings, self._ledger.record, self._tools.now
        census = Census(record.endpoint, settings.max_body_mib << 20, settings.batches.max_lines, MAX_ERRORS)
        async for number, text in self._lines():
            census.count(number, text)
            if census.hopeless:
                break
            if not self._runs:
                return
        census.finish()
        if census.errors:
            await self._fail(census.errors)
            return
        try:
            await self._ledger.save(lambda record: machine.validated(record, census.total, census.model, now()))
        except NotPossible:  # cancelled meanwhile
            return

    # --- asking ---

    async def _work(self) -> None:
        """Ask until all is done, the time is up or the batch is cancelled."""
        working = self._working = asyncio.create_task(self._ask_all())
        try:
            await asyncio.wait({working}, timeout=self._ledger.record.expires_at - self._tools.now())
        finally:
            self._working = None
            working.cancel()
            await asyncio.wait({working})
        if not working.cancelled():
            working.result()

    async def _ask_all(self) -> None:
        missing: _NoInput | None = None
        async with asyncio.TaskGroup() as lines:
            try:
                await self._begin_all(lines)
            except _NoInput as error:  # what is under way goes on to its end
                missing = error
        if missing is not None:
            raise missing

    async def _begin_all(self, lines: asyncio.TaskGroup) -> None:
        progress, record, index = self._ledger.progress, self._ledger.record, -1
        most = self._tools.settings.max_body_mib << 20
        async for number, text in self._lines():
            index += 1
            if progress.done(index):
                continue
            size = len(text or b"")
            while not self._leaving and not self._fits(index, size):
                self._moved.clear()
                await self._moved.wait()
            if self._leaving:
                return
            try:
                wanted = read(number, text, record.endpoint, most)
            except BadLine as bad:  # it passed under other settings
                self._done(index, outcome.unanswered(self._new_id(), "", bad.error.code, bad.error.message))
                continue
            self._bytes += size
            lines.create_task(self._line(index, wanted, size))

    def _fits(self, index: int, size: int) -> bool:
        if self._ledger.crowded or not self._ledger.progress.may_begin(index):
            return False
        return not self._bytes or self._bytes + size <= MAX_WAITING

    async def _line(self, index: int, wanted: Wanted, size: int) -> None:
        """One request, asked until its answer counts."""
        task, identity, tries, result = asyncio.current_task(), self._new_id(), 0, None
        assert task is not None
        try:
            while result is None:
                self._idle.add(task)
                await self._tools.slots.take(self._ledger.record.tenant, wanted.model)
                self._idle.discard(task)
                tries += 1
                try:
                    result, pause_s = await self._once(wanted, identity, tries)
                finally:
                    self._tools.slots.give()
                if result is None:
                    if self._leaving:
                        return
                    self._tools.metrics.batch_lines.labels("again").inc()
                    self._idle.add(task)
                    await asyncio.sleep(pause_s * random.uniform(0.75, 1.25))  # noqa: S311 - spreads them out
            self._done(index, result)
        finally:
            self._idle.discard(task)
            self._bytes -= size
            self._moved.set()

    async def _once(self, wanted: Wanted, identity: str, tries: int) -> tuple[Result | None, float]:
        """What becomes of one question: the result, or None and how long to wait before the next."""
        try:
            answer = await self._tools.ask(self._ledger.record.who, self._route, wanted.body, identity)
        except ApiError as error:
            return outcome.unanswered(identity, wanted.custom_id, error.code, error.message), 0.0
        except NoAnswer as error:
            return outcome.unanswered(
                identity, wanted.custom_id, "invalid_answer", f"There was an answer, but {error}."
            ), 0.0
        pause_s = outcome.pause_s(self._route, answer, tries, self._tools.settings.retries)
        if pause_s is not None:
            return None, pause_s
        return outcome.answered(identity, wanted.custom_id, answer), 0.0

    def _done(self, index: int, result: Result, label: str = "") -> None:
        self._ledger.add(index, result)
        self._tools.metrics.batch_lines.labels(label or ("completed" if result.good else "failed")).inc()

    def _new_id(self) -> str:
        return new_id("batch_req_", self._tools.now())

    # --- the end ---

    @property
    def _left(self) -> bool:
        """Whether something is still to be asked."""
        record = self._ledger.record
        return record.status == "validating" or self._ledger.progress.below < record.total

    async def _end(self) -> None:
        ledger, now = self._ledger, self._tools.now
        if ledger.record.over:
            return
        if ledger.record.status == "in_progress" and not self._left:
            await ledger.flush()
            with contextlib.suppress(NotPossible):  # cancelled in the last moment
                await ledger.save(lambda record: machine.moved(record, "finalizing", now()))
        if ledger.record.total and self._left:
            await self._give_up()
        await self._publish()
        await ledger.save(lambda record: machine.ended(record, now()))
        self._over()

    async def _give_up(self) -> None:
        """What is not done won't be: say so of each."""
        cancelled = self._ledger.record.status == "cancelling"
        code, message = outcome.CANCELLED if cancelled else outcome.EXPIRED
        index = -1
        async for number, text in self._lines():
            index += 1
            if self._ledger.progress.done(index):
                continue
            custom_id = read(number, text, self._ledger.record.endpoint, len(text or b"")).custom_id
            result = outcome.unanswered(self._new_id(), custom_id, code, message)
            self._done(index, result, "cancelled" if cancelled else "expired")
            if self._ledger.full.is_set():
                await self._ledger.flush()

    async def _fail(self, errors: list[LineError]) -> None:
        await self._publish()
        try:
            await self._ledger.save(lambda record: machine.failed(record, errors, self._tools.now()))
        except NotPossible:  # cancelled meanwhile, or at its end
            await self._ledger.save(lambda record: machine.ended(record, self._tools.now()))
        self._over()

    async def _publish(self) -> None:
        """What was written becomes files."""
        await self._ledger.flush()
        record, now = self._ledger.record, int(self._tools.now())
        sides: tuple[tuple[str, str, list[Part]], ...] = (
            (record.output_file_id, "output", record.output), (record.error_file_id, "error", record.error),
        )  # fmt: skip
        for identity, what, parts in sides:
            if parts:
                await self._tools.shelf.add_file(
                    FileRecord(
                        id=identity, tenant=record.tenant, filename=f"{record.id}_{what}.jsonl",
                        purpose="batch_output", created_at=now, expires_at=now + record.output_expires_s, parts=parts,
                    )
                )  # fmt: skip

    def _over(self) -> None:
        status = self._ledger.record.status
        self._tools.metrics.batches.labels(status).inc()
        log.info("a batch is over", extra={**self._names(), "status": status})

    def _names(self) -> dict[str, str]:
        return {"batch": self._ledger.record.id, "tenant": self._ledger.record.tenant}
