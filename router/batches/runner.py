"""Which batches this process runs: it looks for those that nobody owns, or whose owner shows no sign of life.

A lease is not judged by clocks of different machines: a batch may be taken when its record has not changed for
``lease_s`` while this process watched it. Taking it is a conditional write, so of several processes one does.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from helios.errors import HeliosError, IntegrityError, NotFound
from router.batches import machine
from router.batches.ledger import Ledger, NotOurs
from router.batches.objects import Tag
from router.batches.records import born_at
from router.batches.run import Run, Tools
from router.batches.shelf import Lost
from router.batches.slots import LOOK_S

log = logging.getLogger("helios.router")

MAX_RUNS: Final = 32
"""Batches that a process runs at a time..."""
MAX_OF_TENANT: Final = 4
"""...and of one tenant."""
MAX_LOOKS: Final = 64
"""Records that are read in one round; the next one goes on behind them."""
ABANDONED_S: Final = 3600.0
"""A mark of a batch without a record that is so old, in seconds, is of one whose making was interrupted."""


class Runner:
    """One process's. ``running`` owns its tasks."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._owner = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._runs: dict[str, tuple[str, Run]] = {}
        self._seen: dict[str, tuple[Tag, float]] = {}
        """Batches of others: since when (seconds) their record has been this one."""
        self._broken: set[str] = set()
        self._woken = asyncio.Event()
        self._leaving = asyncio.Event()
        self._from = ("", "")
        """Where the next round begins."""
        self._tasks: set[asyncio.Task[None]] = set()
        tools.metrics.batches_running.set_function(lambda: float(len(self._runs)))
        tools.metrics.batch_lines_in_flight.set_function(lambda: float(tools.slots.used))

    def wake(self) -> None:
        """There is a new batch."""
        self._woken.set()

    def leave(self) -> None:
        """Begin nothing more."""
        self._leaving.set()
        self._woken.set()
        for _, run in self._runs.values():
            run.leave()

    @asynccontextmanager
    async def running(self, grace_s: float) -> AsyncIterator[None]:
        """Run batches while the context lasts; at its end what is under way has ``grace_s`` seconds."""
        async with asyncio.TaskGroup() as group:
            tasks = group.create_task(self._serve()), group.create_task(self._look_on(group))
            try:
                yield
            finally:
                self.leave()
                if self._tasks:
                    await asyncio.wait(self._tasks, timeout=grace_s)
                for task in (*tasks, *self._tasks):
                    task.cancel()

    async def _serve(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            self._tools.slots.serve()

    async def _look_on(self, group: asyncio.TaskGroup) -> None:
        while not self._leaving.is_set():
            self._woken.clear()
            try:
                await self._look(group)
            except HeliosError as error:
                log.warning("the store of batches can't be used", extra={"reason": error.message})
            except Exception:
                log.exception("batches could not be looked for")  # all else goes on
            try:
                async with asyncio.timeout(self._tools.settings.batches.poll_s):
                    await self._woken.wait()
            except TimeoutError:
                pass

    async def _look(self, group: asyncio.TaskGroup) -> None:
        """One round: take what may be taken. Raises HeliosError."""
        found = [(tenant, batch) for tenant, batch in await self._tools.shelf.open_batches() if batch not in self._runs]
        self._seen = {batch: seen for _, batch in found if (seen := self._seen.get(batch)) is not None}
        later = [one for one in found if one > self._from]
        looks = [*later, *(one for one in found if one <= self._from)][:MAX_LOOKS]
        for tenant, batch in looks:
            self._from = (tenant, batch)
            mine = Counter(owner for owner, _ in self._runs.values())
            if len(self._runs) >= MAX_RUNS or self._leaving.is_set():
                return
            if mine[tenant] < MAX_OF_TENANT:
                await self._take(tenant, batch, group)

    async def _take(self, tenant: str, batch: str, group: asyncio.TaskGroup) -> None:
        tools = self._tools
        try:
            held = await tools.shelf.batch(tenant, batch)
        except IntegrityError as error:
            if batch not in self._broken:
                self._broken.add(batch)
                log.warning("a batch can't be read", extra={"batch": batch, "reason": error.message})
            return
        except NotFound:
            if tools.now() - born_at(batch) > ABANDONED_S:
                await tools.shelf.close_batch(tenant, batch)
            return
        if held.record.over:
            await tools.shelf.close_batch(tenant, batch)
            return
        lapsed = bool(held.record.owner)
        if lapsed and not self._lapsed(batch, held.tag):
            return
        try:
            held = await tools.shelf.save(held, machine.claimed(held.record, self._owner))
        except Lost:  # to another process
            return
        if self._leaving.is_set():
            await tools.shelf.save(held, machine.released(held.record))
            return
        self._seen.pop(batch, None)
        tools.metrics.batch_claims.labels("lapsed" if lapsed else "nobody").inc()
        run = Run(tools, Ledger(tools.shelf, held, tools.clock))
        self._runs[batch] = tenant, run
        task = group.create_task(self._run(batch, run))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _lapsed(self, batch: str, tag: Tag) -> bool:
        now = self._tools.clock()
        known, since = self._seen.setdefault(batch, (tag, now))
        if known != tag:
            self._seen[batch] = tag, now
            return False
        return now - since >= self._tools.settings.batches.lease_s

    async def _run(self, batch: str, run: Run) -> None:
        losses = self._tools.metrics.batch_losses
        try:
            await run.run()
            self._woken.set()  # there is room for another
        except* NotOurs:
            losses.labels("taken").inc()
            log.warning("a batch was taken over by another process", extra={"batch": batch})
        except* HeliosError as group:
            losses.labels("store").inc()
            reason = "; ".join(str(error) for error in group.exceptions)
            log.warning("a batch can't go on for now", extra={"batch": batch, "reason": reason})
        except* Exception:
            log.exception("a batch can't go on", extra={"batch": batch})
        finally:
            del self._runs[batch]
