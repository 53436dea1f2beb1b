"""A worker says at its routers that it is there, again before its lease ends, and takes that back when it goes
(docs/router-discovery.md, "Registration").

``Leases`` decides what is to be said to whom and when, without I/O; ``Registrar`` says it. What a router holds is in
its memory alone, so each gets it: of a name with several addresses (a headless Service) every one, and they are looked
up again and again.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import Any, Final, NamedTuple
from urllib.parse import quote, urlsplit

from helios.errors import DeadlineExceeded, HeliosError, NotFound, UsageError
from helios.http.client import HttpClient
from helios.http.hosts import bracketed
from helios.tokens import Token

log = logging.getLogger("helios.worker")

PACE: Final = 3
"""A lease is renewed so many times while it lasts."""
FIRST_S: Final = 0.5
"""Pause after a call that failed, in seconds; it doubles up to the pace of renewals."""
ANSWER_S: Final = 3.0
"""Longest wait for a router, in seconds."""
LOOK_S: Final = 0.1
AT_ONCE: Final = 8
"""Routers that are told at the same time."""
CLOSE_S: Final = 10.0


class Heard(Enum):
    """What became of a call."""

    YES = "yes"
    NO = "no"
    """It was refused, or the router could not be reached."""
    PERHAPS = "perhaps"
    """No answer came."""


class Call(NamedTuple):
    """Something to be said to a router: that the worker is there, or (``there`` is false) that it goes."""

    router: str
    there: bool


@dataclass(slots=True)
class _Router:
    held: bool = False
    """It has the registration, or may: of a call that had no answer nobody knows whether it arrived."""
    due_at: float = 0.0
    pause_s: float = FIRST_S


class Leases:
    """What routers know. All times in seconds of one clock."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._routers: dict[str, _Router] = {}
        self._there = False

    def names(self, routers: Collection[str]) -> None:
        """Which routers there are now. One that is no more is forgotten: its lease ends by itself."""
        self._routers = {router: self._routers.get(router, _Router()) for router in sorted(routers)}

    def want(self, there: bool) -> None:
        """Whether the worker is to be registered; a change is said at once."""
        if there is not self._there:
            self._there = there
            for one in self._routers.values():
                one.due_at, one.pause_s = 0.0, FIRST_S

    def due(self, now: float) -> list[Call]:
        """What has to be said now."""
        return [
            Call(router, self._there)
            for router, one in self._routers.items()
            if one.due_at <= now and (self._there or one.held)
        ]

    def said(self, call: Call, heard: Heard, now: float) -> None:
        """The call was made."""
        one = self._routers.get(call.router)
        if one is None:
            return
        ok = heard is Heard.YES
        if call.there:
            one.held = one.held or heard is not Heard.NO
        elif ok:
            one.held = False
        if call.there is not self._there:
            return  # the opposite is wanted meanwhile, and due
        renew_s = self._lease_s / PACE
        one.due_at = now + (renew_s if ok else min(one.pause_s, renew_s))
        one.pause_s = FIRST_S if ok else 2 * one.pause_s

    @property
    def held(self) -> int:
        """Routers that may send requests here because they were told to."""
        return sum(one.held for one in self._routers.values())

    @property
    def next_due(self) -> float | None:
        """When there is something to say next; None: not before something changes."""
        return min((one.due_at for one in self._routers.values() if self._there or one.held), default=None)


def addresses(url: str) -> list[str]:
    """The base URLs of all addresses that the host of a URL has. Raises OSError for one that has none."""
    parts = urlsplit(url)
    found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
    hosts = dict.fromkeys(str(address[0]) for _, _, _, _, address in found)
    return [f"http://{bracketed(host)}:{parts.port or 80}{parts.path.rstrip('/')}" for host in hosts]


def checked(urls: Sequence[str]) -> None:
    """Raises UsageError for what is no URL of an administration."""
    for url in urls:
        parts = urlsplit(url)
        try:
            good = parts.scheme == "http" and bool(parts.hostname) and parts.port != 0
        except ValueError:
            good = False
        if not good or parts.query or parts.fragment:
            raise UsageError(
                f"{url!r} in worker.routers is no address of a router's administration",
                hint="Write http://HOST:8481, the port that router.admin_port says.",
            )


class Registrar:
    """A context: keeps the registration at all routers while it is wanted, in a thread of its own."""

    def __init__(
        self, urls: Sequence[str], token: Token, identity: str, body: Mapping[str, Any], lease_s: float,
        failed: Callable[[], None] = lambda: None, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """``body``: what is said of the worker, but for the lease; ``failed`` hears of every call that does."""
        self._urls, self._token, self._failed, self._clock = urls, token, failed, clock
        self._path = f"/workers/{quote(identity, safe='')}"
        self._body = {**body, "lease_s": lease_s}
        self._leases = Leases(lease_s)
        self._looked_up_at: float | None = None
        self._refresh_s = lease_s / PACE
        self._known: dict[str, list[str]] = {}
        self._told: dict[str, str] = {}
        self._wanted = False
        self._lock = threading.Lock()
        """Over what is wanted and ``held``."""
        self._ending = threading.Event()
        self._changed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="registrations", daemon=True)
        self.held = 0
        """Routers that have the registration, or may."""

    def __enter__(self) -> Registrar:
        if self._urls:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._ending.set()
        self._changed.set()
        if self._urls:
            self._thread.join(CLOSE_S)

    def want(self, there: bool) -> None:
        """Whether it is to be registered."""
        with self._lock:
            if there is not self._wanted:
                self._wanted = there
                self._changed.set()

    @property
    def withdrawn(self) -> bool:
        """Whether no router has it, for all that is known."""
        with self._lock:
            return not self._urls or not (self._wanted or self.held)

    def _run(self) -> None:
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="registration") as threads:
            while not self._ending.is_set():
                if self._wanted:
                    self._look_up()
                with self._lock:
                    self._changed.clear()
                    self._leases.want(self._wanted)
                    calls = self._leases.due(self._clock())
                    # From now on these may have it.
                    self.held = max(self._leases.held, sum(call.there for call in calls))
                for call, heard in zip(calls, threads.map(self._say, calls), strict=True):
                    self._leases.said(call, heard, self._clock())
                with self._lock:
                    self.held = self._leases.held
                self._changed.wait(self._pause_s())

    def _pause_s(self) -> float | None:
        due = self._leases.next_due
        if due is None and not self._wanted:
            return None
        return min(self._refresh_s, max(LOOK_S, (due or 0.0) - self._clock()))

    def _look_up(self) -> None:
        now = self._clock()
        if self._looked_up_at is not None and now - self._looked_up_at < self._refresh_s:
            return
        self._looked_up_at = now
        for url in self._urls:
            try:
                self._known[url] = addresses(url)
                self._told.pop(url, None)
            except OSError as error:  # those that are known stay
                self._tell(url, f"it can't be looked up: {error.strerror}")
        self._leases.names({address for found in self._known.values() for address in found})

    def _say(self, call: Call) -> Heard:
        client = HttpClient(call.router, timeout_s=ANSWER_S, max_idle=0, token=self._token)
        try:
            if call.there:
                client.json("PUT", self._path, body=self._body)
            else:
                client.json("DELETE", self._path)
        except NotFound as error:
            if call.there:
                self._tell(call.router, error.message)
                return Heard.NO
            return Heard.YES  # its lease had ended, or it was started anew
        except DeadlineExceeded as error:
            self._tell(call.router, error.message)
            return Heard.PERHAPS
        except HeliosError as error:
            self._tell(call.router, error.message)
            return Heard.NO
        except ValueError as error:
            self._tell(call.router, f"it answers no JSON: {error}")
            return Heard.NO
        finally:
            client.close()
        if self._told.pop(call.router, None) is not None:
            log.info("a router hears of this worker again", extra={"router": call.router})
        return Heard.YES

    def _tell(self, router: str, reason: str) -> None:
        """Once for each reason: what fails is tried again soon."""
        self._failed()
        if self._told.get(router) != reason:
            self._told[router] = reason
            log.warning("a router can't be told of this worker", extra={"router": router, "reason": reason})
