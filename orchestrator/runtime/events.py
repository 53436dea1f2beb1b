"""Events for people (events.k8s.io/v1): repeated ones become a series, and nobody is flooded. No I/O.

As client-go's events recorder does it (tools/events): the first of a kind is an object of its own; the same again
within ``SERIES_S`` is counted, and the count is written with a patch of its ``series`` no more often than each
``PATCH_S``. Per object there are ``BURST`` new events, and one more each ``REFILL_S``.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from orchestrator.actions import MANAGER, Emit, Ref

SERIES_S: Final = 360.0
PATCH_S: Final = 60.0
BURST: Final = 10
REFILL_S: Final = 30.0
MOST: Final = 4096
"""Kinds of events, and objects, that are remembered."""
MAX_NOTE: Final = 1024
"""Longest text, in bytes, of an event's note."""


class Create(msgspec.Struct, frozen=True):
    namespace: str
    manifest: dict[str, Any]


class Count(msgspec.Struct, frozen=True):
    """The series of the event ``name``."""

    namespace: str
    name: str
    series: dict[str, Any]


@dataclass(slots=True)
class _Known:
    name: str
    last: float
    patched: float
    count: int = 1


@dataclass(slots=True)
class _Bucket:
    tokens: float
    filled: float


class Recorder:
    """Turns what is emitted into writes. Used on one event loop."""

    def __init__(self, instance: str, clock: Callable[[], float], wall: Callable[[], float]) -> None:
        """``instance``: which of the operator's processes; ``wall``: Unix seconds."""
        self._instance, self._clock, self._wall = instance, clock, wall
        self._known: OrderedDict[tuple[str, ...], _Known] = OrderedDict()
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def record(self, event: Emit, regarding: Ref) -> Create | Count | None:
        """The write that tells of it; None: it is counted, or one too many."""
        now = self._clock()
        key = (regarding.uid, regarding.name, event.type, event.reason, event.message)
        namespace = regarding.namespace or "default"  # where events of what lies in no namespace are
        known = self._known.get(key)
        if known is not None and now - known.last <= SERIES_S:
            known.count, known.last = known.count + 1, now
            if now - known.patched < PATCH_S:
                return None
            known.patched = now
            return Count(namespace, known.name, {"count": known.count, "lastObservedTime": self._time()})
        if not self._spend(f"{regarding.kind.resource}/{regarding}", now):
            return None
        name = f"{regarding.name[:200]}.{secrets.token_hex(8)}"
        self._known[key] = _Known(name, now, now)
        self._known.move_to_end(key)
        while len(self._known) > MOST:
            self._known.popitem(last=False)
        return Create(namespace, {
            "apiVersion": "events.k8s.io/v1", "kind": "Event", "metadata": {"name": name, "namespace": namespace},
            "eventTime": self._time(), "type": event.type, "reason": event.reason, "action": "Reconcile",
            "note": event.message.encode()[:MAX_NOTE].decode(errors="ignore"), "reportingController": MANAGER,
            "reportingInstance": self._instance[:128],
            "regarding": {
                "apiVersion": regarding.kind.api_version, "kind": regarding.kind.kind, "name": regarding.name,
                **({"namespace": regarding.namespace} if regarding.namespace else {}),
                **({"uid": regarding.uid} if regarding.uid else {}),
            },
        })  # fmt: skip

    def gone(self, event: Count) -> None:
        """The event of a series is not there any more: the next one is new."""
        for key in [key for key, known in self._known.items() if known.name == event.name]:
            del self._known[key]

    def _spend(self, who: str, now: float) -> bool:
        bucket = self._buckets.setdefault(who, _Bucket(BURST, now))
        self._buckets.move_to_end(who)
        while len(self._buckets) > MOST:
            self._buckets.popitem(last=False)
        bucket.tokens = min(BURST, bucket.tokens + (now - bucket.filled) / REFILL_S)
        bucket.filled = now
        if bucket.tokens < 1:
            return False
        bucket.tokens -= 1
        return True

    def _time(self) -> str:
        return datetime.fromtimestamp(self._wall(), UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
