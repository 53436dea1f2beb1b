"""What a worker's front says of it: whether it takes requests, lives, and has drained. No I/O; times are seconds of one
clock.

    starting -> ready        vLLM is healthy and has answered a request (``engine``)
    ready -> starting        it ended, and is started again
    any -> draining          once and for all (``drain``): no longer ready
    draining -> drained      nothing is under way, or the deadline has passed

Not ready is no fault: a pod that is not ready gets no requests and lives. Not live is one: the kubelet ends the
container. So a start, a failed warm-up and a restart only make it unready, and nothing but a vLLM that runs and shows
no sign of life makes it not live.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

UNREADY: Final = 2
"""Looks in a row that fail before it is unready: one late answer is no outage."""
IDLE: Final = 2
"""Looks in a row that find nothing under way before it has drained."""
COUNT_S: Final = 30.0
"""After so long in which vLLM computes nothing, its count of requests is not believed: clients that left may stay in
it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """See ``helios.config.ServedSettings``."""

    settle_s: float
    drain_s: float
    hang_s: float


@dataclass(frozen=True, slots=True)
class Look:
    """How vLLM was found. ``at``: when the look began; ``failure``: why /health is not 200, empty where it is.

    ``computing`` are requests that vLLM says it computes or will, ``counted`` those that it has not answered to their
    end; None where it does not say. ``mark`` changes whenever vLLM has computed something."""

    at: float
    failure: str
    computing: int | None = None
    running: int = 0
    counted: int | None = None
    mark: bytes = b""


@dataclass(frozen=True, slots=True)
class State:
    """What the front says. ``why``: what it is doing or lacks, where it is not ready or not live."""

    ready: bool
    live: bool
    why: str
    draining: bool = False
    drained: bool = False
    cut: int = 0
    """Requests that were under way when the deadline for draining passed."""


class Life:
    """Fed with what is seen of vLLM."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._now = 0.0
        self._up = False
        self._doing = "starting"
        self._failures = 0
        self._failure = ""
        self._up_at = self._answered_at = 0.0
        self._mark = b""
        self._moved_at = 0.0
        """When vLLM was seen to have computed something last..."""
        self._stuck_since = 0.0
        """...and since when it has not although there is something to compute."""
        self._hung = ""
        self._drain_at: float | None = None
        self._why_drain = ""
        self._withdrawn_at: float | None = None
        self._idle = 0
        self._under_way: int | None = None
        self._drained = False
        self._cut = 0

    def engine(self, now: float, up: bool, doing: str) -> None:
        """Whether vLLM is up, warm-up included, and else what it is doing; said all the time."""
        if up and not self._up:
            self._up_at = self._answered_at = self._moved_at = self._stuck_since = now
        if not up:
            self._failures, self._failure, self._hung = 0, "", ""
            self._idle, self._under_way = 0, None
        self._up, self._doing = up, doing
        self._judge(now)

    def looked(self, look: Look) -> None:
        """Somebody has looked at vLLM."""
        if not self._up or look.at < self._up_at:
            return  # at one that has ended since
        if look.failure:
            self._failures, self._failure = self._failures + 1, look.failure
        else:
            self._failures, self._failure, self._answered_at = 0, "", look.at
        if look.computing is not None:
            if look.mark != self._mark:
                self._mark, self._moved_at, self._stuck_since = look.mark, look.at, look.at
            if not look.running:
                self._stuck_since = look.at
            self._count(look, look.computing)
        self._judge(look.at)

    def drain(self, now: float, why: str) -> None:
        """Begin to drain; nothing where it has begun."""
        if self._drain_at is None:
            self._drain_at, self._why_drain = now, why
            self._judge(now)

    def withdrawn(self, now: float) -> None:
        """No router names it any more, as far as that can be had."""
        if self._withdrawn_at is None:
            self._withdrawn_at = now

    @property
    def state(self) -> State:
        """What is to be said now."""
        state = State(False, not self._hung, self._hung, self._drain_at is not None, self._drained, self._cut)
        if self._drain_at is not None:
            return replace(state, why=self._hung or f"draining: {self._why_drain}{self._left()}")
        if self._hung:
            return state
        if not self._up:
            return replace(state, why=f"vLLM is not ready: {self._doing}")
        if self._failures >= UNREADY:
            return replace(state, why=f"vLLM is not well: {self._failure}")
        return replace(state, ready=True)

    def _left(self) -> str:
        if self._drained:
            return f"; requests cut off: {self._cut}" if self._cut else "; done"
        return "" if self._under_way is None else f"; requests under way: {self._under_way}"

    def _count(self, look: Look, computing: int) -> None:
        """What a look says of draining: one that was begun after routers had time to hear of it."""
        if self._drain_at is None:
            return
        self._under_way = max(computing, look.counted or 0)
        leaked = not computing and look.at - max(self._moved_at, self._drain_at) >= COUNT_S
        settled_at = max(self._drain_at + self._limits.settle_s, self._withdrawn_at or 0.0)
        settled = self._withdrawn_at is not None and look.at >= settled_at
        self._idle = self._idle + 1 if settled and (not self._under_way or leaked) else 0

    def _judge(self, now: float) -> None:
        self._now = now = max(now, self._now)  # a look is told after it was made
        limit = self._limits.hang_s
        if self._up and limit:
            self._hung = ""
            if now - self._answered_at > limit:
                self._hung = f"vLLM has not answered /health for {limit:g} s: {self._failure or 'no answer'}"
            elif now - self._stuck_since > limit and not self._failures:
                self._hung = f"vLLM has requests and has computed nothing for {limit:g} s"
        if self._drain_at is None or self._drained:
            return
        if not self._up or self._idle >= IDLE:
            self._drained = True
        elif self._hung or now >= self._drain_at + self._limits.drain_s:  # one that hangs ends nothing any more
            self._drained, self._cut = True, self._under_way or 0
