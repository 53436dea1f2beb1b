"""What the administration sees of the workers, and may do with them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

from router.health import Health
from router.resilience.guard import Guard


class Seen(Protocol):
    """A worker, as ``router.workers.Worker`` is one."""

    @property
    def url(self) -> str: ...
    @property
    def models(self) -> Sequence[str]: ...
    @property
    def adapters(self) -> Collection[str]: ...
    @property
    def role(self) -> str: ...
    @property
    def revision(self) -> str: ...
    @property
    def weight(self) -> float: ...
    @property
    def health(self) -> Health: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def cordoned(self) -> bool: ...
    @property
    def unready(self) -> bool: ...
    @property
    def guard(self) -> Guard: ...


class Fleet(Protocol):
    """The workers, as ``router.workers.Workers`` keeps them."""

    @property
    def all(self) -> Collection[Seen]:
        """Those that sources name."""
        ...

    @property
    def draining(self) -> Collection[Seen]:
        """Those that no source names any more and that still have requests."""
        ...

    def cordon(self, url: str) -> None:
        """Give the worker no new requests; raises NotFound."""
        ...

    def uncordon(self, url: str) -> None: ...


def identity_of(url: str) -> str:
    """What a worker is called where it did not say itself: its URL without the scheme."""
    return url.partition("://")[2]


def described(worker: Seen, now: float, *, identity: str, lease_s: float | None, draining: bool) -> dict[str, Any]:
    """A worker as the administration shows it; ``now`` is on the clock of its health and its guard."""
    health, guard = worker.health, worker.guard
    left_s = guard.ejection.until - now if guard.ejected else 0.0
    return {
        "id": identity,
        "url": worker.url,
        "models": list(worker.models),
        "adapters": sorted(worker.adapters),
        "role": worker.role,
        "revision": worker.revision,
        "weight": worker.weight,
        "health": health.state.value,
        "reason": None if health.state.value == "up" else health.reason,
        "since_s": round(max(0.0, now - health.since), 3),
        "in_flight": worker.in_flight,
        "cordoned": worker.cordoned,
        "unready": worker.unready,
        "draining": draining,
        "breaker": guard.breaker.state.name.lower(),
        "ejected_s": round(left_s, 3) if left_s > 0 else None,
        "lease_s": None if lease_s is None else round(lease_s, 3),
    }
