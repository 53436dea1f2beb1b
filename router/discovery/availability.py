"""Models that no worker serves: looked for at the registry, fetched if they may be, and woken, all in the background.

``want`` is one synchronous step of a request's path: it starts a flight for the model, or joins the one there is, and
returns how far it is. A request is then refused (``progress.refusal``), or held by whoever holds requests, who
``listen``s or has it brought (``bring``).

A flight asks the registry (docs/native-api.md, Where) until all of the model is there, has the waker start a worker,
and ends when one serves it (``look``). One flight for each model, ``MOST`` at a time. What became of one is remembered
for a while, so that clients who come again at once neither start it anew nor wait. A flight that nobody wants any more
ends; what the registry fetches goes on there. A registry that is away ends no flight of a model that it knew.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final, Protocol

from helios.errors import HeliosError, NotFound, Retired, Unavailable, from_code
from helios.registry_answers import Place
from router.discovery.models import Name
from router.discovery.progress import Phase, Progress

log = logging.getLogger("helios.router.discovery")

MOST: Final = 64
"""Flights at a time; the registry fetches no more either."""
MOST_ENDED: Final = 1_000
"""Flights that are over and remembered."""
ASK_S: Final = (0.5, 2.0)
"""Least and longest time between two questions to the registry, in seconds."""
LINGER_S: Final = 300.0
"""A flight that nobody has wanted for so long ends, in seconds."""
NOWHERE_S: Final = 10.0
"""How long it counts that the registry can't get a model, in seconds."""
FAILED_S: Final = 10.0
"""How long a failure counts that doesn't say so itself, in seconds."""
NOT_THERE: Final = "the registry has none, and can't get it"
RETRY_S: Final = 5
"""When to come again where nothing better is known, in seconds."""


Report = Callable[[str], None]


class Waker(Protocol):
    """Starts workers: the operator, or ``helios serve``."""

    async def wake(self, name: Name, commit: str, report: Report) -> None:
        """Have a worker of the model started; ``report`` takes what is known of its progress, in words.

        May return when that was asked for, or go on until it is cancelled, which happens when a worker serves.
        Raises HeliosError, whose message clients see.
        """
        ...


Listener = Callable[[Progress], None]
"""Hears of each change, in the event loop's thread; it must not raise."""


@dataclass(eq=False, slots=True)
class _Flight:
    progress: Progress
    began: float
    wanted: float
    until: float = math.inf
    """When what became of it counts no more."""
    served: asyncio.Event = field(default_factory=asyncio.Event)
    listeners: dict[int, Listener] = field(default_factory=dict)
    pinned: str = ""
    """The name of the commit that a name with a revision stands for, once that is known."""


class Availability:
    """The models that one router waits for. Everything is called in the event loop's thread; ``close`` ends it."""

    def __init__(
        self,
        where: Callable[[Name], Awaitable[Place]],
        fetch: Callable[[Name], Awaitable[Place]],
        may_fetch: Callable[[Name], bool],
        serves: Callable[[str], bool],
        waker: Waker | None = None,
        *,
        wake_s: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """``where`` and ``fetch`` ask the registry; ``serves``: whether a worker takes requests of a model now.

        ``wake_s``: longest time from waking to a worker that serves, in seconds.
        """
        self._where, self._fetch, self._may_fetch = where, fetch, may_fetch
        self._serves, self._waker, self._wake_s = serves, waker, wake_s
        self._clock, self._sleep = clock, sleep
        self._flights: dict[str, _Flight] = {}
        self._ended: OrderedDict[str, _Flight] = OrderedDict()
        self.changed: Listener = lambda progress: None
        """Hears of each change of every flight; the models are none the more wanted for it."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._listeners = 0

    async def close(self) -> None:
        for flight in list(self._flights.values()):
            self._end(flight, Phase.FAILED, reason="the router shuts down")
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def want(self, model: str) -> Progress:
        """A client asks for a model that no worker serves. Raises InvalidInput for what no model can be called."""
        now = self._clock()
        flight = self._flights.get(model)
        if flight is None:
            ended = self._ended.get(model)
            if ended is not None and now < ended.until:
                return replace(ended.progress, retry_after_s=max(1, math.ceil(ended.until - now)))
            name = Name.parse(model)
            if len(self._flights) >= MOST:
                why = f"{MOST} models are being waited for already"
                return Progress(model, Phase.FAILED, reason=why, retry_after_s=RETRY_S)
            self._ended.pop(model, None)
            flight = self._flights[model] = _Flight(Progress(model), now, now)
            task = asyncio.get_running_loop().create_task(self._fly(flight, name))
            self._tasks.add(task)
            task.add_done_callback(partial(self._landed, flight))
        flight.wanted = now
        return flight.progress

    def listen(self, model: str, listener: Listener) -> Callable[[], None]:
        """Hear of a flight's changes, the end included; call what is returned to hear no more.

        After ``want``, in the same step. While somebody listens the model is wanted. What has ended is told at once.
        """
        flight = self._flights.get(model)
        if flight is None:
            ended = self._ended.get(model)
            listener(Progress(model, Phase.FAILED, reason="nobody waits for it") if ended is None else ended.progress)
            return lambda: None
        self._listeners += 1
        number = self._listeners
        flight.listeners[number] = listener

        def leave() -> None:
            flight.listeners.pop(number, None)
            flight.wanted = self._clock()

        return leave

    async def wait(self, model: str, timeout_s: float) -> Progress:
        """``want`` a model and wait until that is over, or for so long. Raises InvalidInput."""
        progress = self.want(model)
        if progress.ended:
            return progress
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def hear(now: Progress) -> None:
            nonlocal progress
            progress = now
            if now.ended and not over.done():
                over.set_result(None)

        leave = self.listen(model, hear)
        try:
            await asyncio.wait([over], timeout=timeout_s)
        finally:
            leave()
        return progress

    async def bring(self, model: str, report: Report) -> None:
        """Have a model fetched and woken; returns when a worker serves it. ``report`` takes the progress, in words.

        For whoever holds requests meanwhile; cancel it to want it no more. Raises InvalidInput for what no model can
        be called, NotFound, Retired or Unavailable where it does not come.
        """
        progress, changed = self.want(model), asyncio.Event()

        def hear(now: Progress) -> None:
            nonlocal progress
            progress = now
            changed.set()

        leave = self.listen(model, hear)
        try:
            while not progress.ended:
                report(progress.text)
                await changed.wait()
                changed.clear()
        finally:
            leave()
        if progress.phase is not Phase.SERVED:
            raise {Phase.NOWHERE: NotFound, Phase.RETIRED: Retired}.get(progress.phase, Unavailable)(progress.text)

    def look(self) -> None:
        """Workers have changed: end the flights of those models that are served now."""
        for flight in self._flights.values():
            self._look_at(flight)

    @property
    def awaited(self) -> list[dict[str, Any]]:
        """The flights under way, for people."""
        now = self._clock()
        return [
            {
                "model": model, "phase": flight.progress.phase.value, "done": flight.progress.done,
                "total": flight.progress.total, "reason": flight.progress.reason,
                "retry_after_s": flight.progress.retry_after_s, "waited_s": round(now - flight.began, 3),
            }
            for model, flight in sorted(self._flights.items())
        ]  # fmt: skip

    def _look_at(self, flight: _Flight) -> None:
        """``org/name@champion`` is served, too, where its commit is."""
        if self._serves(flight.progress.model) or (flight.pinned and self._serves(flight.pinned)):
            flight.served.set()

    # --- a flight ---

    async def _fly(self, flight: _Flight, name: Name) -> None:
        bringing, served = asyncio.ensure_future(self._bring(flight, name)), asyncio.ensure_future(flight.served.wait())
        try:
            await asyncio.wait([bringing, served], return_when=asyncio.FIRST_COMPLETED)
            if served.done():
                self._end(flight, Phase.SERVED)
        finally:
            bringing.cancel()
            served.cancel()
            outcome, _ = await asyncio.gather(bringing, served, return_exceptions=True)
            if isinstance(outcome, Exception):
                raise outcome

    def _landed(self, flight: _Flight, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._end(flight, Phase.FAILED, reason="the router failed; its log says how")
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("waiting for a model failed", extra={"model": flight.progress.model}, exc_info=error)

    async def _bring(self, flight: _Flight, name: Name) -> None:
        """Until somebody serves it, which cancels this, or an end that is told."""
        try:
            commit = await self._at_registry(flight, name)
            if commit is not None:
                await self._wake(flight, name, commit)
        except NotFound:
            self._end(flight, Phase.NOWHERE, NOWHERE_S, reason=NOT_THERE)
        except Retired as error:
            self._end(flight, Phase.RETIRED, NOWHERE_S, reason=error.message)
        except HeliosError as error:
            self._end(flight, Phase.FAILED, FAILED_S, reason=error.message)

    async def _at_registry(self, flight: _Flight, name: Name) -> str | None:
        """Its commit, when all of it is at the registry; None when that won't be, which is told."""
        ask = self._fetch if self._may_fetch(name) else self._where
        while True:
            try:
                place = await ask(name)
            except Unavailable as error:
                log.warning(
                    "the registry does not answer", extra={"model": flight.progress.model, "why": error.message}
                )
                phase = flight.progress.phase
                if phase is Phase.ASKED:
                    self._end(flight, Phase.FAILED, RETRY_S, reason="the registry does not answer")
                else:
                    self._tell(flight, phase, reason="the registry does not answer", retry_after_s=RETRY_S)
                if flight.progress.ended or self._forgotten(flight):
                    return None
                await self._sleep(RETRY_S)
                continue
            if place.state == "here" and place.commit is not None:
                return place.commit
            fetch, failure = place.fetch, None if place.fetch is None else place.fetch.error
            if failure is not None:
                why = from_code(failure.code, failure.message, failure.hint)
                if isinstance(why, NotFound | Retired):
                    raise why
                # The whole of it names addresses, which are nobody's business.
                log.warning("the registry can't fetch a model", extra={"model": str(name), "why": failure.message})
                reason = f"fetching it failed ({failure.code})"
                self._end(flight, Phase.FAILED, (fetch and fetch.retry_after_s) or RETRY_S, reason=reason)
                return None
            if place.state == "nowhere" or ask is self._where:
                reason = NOT_THERE if ask is self._fetch else "the registry may not fetch it for clients"
                self._end(flight, Phase.NOWHERE, NOWHERE_S, reason=reason)
                return None
            if fetch is not None:
                after = max(1, fetch.retry_after_s or 1)
                self._tell(flight, Phase.FETCHING, done=fetch.done, total=fetch.total, retry_after_s=after)
            if self._forgotten(flight):
                return None
            await self._sleep(min(max(ASK_S[0], flight.progress.retry_after_s), ASK_S[1]))

    async def _wake(self, flight: _Flight, name: Name, commit: str) -> None:
        """Have a worker started and wait until this task is cancelled because one serves, or for ``wake_s``."""
        if self._waker is None:
            self._end(flight, Phase.FAILED, FAILED_S, reason="the registry has it, and no worker serves it")
            return
        if "@" in flight.progress.model:
            flight.pinned = f"{name.repo.id}@{commit}"
        self._tell(flight, Phase.WAKING, retry_after_s=RETRY_S)
        began = self._clock()
        waking = asyncio.ensure_future(self._waker.wake(name, commit, partial(self._report, flight)))
        try:
            while self._clock() - began < self._wake_s:
                if waking.done():
                    waking.result()
                self._look_at(flight)
                if self._forgotten(flight):
                    return
                await self._sleep(ASK_S[0])
        finally:
            waking.cancel()
            await asyncio.wait([waking])
        reason = f"no worker served it within {self._wake_s:g} s of being started"
        self._end(flight, Phase.FAILED, FAILED_S, reason=reason)

    def _report(self, flight: _Flight, text: str) -> None:
        self._tell(flight, Phase.WAKING, reason=text or None, retry_after_s=RETRY_S)

    def _forgotten(self, flight: _Flight) -> bool:
        """Whether nobody has wanted it for long, which is told then."""
        if flight.listeners or self._clock() - flight.wanted <= LINGER_S:
            return False
        self._end(flight, Phase.FAILED, reason="nobody asked for it any more")
        return True

    def _end(self, flight: _Flight, phase: Phase, keep_s: float = 0.0, reason: str | None = None) -> None:
        """It is over, unless it was; that counts for ``keep_s``."""
        model = flight.progress.model
        if self._flights.get(model) is not flight:
            return
        del self._flights[model]
        if keep_s > 0:
            flight.until = self._clock() + keep_s
            self._ended[model] = flight
            if len(self._ended) > MOST_ENDED:
                self._ended.popitem(last=False)
        self._tell(flight, phase, reason=reason, retry_after_s=max(1, math.ceil(keep_s)))

    def _tell(self, flight: _Flight, phase: Phase, **more: Any) -> None:
        if flight.progress.ended:
            return
        progress = replace(flight.progress, phase=phase, **({"reason": None} | more))
        if progress == flight.progress:
            return
        flight.progress = progress
        self.changed(progress)
        for listener in list(flight.listeners.values()):
            listener(progress)
