"""When to try again, without I/O: exponential backoff, a deadline without progress, and the upstream's own wishes."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Final, Protocol

from helios.errors import DeadlineExceeded, RateLimited, Unavailable

FIRST_DELAY_S: Final = 0.5
LONGEST_DELAY_S: Final = 20.0
LONGEST_RATE_LIMIT_S: Final = 900.0
"""The Hub's windows are 300 s; an upstream that asks for more than this is reported, not waited for."""
MOST_RATE_LIMITS: Final = 8
"""So many 429s in a row, each waited out, and it is not going to end."""

_RATE_LIMIT = re.compile(r";\s*t\s*=\s*(\d{1,9})")


class Headers(Protocol):
    """Looked up without regard to case."""

    def get(self, name: str, /) -> str | None: ...


class Transient(Exception):
    """A failure that may pass: a status 5xx, a broken connection, a rate limit (``wait_s``: how long it lasts)."""

    def __init__(self, message: str, *, wait_s: float | None = None, timed_out: bool = False) -> None:
        super().__init__(message)
        self.wait_s, self.timed_out = wait_s, timed_out


class Retry:
    """Decides on one sequence of attempts, such as one file's download.

    ``stall_s``: give up when attempts have failed for so many seconds without progress between them. Time that the
    upstream asked to wait doesn't count; ``patience_s`` is the most of it that is waited at a time. Not for several
    threads at once.
    """

    def __init__(
        self,
        stall_s: float,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
        *,
        patience_s: float = LONGEST_RATE_LIMIT_S,
    ) -> None:
        self._stall_s, self._patience_s, self._clock, self._jitter = stall_s, patience_s, clock, jitter
        self._failures = self._rate_limits = 0
        self._since = clock()

    def progress(self) -> None:
        """Something arrived: the backoff and the deadline start anew."""
        self._failures = self._rate_limits = 0
        self._since = self._clock()

    def excuse(self, seconds: float) -> None:
        """Time to be spent waiting at the ``Gate`` doesn't count. Raises RateLimited when it is too long."""
        if seconds > self._patience_s:
            raise limited("the upstream limits our rate", seconds)
        self._since += seconds

    def failed(self, error: Transient) -> float:
        """How long to wait before the next attempt, in seconds; raises Unavailable or DeadlineExceeded to give up."""
        if error.wait_s is not None:
            self._rate_limits += 1
            if error.wait_s > self._patience_s or self._rate_limits > MOST_RATE_LIMITS:
                raise limited(f"{error}: the upstream limits our rate", error.wait_s)
            wait = error.wait_s + self._jitter()
            self._since += wait
            return wait
        self._failures += 1
        delay = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** (self._failures - 1)) * (0.5 + self._jitter() / 2)
        if self._clock() + delay > self._since + self._stall_s:
            kind = DeadlineExceeded if error.timed_out else Unavailable
            raise kind(
                f"{error}; gave up after {self._clock() - self._since:.0f} s without progress",
                hint="Pull again when the upstream is well: what is here already is kept.",
            )
        return delay


def limited(what: str, wait_s: float) -> RateLimited:
    """The error for a rate limit that is not waited out."""
    error = RateLimited(
        f"{what} and asks to wait {wait_s:.0f} s",
        hint="Set HF_TOKEN for a higher limit, or try again later: what is here already is kept.",
    )
    error.retry_after_s = wait_s
    return error


class Gate:
    """One rate limit for all requests to an upstream: whoever hears of it makes everybody wait."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._opens = clock()

    def close_for(self, seconds: float) -> None:
        with self._lock:
            self._opens = max(self._opens, self._clock() + seconds)

    def left(self) -> float:
        """Seconds until requests may go out again."""
        with self._lock:
            return max(0.0, self._opens - self._clock())


def asked_wait(headers: Headers, now: float) -> float | None:
    """Seconds that a 429 asks to wait, or None: the Hub's ``RateLimit: "api";r=0;t=55``, else ``Retry-After``.

    ``RateLimit`` is draft-ietf-httpapi-ratelimit-headers-09; ``now`` is in seconds since 1970, for a Retry-After date.
    """
    found = _RATE_LIMIT.search(headers.get("ratelimit") or "")
    if found:
        return float(found[1])
    text = (headers.get("retry-after") or "").strip()
    if text.isdigit():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - now) if text else None
    except ValueError:
        return None
