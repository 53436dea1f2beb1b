"""Questions to the registry: how long one may take, and what happens while nobody answers.

What would do with a last value never waits for a registry that is known to be away: whoever asks falls back on that
value at once, and ``run`` finds out behind it when the registry answers again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, TypeVar

import trio

from helios.errors import DeadlineExceeded, HeliosError, Unavailable

log = logging.getLogger("heliosfs.catalog")

T = TypeVar("T")

NEVER: Final = -1e9
"""A time long ago, in seconds of the monotonic clock."""

AGAIN_S: Final = 0.05
"""The first pause before a failed question is asked again, in seconds; it doubles."""

SPARE_S: Final = 0.5
"""The call's own deadline comes first: by so many seconds."""

THREADS: Final = 8
"""Most questions at a time."""

SILENT: Final = "the registry does not answer"


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a registry may take, in seconds: for a name never seen, and for one whose last value would do."""

    unknown_s: float = 5.0
    known_s: float = 2.0
    pause_s: float = 1.0
    """After a failure nobody asks again for this long, doubled with every failure up to ``longest_pause_s``."""
    longest_pause_s: float = 5.0


PATIENCE: Final = Patience()


class Asking:
    """Asks in threads; belongs to one trio loop. Its state changes only between waits.

    A registry is in *doubt* from the first failed question to the next answer, and *silent* when it stayed so for as
    long as somebody was willing to wait: then the log says so, and nobody but ``run`` asks all the time.
    """

    def __init__(self, patience: Patience, clock: Callable[[], float]) -> None:
        self._patience, self._clock = patience, clock
        self._limiter = trio.CapacityLimiter(THREADS)
        self._doubted: float | None = None  # since when
        self._doubt = trio.Event()
        self._last: Callable[[float], object] = _nothing
        self._pause = 0.0
        self._quiet_until = NEVER

    @property
    def answering(self) -> bool:
        """Whether the last question was answered."""
        return self._doubted is None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """While the registry is in doubt, ask it again, so that somebody notices when it is back. Returns never."""
        task_status.started()
        while True:
            await self._doubt.wait()
            pause = AGAIN_S
            while self._doubted is not None:
                await trio.sleep(max(pause, self._quiet_until - self._clock()))
                pause = min(2 * pause, self._patience.longest_pause_s)
                with suppress(HeliosError):
                    await self._find_out()

    async def ask(self, call: Callable[[float], T], *, fallback: bool, patient: bool) -> T:
        """Make a blocking call, which is told how many seconds it has; raises Unavailable where nobody answers.

        ``fallback``: there is a last value, so it is not worth waiting for long. ``patient``: it must be asked all the
        same, and again for a while; else a first failure suffices, and that of somebody else.
        """
        patience_s = self._patience.known_s if fallback else self._patience.unknown_s
        if fallback and not patient:
            if self._doubted is None:
                return await self._once(call, patience_s)
            self._last = call
            raise Unavailable(SILENT)
        if self._clock() < self._quiet_until:
            raise Unavailable(SILENT)
        end, pause = self._clock() + patience_s, AGAIN_S
        while True:
            try:
                return await self._once(call, max(0.0, end - self._clock()))
            except Unavailable as error:
                if self._pause or self._clock() + pause >= end:
                    self._silent(error)
                    raise DeadlineExceeded(SILENT) from error
            await trio.sleep(pause)
            pause *= 2

    async def _find_out(self) -> None:
        """One more try of a question that was not answered."""
        since = self._doubted
        try:
            await self._once(self._last, self._patience.known_s)
        except Unavailable as error:
            if since is not None and self._clock() - since >= self._patience.known_s:
                self._silent(error)

    async def _once(self, call: Callable[[float], T], seconds: float) -> T:
        try:
            with trio.fail_after(seconds + SPARE_S):
                value = await trio.to_thread.run_sync(
                    call, max(AGAIN_S, seconds), abandon_on_cancel=True, limiter=self._limiter
                )
        except trio.TooSlowError:
            self._failed(call)
            raise DeadlineExceeded(SILENT) from None
        except Unavailable:
            self._failed(call)
            raise
        except HeliosError:  # no such thing, or nonsense: an answer
            self._answered()
            raise
        self._answered()
        return value

    def _failed(self, call: Callable[[float], object]) -> None:
        self._last = call
        if self._doubted is None:
            self._doubted = self._clock()
            self._doubt.set()

    def _silent(self, error: Exception) -> None:
        if self._pause == 0.0:
            log.warning(
                "the registry does not answer: names keep their last value, unknown ones give EIO",
                extra={"reason": str(error) or "no answer before the deadline"},
            )
        self._pause = min(self._patience.longest_pause_s, max(self._patience.pause_s, self._pause * 2))
        self._quiet_until = self._clock() + self._pause

    def _answered(self) -> None:
        if self._pause:
            log.info("the registry answers again")
        if self._doubted is not None:
            self._doubted, self._doubt, self._last = None, trio.Event(), _nothing
        self._pause, self._quiet_until = 0.0, NEVER


def _nothing(_: float) -> None:
    """Asked of nobody."""
