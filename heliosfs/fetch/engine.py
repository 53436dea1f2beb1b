"""The fetch engine: starts jobs as the planner says, takes in what arrives, decides what a failure means.

Everything here runs on the trio loop and, apart from the ``async`` functions, without giving it up; docs/concurrency.md
argues why that suffices. Worker threads run transfers (transfer.py) and report each chunk with ``run_sync_soon``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Final

import trio

from helios.config import MountSettings
from helios.errors import DeadlineExceeded, HeliosError
from helios.metrics import MountMetrics
from heliosfs.fetch.blob import Blob, Waiter
from heliosfs.fetch.breaker import Breaker
from heliosfs.fetch.budget import COMPANY
from heliosfs.fetch.buffers import BufferPool
from heliosfs.fetch.chunks import HAVE, POOLED, Job
from heliosfs.fetch.flight import TICK_S, Flight, Flights
from heliosfs.fetch.lanes import Lane, Lanes, worst
from heliosfs.fetch.pace import Pace
from heliosfs.fetch.planner import Limits, Planner
from heliosfs.fetch.room import Room
from heliosfs.fetch.source import CorruptChunk
from heliosfs.fetch.transfer import Pointless, Transfer
from heliosfs.store.recipe import MAX_CHUNK, Recipe
from heliosfs.tiers.policy import Reservation
from heliosfs.tiers.pool import Pool

log = logging.getLogger("heliosfs.fetch")

HOLD_S: Final = 30.0
"""A chunk that no source has right is left alone by the background for so long; a READ tries it again at once."""

DISK_PAUSE_S: Final = 1.0
DISK_LONGEST_PAUSE_S: Final = 15.0
"""After the disk refused a write, nothing is stored for this long, at first and at most."""


IN_PLACE: Final = "store"
"""The source of chunks that were verified where they lay."""


class Engine:
    """Fetches chunks for READs and for filling. ``stored`` is called for each chunk that reached the disk, ``idle``
    when the planner has nothing more to start, ``released`` when a job let go of a blob."""

    def __init__(
        self,
        lanes: Lanes,
        settings: MountSettings,
        metrics: MountMetrics,
        clock: Callable[[], float],
        *,
        stored: Callable[[Blob, int], None],
        idle: Callable[[], None],
        released: Callable[[Blob], None],
        room: Room,
        pool: Pool,
    ) -> None:
        self.planner = Planner()
        self._flights = Flights(self.planner, lanes, clock)
        self._look_at = 0.0
        self.pool = pool
        self.disk = Breaker(DISK_PAUSE_S, DISK_LONGEST_PAUSE_S)
        self._lanes, self._metrics, self._clock = lanes, metrics, clock
        self._buffers = BufferPool.of_mib(settings.buffer_mib)
        self._reserve = max(1, min(self._buffers.count // 4, 4))
        self._stored, self._idle, self._released, self._room = stored, idle, released, room
        self._blobs: dict[str, Blob] = {}
        self._nursery: trio.Nursery | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._timer = trio.CancelScope()

    async def run(self, nursery: trio.Nursery) -> None:
        """Start working, in ``nursery``; returns never. Held chunks and paused sources are looked at when due, flights
        all the time."""
        self._nursery, self._token = nursery, trio.lowlevel.current_trio_token()
        try:
            while True:
                self._flights.look(starved=not self._buffers.free)
                self._look_at = self._clock() + TICK_S
                self.pump()
                with self._timer:
                    await trio.sleep_forever()
                self._timer = trio.CancelScope()
        finally:
            self._nursery = None

    def soon(self, call: Callable[..., None], *args: object) -> None:
        """Have the loop call something; any thread. Nothing happens when the loop is gone."""
        if self._token is not None:
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(call, *args)

    # --- blobs ---

    def add(self, blob: Blob, recipe: Recipe, have: bytearray | None) -> None:
        """Let chunks of the blob be asked for."""
        blob.recipe = recipe
        self._blobs[blob.key] = blob
        self.planner.add(blob.key, recipe, have)

    def remove(self, blob: Blob) -> None:
        """The blob is whole or closed: no chunk of it will be asked for any more, and nobody waits for one."""
        if blob.key in self._blobs:
            self.planner.remove(blob.key)
            self._let_go()
            del self._blobs[blob.key]
        for waiters in blob.waiters.values():
            for waiter in waiters:
                waiter.event.set()

    def give_up(self, blob: Blob) -> None:
        """The blob's disk hangs: leave behind what may be waiting for it, and do without what that holds."""
        if blob.key in self._blobs:
            self._flights.give_up(blob)
            self.remove(blob)
        self._lanes.renew()

    def have(self, blob: Blob, index: int) -> bool:
        return self.planner.state(blob.key, index) == HAVE

    def wait(self, blob: Blob, waiter: Waiter, chunks: list[int]) -> None:
        """Register a READ for chunks that are not here, and start fetching. What failed before anybody waited is
        tried again."""
        for index in chunks:
            if index not in blob.waiters:
                blob.tried.forget(index)
        blob.wait(waiter, chunks)
        self.planner.want(blob.key, chunks)
        self.pump()

    def leave(self, blob: Blob, waiter: Waiter) -> None:
        """A READ is done or gone; fetches that others, or the background, want go on."""
        self.planner.unwant(blob.key, blob.leave(waiter))

    def read_at(self, blob: Blob, reader: int, offset: int, end: int) -> None:
        """A reader asked for the bytes from ``offset`` to ``end``; ``pump`` then fetches what comes next."""
        self.planner.read_at(blob.key, reader, offset, end)

    def reader_left(self, blob: Blob, reader: int) -> None:
        """A reader has closed the blob."""
        self.planner.reader_left(blob.key, reader)
        self._let_go()

    def from_memory(self, blob: Blob) -> bool:
        """Whether readers of the blob get what comes next from memory: it is not being filled now."""
        return not self.planner.filled(blob.key) or not self.disk.ready(self._clock())

    def _let_go(self) -> None:
        """Take out of memory what readers have gone past."""
        past = self.planner.readahead.past
        while past:
            key, index = past.pop()
            recipe = self._blobs[key].recipe
            assert recipe is not None
            self.pool.let_go(recipe, index)

    # --- starting ---

    def pump(self) -> None:
        """Start every job that may be started now. Called whenever something changed that could allow one."""
        if self._nursery is None:
            return
        self._let_go()
        now = self._clock()
        filling = self.disk.ready(now)
        while (lanes := self._lanes.in_order()) and self._buffers.free:
            best = lanes[0]
            lane = next((lane for lane in lanes if lane.free > 0), None)
            background = best.breaker.ready(now) and best.used < best.width.count and self._buffers.free > self._reserve
            budget, range_bytes = best.link.budget, best.link.range_bytes(best.width.count)
            if self.planner.demand_jobs and not best.link.settled:
                budget, range_bytes = COMPANY, MAX_CHUNK
            if filling and self.disk.failures:  # one chunk shows whether the disk takes something again
                budget, range_bytes = 0, 0
            limits = Limits(lane is not None, background, budget, range_bytes, self.pool.readahead_room, filling)
            job = self.planner.next(now, limits)
            if job is None:
                if background and filling:
                    self._idle()
                break
            blob, buffer = self._blobs[job.key], self._buffers.take()
            assert buffer is not None
            chosen = self._lane(job, blob, lane if job.demand and lane is not None else best)
            chosen.running += 1
            blob.users += 1
            self._nursery.start_soon(self._run, job, blob, chosen, buffer)
        self._arm(now)

    def _arm(self, now: float) -> None:
        """Set the timer to when a held chunk, a source or the disk may be tried again."""
        times = [t for t in (self.planner.next_release(), self._lanes.ready_at(), self.disk.until) if t is not None]
        due = min((t for t in times if t > now), default=float("inf"))
        if self._flights:
            due = min(due, max(now, self._look_at))
        self._timer.deadline = trio.current_time() + due - now

    def _lane(self, job: Job, blob: Blob, preferred: Lane) -> Lane:
        """The source to ask: not one that failed to bring what the job begins with."""
        tried = blob.tried.of(job.first)
        if preferred not in tried:
            return preferred
        others = [lane for lane in self._lanes.in_order() if lane not in tried]
        return next((lane for lane in others if lane.free > 0), others[0])

    async def _run(self, job: Job, blob: Blob, lane: Lane, buffer: memoryview) -> None:
        """Fetch a job's chunks from one source. What it does not bring goes back to the planner: so nobody holds a
        buffer while waiting for another one."""
        failure: HeliosError | None = None
        scope = trio.CancelScope(deadline=trio.current_time() + self._lanes.deadline_s)
        kept = blob.proved and self.disk.ready(self._clock())
        loan = self._room.lend(blob.local, job.left) if kept else None
        try:
            await self._attempt(Flight(job, blob, lane, scope, loan, Pace(self._clock())), buffer)
        except HeliosError as error:
            if job.open:  # else it was overtaken: others fetch what is missing
                failure = error
                self._failed(job, blob, lane, error)
        finally:
            lane.running -= 1
            self._over(job, blob, lane, failure)

    async def _attempt(self, flight: Flight, buffer: memoryview) -> None:
        """One transfer. Raises HeliosError; a thread that is silent for the deadline is abandoned."""
        job, blob, lane = flight.job, flight.blob, flight.lane
        assert blob.recipe is not None
        assert self._token is not None
        with flight.scope:
            transfer = flight.transfer = Transfer(
                lane.source,
                blob.want,
                blob.recipe,
                range(job.next, job.stop),
                blob.local,
                self.pool,
                buffer,
                store=flight.loan is not None,
                urgent=job.demand,
                ahead=job.ahead,
                timeout_s=self._lanes.timeout_s,
                post=partial(_post, self._token, self._arrived, flight),
                give_back=partial(self._returned, self._token, flight.loan),
            )
            self._flights.begin(flight)
            try:
                await trio.to_thread.run_sync(transfer.run, abandon_on_cancel=True, limiter=lane.limiter)
            except Pointless:
                return
            except HeliosError:
                raise
            except Exception as error:
                log.exception("a fetch failed in an unforeseen way", extra=_names(blob, job.next, lane))
                raise HeliosError(f"fetching {blob.want.path} failed: {error!r}") from error
            finally:
                transfer.give_up()
                self._flights.end(flight)
        if flight.scope.cancelled_caught:
            if flight.abandoned or transfer.busy:  # it may hang at the disk
                self._buffers.lose(buffer)
            raise DeadlineExceeded(f"{lane.source.name} was silent for {self._lanes.deadline_s:g} s")
        if not flight.overtaken:
            self._lanes.worked(lane, flight.pace.started)

    # --- what comes back ---

    def _arrived(self, flight: Flight, index: int, data: memoryview | None, trouble: OSError | None) -> None:
        """A verified chunk: on disk, or else in ``data``; ``trouble`` is why the disk did not take it."""
        if self._nursery is None:
            return
        job, blob, lane = flight.job, flight.blob, flight.lane
        assert blob.recipe is not None
        start, end = blob.recipe.span(index)
        if not flight.over:
            flight.scope.deadline = trio.current_time() + self._lanes.deadline_s
            self._flights.arrived(flight)
        in_place = blob.local.sealed and data is None
        if trouble is not None or (data is None and not in_place):  # what the disk refused it may have taken in part
            self._room.grew(blob.local, flight.loan)
        self._metrics.fetched_bytes.labels(IN_PLACE if in_place else lane.source.name).inc(end - start)
        if job.key not in self._blobs:
            self.pool.let_go(blob.recipe, index)
            return  # the blob was closed meanwhile, and its files with it
        if trouble is not None:
            self.disk_failed(blob, trouble)
        pooled = data is not None and self.pool.has(blob.recipe, index)
        if self.planner.arrived(job, index, kept=data is None, pooled=pooled):
            if data is None and not in_place:
                self._disk_worked()
            blob.tried.forget(index)
            for waiter in blob.waiters.pop(index, ()):
                if data is not None:
                    waiter.copy(index, start, data)
                waiter.arrived(index)
            if data is None:
                self._stored(blob, index)
        if pooled and self.planner.state(job.key, index) != POOLED:
            self.pool.let_go(blob.recipe, index)
        self.pump()

    def _returned(self, token: trio.lowlevel.TrioToken, loan: Reservation | None, buffer: memoryview) -> None:
        """A transfer writes no more: called by its thread, or on the loop where that never started."""
        self._buffers.give(buffer)
        if loan is not None:
            _post(token, self._room.give_back, loan)

    def disk_failed(self, blob: Blob, error: OSError) -> None:
        """The disk refused something: go on without it for a while."""
        if self._room.failed(blob.local, error):
            return
        if self.disk.failed(self._clock()) and self.disk.failures == 1:
            log.warning(
                "the cache can't be written; reads go on without it, filling stops",
                extra={"reason": error.strerror, "file": blob.want.path, "model": str(blob.want.repo)},
            )

    def can_store(self, blob: Blob) -> bool:
        """Whether the blob's disk takes anything now."""
        return self.disk.ready(self._clock()) and self._room.writable(blob.local)

    def _disk_worked(self) -> None:
        if self.disk.failures:
            log.info("the cache can be written again")
        self.disk.worked()

    def _failed(self, job: Job, blob: Blob, lane: Lane, error: HeliosError) -> None:
        """One source failed."""
        news = self._lanes.failed(lane, error)
        if isinstance(error, CorruptChunk):
            log.error("a chunk is corrupt; it is not delivered", extra=_names(blob, error.chunk, lane))
        elif news:
            fields = {**_names(blob, job.next, lane), "reason": str(error)}
            log.warning("a chunk can't be fetched", extra=fields)

    def _over(self, job: Job, blob: Blob, lane: Lane, failure: HeliosError | None) -> None:
        """A job ended: whole, overtaken, or because its source failed."""
        blob.users -= 1
        if failure is None or job.next == job.stop or blob.key != job.key:
            self.planner.ended(job)
        else:
            blob.tried.failed(job.next, lane, failure)
            if len(blob.tried.of(job.next)) < self._lanes.count:
                self.planner.ended(job)  # the next source is asked
            else:
                self._not_to_be_had(job, blob)
        self._released(blob)
        self.pump()

    def _not_to_be_had(self, job: Job, blob: Blob) -> None:
        """Every source failed to bring the job's next chunk."""
        now = self._clock()
        hopeful = set(blob.tried.of(job.next)).difference(blob.tried.for_good(job.next))
        error = worst(blob.tried.forget(job.next))
        passing = bool(hopeful)
        waiting = blob.waiters.get(job.next, ())
        until = now + HOLD_S
        if passing:  # not beyond a READ's deadline: the failure that it is told must come then
            due = min((waiter.since for waiter in waiting), default=float("inf")) + self._lanes.deadline_s
            until = max(now + 0.05, min(due, *(lane.breaker.until for lane in hopeful)))
        self.planner.ended(job, hold=job.next, until=until)
        for waiter in list(waiting):
            if not passing or now - waiter.since >= self._lanes.deadline_s:
                waiter.fail(error)


def _names(blob: Blob, index: int, lane: Lane) -> dict[str, object]:
    """Fields of a log line about a chunk."""
    want = blob.want
    return {
        "model": f"{want.repo}@{want.commit}",
        "file": want.path,
        "blob": want.sha256,
        "chunk": index,
        "source": lane.source.name,
    }


def _post(token: trio.lowlevel.TrioToken, call: Callable[..., None], *args: object) -> None:
    """Called in the worker thread."""
    try:
        token.run_sync_soon(call, *args)
    except trio.RunFinishedError:
        return  # the daemon has ended; nobody waits for this any more
