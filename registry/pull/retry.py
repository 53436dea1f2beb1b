"""When to try again, without I/O: exponential backoff, a deadline without progress, and the upstream's own wishes."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Final, Literal, Protocol

from helios.errors import DeadlineExceeded, RateLimited, Unavailable

FIRST_DELAY_S: Final = 0.5
LONGEST_DELAY_S: Final = 20.0
LONGEST_RATE_LIMIT_S: Final = 900.0
"""The Hub's windows are 300 s; an upstream that asks for more than this is reported, not waited for."""
MOST_RATE_LIMITS: Final = 8
"""So many 429s in a row, each waited out, and it is not going to end."""

LONGEST_HEADER: Final = 2000
"""So much of a RateLimit header is read, in characters."""

Bucket = Literal["api", "files"]
"""What an upstream counts by itself: the Hub's ``api`` and ``resolvers``."""
BUCKETS: Final[tuple[Bucket, ...]] = ("api", "files")

_TEXT = r'"(?:[^"\\]|\\.)*"'
_ITEM, _PART = re.compile(rf'(?:[^,"]|{_TEXT})+'), re.compile(rf'(?:[^;"]|{_TEXT})+')
_NUMBER = re.compile(r"\s*([a-z]+)\s*=\s*(\d{1,9})\s*\Z")


class Headers(Protocol):
    """Looked up without regard to case."""

    def get(self, name: str, /) -> str | None: ...


class Transient(Exception):
    """A failure that may pass: a status 5xx, a broken connection, a rate limit (``wait_s``: how long it lasts)."""

    def __init__(
        self,
        message: str,
        *,
        wait_s: float | None = None,
        timed_out: bool = False,
        quota: tuple[int, int] | None = None,
    ) -> None:
        """``quota``: the rate limit, so many requests in so many seconds."""
        super().__init__(message)
        self.wait_s, self.timed_out, self.quota = wait_s, timed_out, quota


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

    def excuse(self, seconds: float, slept: float | None = None) -> None:
        """Time to be spent waiting at the ``Gate`` doesn't count. Raises RateLimited when it is too long.

        ``slept`` is how much of it is spent before this is called again, None: all.
        """
        if seconds > self._patience_s:
            raise limited("the upstream limits our rate", seconds)
        self._since += seconds if slept is None else slept

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
    """The rate limits of an upstream, for all requests to it: whoever hears of one makes everybody wait."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._opens: dict[Bucket, float] = dict.fromkeys(BUCKETS, clock())
        self.quota: tuple[int, int] | None = None
        """The limit, as the upstream told it last: so many requests in so many seconds."""

    def close_for(
        self, seconds: float, quota: tuple[int, int] | None = None, buckets: Sequence[Bucket] = BUCKETS
    ) -> None:
        with self._lock:
            for bucket in buckets:
                self._opens[bucket] = max(self._opens[bucket], self._clock() + seconds)
            self.quota = quota

    def heed(self, headers: Headers, bucket: Bucket) -> None:
        """An answer has come to a request of a bucket: where it was the last that the limit allows, the next one waits
        until there are new ones. An upstream that says more than is waited for is asked again then, all the same."""
        limits = [limit for limit in _limits(headers) if limit.numbers["r"] == 0]
        if limits:
            seconds = max(limit.numbers["t"] for limit in limits)
            self.close_for(min(seconds, LONGEST_RATE_LIMIT_S), asked_quota(headers), [bucket])

    def left(self, bucket: Bucket = "files") -> float:
        """Seconds until requests of a bucket may go out again."""
        with self._lock:
            return max(0.0, self._opens[bucket] - self._clock())


@dataclass(frozen=True, slots=True)
class _Item:
    """An item of a RateLimit header: texts, such as its name, and parameters that are whole numbers."""

    texts: tuple[str, ...]
    numbers: dict[str, int]


def _items(header: str | None) -> list[_Item]:
    out = []
    for item in _ITEM.findall((header or "")[:LONGEST_HEADER]):
        parts = [part.strip() for part in _PART.findall(item)]
        numbers = {found[1]: int(found[2]) for part in parts if (found := _NUMBER.match(part))}
        out.append(_Item(tuple(part for part in parts if part.startswith('"')), numbers))
    return out


def _limits(headers: Headers) -> list[_Item]:
    """What is left of each limit, and in how many seconds there is more. One that doesn't say what is left is over."""
    items = [item for item in _items(headers.get("ratelimit")) if "t" in item.numbers]
    return [_Item(item.texts, {"r": 0, **item.numbers}) for item in items]


def asked_quota(headers: Headers) -> tuple[int, int] | None:
    """Requests and seconds of ``RateLimit-Policy: "fixed window";"api";q=500;w=300``, or None.

    Of several policies that of the limit which is over for the longest.
    """
    over = [limit for limit in _limits(headers) if limit.numbers["r"] == 0]
    names = max(over, key=lambda limit: limit.numbers["t"]).texts if over else ()
    policies = [item for item in _items(headers.get("ratelimit-policy")) if item.numbers.keys() >= {"q", "w"}]
    policies.sort(key=lambda item: not set(names) & set(item.texts))
    return (policies[0].numbers["q"], policies[0].numbers["w"]) if policies else None


def asked_wait(headers: Headers, now: float) -> float | None:
    """Seconds that a 429 asks to wait, or None: the Hub's ``RateLimit: "api";r=0;t=55``, else ``Retry-After``.

    ``RateLimit`` is draft-ietf-httpapi-ratelimit-headers-09; of several limits those count that are over, and of them
    the longest. ``now`` is in seconds since 1970, for a Retry-After date.
    """
    if limits := _limits(headers):
        over = [limit for limit in limits if limit.numbers["r"] == 0] or limits
        return float(max(limit.numbers["t"] for limit in over))
    text = (headers.get("retry-after") or "").strip()
    if text.isdigit():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - now) if text else None
    except ValueError:
        return None
