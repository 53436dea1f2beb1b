"""Leading by a Lease: campaign, renew, and make sure that what leaders do has ended before anybody else may begin."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

from helios.kube.following import why
from orchestrator.actions import Manifest
from orchestrator.runtime.lease import Claim, Election, Times
from orchestrator.runtime.writes import FAILURES

log = logging.getLogger("helios.operator")

JITTER: Final = 0.2


class Store(Protocol):
    """Where the record is. Calls have deadlines, and raise ``FAILURES``."""

    async def read(self) -> Manifest | None: ...
    async def write(self, version: str, spec: dict[str, Any]) -> Manifest: ...


class Leadership:
    """``run`` leads whenever it can. ``remaining_s`` is the fence of all writes."""

    def __init__(self, election: Election, store: Store, times: Times, *, told: Callable[[bool], None]) -> None:
        """``told`` hears when it begins and when it has stopped to lead."""
        self._election, self._store, self._times, self._told = election, store, times, told
        self.remaining_s = election.remaining_s

    @property
    def holder(self) -> str:
        """Who leads, as far as is known."""
        return self._election.holder

    async def run(self, lead: Callable[[], Awaitable[None]]) -> None:
        """Have ``lead`` run while this process leads; for ever. It is cancelled, and waited for, when the lease can't
        be renewed in time. When this is cancelled the lease is given back once ``lead`` has ended."""
        try:
            while True:
                await self._campaign()
                await self._led(lead)
                await self._pause()
        finally:
            await self._release()

    async def _campaign(self) -> None:
        while True:
            await self._try()
            if self.remaining_s() > 0:
                return
            await self._pause()

    async def _led(self, lead: Callable[[], Awaitable[None]]) -> None:
        log.info("leading")
        self._told(True)
        task = asyncio.ensure_future(lead())
        try:
            while (left := self.remaining_s()) > 0 and not task.done():
                await asyncio.wait([task], timeout=min(left, self._times.retry_s))
                if not task.done() and (left := self.remaining_s()) > 0:
                    await self._renew(left)
        finally:
            task.cancel()
            (outcome,) = await asyncio.gather(task, return_exceptions=True)
            self._told(False)
            log.info("not leading any more")
        if isinstance(outcome, Exception):
            raise outcome

    async def _renew(self, left: float) -> None:
        """One try, which may not outlast what is left."""
        try:
            async with asyncio.timeout(left):
                await self._try()
        except TimeoutError:
            log.warning("the lease was not renewed in time")

    async def _try(self) -> None:
        """Look, and write if that may win. Nothing is known of a write without an answer: the next look tells."""
        try:
            if self.remaining_s() <= 0 or self._election.claim() is None:
                self._election.saw(await self._store.read())
            claim = self._election.claim()
            if claim is not None:
                self._election.won(claim, await self._store.write(claim.version, claim.spec))
        except FAILURES as error:
            log.warning("the lease could not be read or written", extra={"why": why(error)})
            await self._look()

    async def _look(self) -> None:
        """After a failed write: the record may be another one, or have another version, than was known."""
        try:
            self._election.saw(await self._store.read())
        except FAILURES as error:
            log.warning("the lease can't be read", extra={"why": why(error)})

    async def _release(self) -> None:
        """Twice at most: a renewal that was cut off may have been written, and then the record has another version."""
        for last in (False, True):
            claim: Claim | None = self._election.release()
            if claim is None:
                return
            try:
                await self._store.write(claim.version, claim.spec)
                return
            except FAILURES as error:
                if last:
                    log.warning("the lease could not be given back; it runs out", extra={"why": why(error)})
                else:
                    await self._look()

    async def _pause(self) -> None:
        await asyncio.sleep(self._times.retry_s * random.uniform(1 - JITTER, 1 + JITTER))  # noqa: S311
