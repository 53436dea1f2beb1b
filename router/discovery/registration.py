"""Workers that register themselves, each under a lease.

A worker says who it is with one call (``PUT /workers/{id}`` of the administration) and says it again before its lease
ends: that is its heartbeat. Each call carries everything, so a router that was started anew knows its workers as soon
as each has called again. A lease that ends takes its worker out, which is then drained, as taking it back does.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import msgspec

from helios.config import Section, WorkerSettings
from helios.errors import Conflict, InvalidInput, NotFound, Unavailable, UsageError
from router.discovery.source import Found, Teller, checked_all

IDENTITY: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._:-]{0,126}[A-Za-z0-9])?\Z")
"""What a worker may call itself; a pod's name, or host and port."""
SAID: Final = ("url", "role", "revision", "weight", "kv_events", "kv_replay", "kv_ranks", "bootstrap")
"""What a registration says as the settings of a worker do."""
MOST: Final = 10_000
"""Workers that are registered at a time."""
MIN_LEASE_S: Final = 1.0
TAKEN_OVER_S: Final = 10.0
"""What a lease has at least when another process takes it over, in seconds."""


class Registration(Section, frozen=True):
    """What a worker says of itself."""

    url: str
    models: list[str]
    role: Literal["both", "prefill", "decode"] = "both"
    revision: str = ""
    weight: float = 1.0
    adapters: list[str] = msgspec.field(default_factory=list)
    kv_events: str = ""
    kv_replay: str = ""
    kv_ranks: int = 0
    bootstrap: str = ""
    lease_s: float = 30.0
    """How long it is believed; it should call again after a third of that."""

    def settings(self) -> tuple[WorkerSettings, ...]:
        """As the router's sources say it; raises InvalidInput."""
        if not self.models:
            raise InvalidInput("models is empty: a worker serves at least one")
        one = {name: getattr(self, name) for name in SAID}
        try:
            return checked_all(WorkerSettings(model=model, adapters=self.adapters, **one) for model in self.models)
        except UsageError as error:
            raise InvalidInput(error.message, hint=error.hint) from None


@dataclass(frozen=True, slots=True)
class Lease:
    """A registered worker, until ``ends`` on the clock."""

    workers: tuple[WorkerSettings, ...]
    ends: float

    @property
    def url(self) -> str:
        return self.workers[0].url


class Leases:
    """The registered workers by id. No I/O; ``clock`` gives seconds."""

    def __init__(self, max_lease_s: float, clock: Callable[[], float]) -> None:
        self._max_s, self._clock = max_lease_s, clock
        self._by_id: dict[str, Lease] = {}
        self._by_url: dict[str, str] = {}

    def put(self, identity: str, said: Registration) -> Lease:
        """A worker says what it is, for the first time or again.

        Raises InvalidInput, Conflict for an address that another one has, Unavailable beyond ``MOST``.
        """
        if not IDENTITY.match(identity):
            raise InvalidInput(f"{identity[:200]!r} is not a worker's id: use up to 128 of A-Z a-z 0-9 . _ : -")
        if not MIN_LEASE_S <= said.lease_s <= self._max_s:
            raise InvalidInput(f"lease_s is {said.lease_s:g}: it must be from {MIN_LEASE_S:g} to {self._max_s:g}")
        self.expire()
        lease = Lease(said.settings(), self._clock() + said.lease_s)
        holder = self._by_url.get(lease.url, identity)
        if holder != identity:
            raise Conflict(f"{lease.url} is registered as {holder!r}; that has to go first, or its lease to end")
        if identity not in self._by_id and len(self._by_id) >= MOST:
            raise Unavailable(f"{MOST} workers are registered, and no more are possible")
        self._forget(identity)
        self._by_id[identity], self._by_url[lease.url] = lease, identity
        return lease

    def remove(self, identity: str) -> None:
        """A worker says that it goes. Raises NotFound."""
        if not self._forget(identity):
            raise NotFound(f"no worker is registered as {identity[:200]!r}")

    def expire(self) -> list[str]:
        """Take those out whose lease has ended; returns who they were."""
        now = self._clock()
        ended = [identity for identity, lease in self._by_id.items() if lease.ends <= now]
        for identity in ended:
            self._forget(identity)
        return ended

    def _forget(self, identity: str) -> bool:
        lease = self._by_id.pop(identity, None)
        if lease is None:
            return False
        del self._by_url[lease.url]
        return True

    def of(self, url: str) -> tuple[str, float] | None:
        """Who is registered with the URL, and how many seconds are left of the lease."""
        identity = self._by_url.get(url)
        return None if identity is None else (identity, self._by_id[identity].ends - self._clock())

    def url_of(self, identity: str) -> str | None:
        lease = self._by_id.get(identity)
        return None if lease is None else lease.url

    def take_over(self, identity: str, lease: Lease | None) -> None:
        """What another process has granted, or ended. Who could not call meanwhile has some time to do so."""
        self._forget(identity)
        if lease is not None:
            ends = max(lease.ends, self._clock() + TAKEN_OVER_S)
            self._by_id[identity], self._by_url[lease.url] = Lease(lease.workers, ends), identity

    @property
    def next_end(self) -> float | None:
        """When the first lease ends."""
        return min((lease.ends for lease in self._by_id.values()), default=None)

    @property
    def found(self) -> Found:
        workers = (worker for lease in self._by_id.values() for worker in lease.workers)
        return Found(tuple(sorted(workers, key=lambda one: (one.url, one.model))))


class RegistrationSource:
    """The leases as a source: told within the call that changed them, and when one ends."""

    def __init__(self, max_lease_s: float, teller: Teller, *, clock: Callable[[], float] = time.monotonic) -> None:
        if max_lease_s < MIN_LEASE_S:
            raise UsageError(f"router.discovery.max_lease_s must be at least {MIN_LEASE_S:g}, not {max_lease_s:g}")
        self.leases = Leases(max_lease_s, clock)
        self._teller, self._clock = teller, clock
        self._changed = asyncio.Event()
        self._runs = False
        self.noted: Callable[[str, Lease | None], None] = lambda identity, lease: None
        """Hears of each lease as it is granted, and of its end (None), but not of those that are taken over."""

    def put(self, identity: str, said: Registration) -> Lease:
        """See ``Leases.put``."""
        self._expire()
        lease = self.leases.put(identity, said)
        self.noted(identity, lease)
        self._tell()
        return lease

    def remove(self, identity: str) -> None:
        """See ``Leases.remove``."""
        self.leases.remove(identity)
        self.noted(identity, None)
        self._tell()

    def take_over(self, identity: str, lease: Lease | None) -> None:
        """See ``Leases.take_over``. Before ``run`` nobody is told, as there may be thousands."""
        self.leases.take_over(identity, lease)
        if self._runs:
            self._tell()

    def _tell(self) -> None:
        self._teller.knows(self.leases.found)
        self._changed.set()

    def _expire(self) -> None:
        if ended := self.leases.expire():
            for identity in ended:
                self.noted(identity, None)
            self._teller.ended(ended)
            self._teller.knows(self.leases.found)

    async def run(self) -> None:
        """Take workers out when their leases end."""
        self._runs = True
        self._teller.knows(self.leases.found)
        while True:
            self._changed.clear()
            end = self.leases.next_end
            try:
                async with asyncio.timeout(None if end is None else max(0.0, end - self._clock())):
                    await self._changed.wait()
            except TimeoutError:
                self._expire()
