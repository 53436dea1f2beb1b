"""Who leads: the rules of an election by a Lease (coordination.k8s.io/v1). No I/O; the clock is given.

As client-go's leaderelection: nobody compares clocks. A candidate takes the lease over when it has *seen* no change of
the record for as long as the record's duration, by its own clock from when it saw the last change. The leader counts
from when its last successful write *began*: whoever else has seen that write has seen it later. It stops acting
``renew_s`` after that, which is earlier than anybody may follow by ``lease_s - renew_s``, and no write of its is given
longer than what is left of ``renew_s``. So two act at the same time only if their clocks differ in rate by more than
``lease_s / renew_s``, or if the API server performs a request after its sender gave it up (docs/concurrency.md).

Every write of the record is a compare-and-swap on its resource version, or its creation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import msgspec

from helios.errors import UsageError

MAX_DURATION_S = 3600.0
"""A record that says more is taken to say this, in seconds."""


class Times(msgspec.Struct, frozen=True):
    """In seconds."""

    lease_s: float = 15.0
    """How long others leave a record alone that they see unchanged."""
    renew_s: float = 10.0
    """How long the leader acts after its last renewal began."""
    retry_s: float = 2.0
    """Pause between renewals, and between looks of who does not lead."""

    def check(self) -> None:
        """Raise UsageError for times that can't work."""
        if not 0 < 2 * self.retry_s < self.renew_s < self.lease_s:
            raise UsageError(
                f"the lease's times can't work: retry {self.retry_s:g} s, renew {self.renew_s:g} s, "
                f"lease {self.lease_s:g} s",
                hint="They need 2 x retry < renew < lease.",
            )


class Record(msgspec.Struct, frozen=True):
    """What counts of a Lease."""

    version: str
    holder: str
    duration_s: float
    renewed: str
    transitions: int
    acquired: str = ""


def record_of(lease: dict[str, Any]) -> Record:
    """The record of a Lease as the API server shows it; what is missing or makes no sense is taken for nothing."""
    spec = lease.get("spec") or {}
    duration, transitions = spec.get("leaseDurationSeconds"), spec.get("leaseTransitions")
    return Record(
        version=str((lease.get("metadata") or {}).get("resourceVersion", "")),
        holder=str(spec.get("holderIdentity") or ""),
        duration_s=min(float(duration), MAX_DURATION_S) if isinstance(duration, int) and duration > 0 else 0.0,
        renewed=str(spec.get("renewTime") or ""),
        transitions=transitions if isinstance(transitions, int) else 0,
        acquired=str(spec.get("acquireTime") or ""),
    )


class Claim(msgspec.Struct, frozen=True):
    """A write of the record: create it (``version`` empty), or replace what has this version."""

    version: str
    spec: dict[str, Any]
    began: float


class Election:
    """One candidate's view. ``identity`` is its own alone: a process that starts anew has another one."""

    def __init__(
        self, identity: str, times: Times, clock: Callable[[], float], wall: Callable[[], float]
    ) -> None:  # fmt: skip
        """``clock``: seconds that only grow; ``wall``: Unix seconds, only shown."""
        times.check()
        self._identity, self._times, self._clock, self._wall = identity, times, clock, wall
        self._record: Record | None = None
        self._seen_at = clock()
        self._deleted: Record | None = None
        """The record that was deleted under its holder, who may not know yet."""
        self._until: float | None = None

    @property
    def holder(self) -> str:
        """Who leads, as far as is known; empty: nobody."""
        return "" if self._record is None else self._record.holder

    def remaining_s(self) -> float:
        """For how long it may act from now on, in seconds; 0: not at all."""
        return 0.0 if self._until is None else max(0.0, self._until - self._clock())

    def saw(self, lease: dict[str, Any] | None) -> None:
        """The record as it was read; None: there is none."""
        found = None if lease is None else record_of(lease)
        if found != self._record:
            if found is None and self._record is not None and self._record.holder != self._identity:
                self._deleted = self._record
            self._record, self._seen_at = found, self._clock()
        if found is None or found.holder != self._identity:
            self._until = None  # somebody else's: whatever is left of ours counts no more

    def claim(self) -> Claim | None:
        """The write that is to be tried now; None: somebody else leads."""
        now, record = self._clock(), self._record
        if record is None:
            waits = self._deleted is not None and self._deleted.holder and not self._over(self._deleted, now)
            return None if waits else Claim("", self._spec(0, None), now)
        if record.holder == self._identity:
            return Claim(record.version, self._spec(record.transitions, record.acquired or None), now)
        if not record.holder or self._over(record, now):
            return Claim(record.version, self._spec(record.transitions + 1, None), now)
        return None

    def _over(self, record: Record, now: float) -> bool:
        """Whether its holder has certainly stopped, if this was seen last."""
        return now >= self._seen_at + max(record.duration_s, self._times.lease_s)

    def won(self, claim: Claim, lease: dict[str, Any]) -> None:
        """The claim was written, and this is the record now."""
        self._record, self._seen_at, self._deleted = record_of(lease), self._clock(), None
        self._until = claim.began + self._times.renew_s

    def release(self) -> Claim | None:
        """The write with which others need not wait, once nothing acts any more; None: there is nothing to release."""
        record = self._record
        held = record is not None and record.holder == self._identity
        self._until = None
        if record is None or not held:
            return None
        spec = self._spec(record.transitions, record.acquired or None) | {
            "holderIdentity": "",
            "leaseDurationSeconds": 1,
        }
        return Claim(record.version, spec, self._clock())

    def _spec(self, transitions: int, acquired: str | None) -> dict[str, Any]:
        now = datetime.fromtimestamp(self._wall(), UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return {
            "holderIdentity": self._identity, "leaseDurationSeconds": max(1, math.ceil(self._times.lease_s)),
            "acquireTime": acquired or now, "renewTime": now, "leaseTransitions": transitions,
        }  # fmt: skip
