"""Limits that several routers share, in Redis or Valkey: the buckets of ``buckets``, in one Lua script.

Requests that ask while an answer is under way go together with the next one, so each waits for one round trip and the
server for few. One that has no answer within the deadline, or can't be sent, is decided here: by this router's own
buckets (``open``), or with 503 (``closed``); then nobody asks for ``PAUSE_S``, so an unreachable server delays few.
What was taken here is settled here. A server that answered too late may have taken, too: limits err to the strict
side. Time is the server's, so routers need not agree on it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from helios.config import SharedLimitSettings
from helios.errors import UsageError
from router import errors
from router.admission.buckets import Charge, Done, LocalLimits, Refusal, refusal_error

if TYPE_CHECKING:
    from redis.asyncio import Redis

log = logging.getLogger("helios.router")

SCRIPT: Final = Path(__file__).with_name("limits.lua").read_text()
BATCH: Final = 256
"""Requests that are asked for in one round trip."""
MAX_PENDING: Final = 20_000
"""More than these are decided here."""
PAUSE_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class _Ask:
    charges: Sequence[Charge]
    done: Done | None
    """None: it is settled."""


class RedisLimits:
    """The shared buckets; ``run`` is owned by the router's task group. ``clock`` gives seconds.

    ``away`` says whether the server could not be asked when it last was.
    """

    def __init__(self, settings: SharedLimitSettings, local: LocalLimits, clock: Callable[[], float]) -> None:
        """Raises UsageError for an address that is none."""
        from redis.asyncio.connection import parse_url

        try:
            parse_url(settings.url)
        except ValueError as error:
            hint = "Write redis://HOST:6379/0."
            raise UsageError(f"router.admission.shared.url can't be used: {error}", hint=hint) from None
        if not 0.001 <= settings.timeout_s <= 60:
            raise UsageError(f"router.admission.shared.timeout_s must be 0.001 to 60, not {settings.timeout_s}")
        self._settings, self._local, self._clock = settings, local, clock
        self._pending: deque[_Ask] = deque()
        self._some = asyncio.Event()
        self._again_at = 0.0
        self._sha = ""
        self.away = False

    def take(self, charges: Sequence[Charge], done: Done) -> None:
        self._put(_Ask(charges, done))

    def settle(self, charges: Sequence[Charge]) -> None:
        self._put(_Ask(charges, None))

    def _put(self, ask: _Ask) -> None:
        if self._clock() < self._again_at or len(self._pending) >= MAX_PENDING:
            self._decide(ask)
            return
        self._pending.append(ask)
        self._some.set()

    async def run(self) -> None:
        """Until cancelled; who still waits then is decided for here."""
        from redis.asyncio import Redis

        timeout_s = self._settings.timeout_s
        redis = Redis.from_url(
            self._settings.url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=None,
            health_check_interval=0,
        )  # fmt: skip
        batch: list[_Ask] = []
        try:
            while True:
                await self._some.wait()
                batch = [self._pending.popleft() for _ in range(min(BATCH, len(self._pending)))]
                if not self._pending:
                    self._some.clear()
                await self._serve(redis, batch)
                batch = []
        finally:
            for ask in [*batch, *self._pending]:
                self._decide(ask)
            self._pending.clear()
            await redis.aclose()

    async def _serve(self, redis: Redis, batch: list[_Ask]) -> None:
        from redis.exceptions import RedisError

        try:
            async with asyncio.timeout(self._settings.timeout_s):
                answers = await self._ask(redis, batch)
        except (TimeoutError, OSError, RedisError) as error:
            if not self.away:
                reason = str(error) or "no answer in time"
                log.warning("the shared limits can't be reached", extra={"reason": reason})
            self.away, self._again_at = True, self._clock() + PAUSE_S
            left = [*batch, *self._pending]  # they need not wait for the same
            self._pending.clear()
            self._some.clear()
            for ask in left:
                self._decide(ask)
            return
        if self.away:
            self.away = False
            log.info("the shared limits can be reached again")
        for ask, (_, refused, wait) in zip(batch, answers, strict=True):
            if ask.done is not None:
                refusal = Refusal(ask.charges[refused - 1], float(wait)) if refused else None
                ask.done(None if refusal is None else refusal_error(refusal), self)

    async def _ask(self, redis: Redis, batch: list[_Ask]) -> list[Any]:
        from redis.exceptions import NoScriptError

        if not self._sha:
            self._sha = str(await redis.script_load(SCRIPT))
        try:
            return await self._pipeline(redis, batch)
        except NoScriptError:  # the server was started anew: it ran none of them
            await redis.script_load(SCRIPT)
            return await self._pipeline(redis, batch)

    async def _pipeline(self, redis: Redis, batch: list[_Ask]) -> list[Any]:
        pipe = redis.pipeline(transaction=False)
        for ask in batch:
            names = [f"{{helios-limits}}:{charge.unit}:{charge.name}" for charge in ask.charges]
            numbers = [number for charge in ask.charges for number in (repr(charge.limit), repr(charge.amount))]
            how = "settle" if ask.done is None else "take"
            pipe.evalsha(self._sha, len(names), *names, how, *numbers)
        return await pipe.execute()

    def _decide(self, ask: _Ask) -> None:
        if ask.done is None:
            return  # it was taken there, and comes back there with time
        if self._settings.when_away == "closed":
            ask.done(errors.limits_away(), self._local)
        else:
            self._local.take(ask.charges, ask.done)
