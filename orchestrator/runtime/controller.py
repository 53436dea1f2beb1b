"""Turns: whatever changes becomes keys, keys have turns, and a turn is observe, reconcile, perform."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from helios.kube.kinds import Kind
from helios.metrics import OperatorMetrics
from orchestrator.actions import OWNER_LABEL, Emit, Key, Manifest, PatchStatus, Problem, Reconciler, Ref, ref_of
from orchestrator.runtime.cache import Cache, Trim
from orchestrator.runtime.performing import Performer
from orchestrator.runtime.queue import Limits, Queue
from orchestrator.runtime.refusals import Failure, Kept, NotLeading

log = logging.getLogger("helios.operator")

TURN_S: Final = 120.0
"""Longest turn, in seconds; each of its calls has a shorter deadline."""
IDLE_S: Final = 30.0


class Turn(NamedTuple):
    """Whose turn: the object ``key`` of the reconciler at this place."""

    place: int
    key: Key


class Controller:
    """The reconcilers of one operator, their caches and their queue. Used on one event loop.

    Caches and queue go on whether this process leads or not; ``work`` is what only the leader does.
    """

    def __init__(
        self, reconcilers: Sequence[Reconciler[Any]], metrics: OperatorMetrics, clock: Callable[[], float],
        wall: Callable[[], float], *, limits: Limits | None = None, trims: Mapping[Kind, Trim] | None = None,
    ) -> None:  # fmt: skip
        """``clock``: seconds that only grow; ``wall``: Unix seconds."""
        self._reconcilers, self._metrics, self._wall = tuple(reconcilers), metrics, wall
        self.queue: Queue[Turn] = Queue(limits or Limits(), clock)
        kinds = [kind for each in reconcilers for kind in (each.kind, *each.owns, *each.maps)]
        self.cache = Cache(kinds, self._changed, trims)
        self._kept: dict[Turn, dict[Ref, Kept]] = {}
        self._woken = asyncio.Event()
        metrics.queued.set_function(lambda: len(self.queue))
        metrics.objects.set_function(lambda: len(self.cache))
        metrics.synced.set_function(lambda: not self.cache.missing)

    # --- whose turn it is ---

    def add(self, kind: Kind, key: Key, after_s: float = 0.0) -> None:
        """Something outside the cluster concerns the object ``key`` of this kind: a request waits for it, say."""
        for place, each in enumerate(self._reconcilers):
            if each.kind == kind:
                self._add(Turn(place, key), after_s)

    def add_all(self, spread_s: float = 0.0) -> None:
        """Every object has a turn, within so many seconds."""
        for place, each in enumerate(self._reconcilers):
            for one in self.cache.all(each.kind):
                self._add(Turn(place, _key(one)), spread_s * random.random())  # noqa: S311

    def _add(self, turn: Turn, after_s: float = 0.0) -> None:
        self.queue.add(turn, after_s)
        self._woken.set()

    def _changed(self, kind: Kind, before: Manifest | None, after: Manifest | None) -> None:
        for place, each in enumerate(self._reconcilers):
            for one in (before, after):
                if one is None:
                    continue
                if kind == each.kind:
                    self._add(Turn(place, _key(one)))
                if kind in each.owns:
                    for key in self._owners(each.kind, one):
                        self._add(Turn(place, key))
                if (mapped := each.maps.get(kind)) is not None:
                    for key in mapped(self.cache, one):
                        self._add(Turn(place, key))

    def _owners(self, kind: Kind, one: Manifest) -> Iterable[Key]:
        metadata = one["metadata"]
        for owner in metadata.get("ownerReferences") or ():
            group = str(owner.get("apiVersion", "")).rpartition("/")[0]
            if owner.get("controller") and (owner.get("kind"), group) == (kind.kind, kind.group):
                yield Key(metadata.get("namespace", "") if kind.namespaced else "", str(owner.get("name", "")))
        found = self.cache.by_uid((metadata.get("labels") or {}).get(OWNER_LABEL, ""))
        if found is not None and found[0] == kind:
            yield Key(*found[1:])

    def wake(self) -> None:
        """The caches may be whole now."""
        self._woken.set()

    # --- turns ---

    async def work(self, performer: Performer, *, workers: int) -> None:
        """Give turns, ``workers`` at a time, for ever; ends with NotLeading when this process leads no more."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(workers):
                    tasks.create_task(self._worker(performer))
        except* NotLeading as group:
            raise NotLeading(str(group.exceptions[0])) from None

    async def _worker(self, performer: Performer) -> None:
        while True:
            turn = self.queue.take() if not self.cache.missing else None
            if turn is None:
                wait = self.queue.wait_s()
                self._woken.clear()
                try:
                    async with asyncio.timeout(IDLE_S if wait is None else max(wait, 0.02)):
                        await self._woken.wait()
                except TimeoutError:
                    pass
                continue
            again_in_s, failed = None, True
            try:
                again_in_s, failed = await self._turn(turn, performer)
            finally:
                self.queue.done(turn, failed=failed, again_in_s=again_in_s)
                self._woken.set()

    async def _turn(self, turn: Turn, performer: Performer) -> tuple[float | None, bool]:
        """When the next is due at the latest, and whether this one failed."""
        kind = self._reconcilers[turn.place].kind.kind
        result = "broken"
        try:
            with self._metrics.turn_seconds.labels(kind).time():
                async with asyncio.timeout(TURN_S):
                    again_in_s, failed = await self._performed(turn, performer)
            result = "failed" if failed else "done"
            return again_in_s, failed
        except NotLeading:
            result = "deposed"
            raise
        except TimeoutError:
            log.error("a turn took too long", extra={"kind": kind, "object": str(turn.key)})
            return None, True
        except Exception:  # a fault of one reconciler, for one object: the others go on, and this one is tried again
            log.exception("a reconciler failed", extra={"kind": kind, "object": str(turn.key)})
            return None, True
        finally:
            self._metrics.turns.labels(kind, result).inc()

    async def _performed(self, turn: Turn, performer: Performer) -> tuple[float | None, bool]:
        each, key = self._reconcilers[turn.place], turn.key
        observed = each.observe(self.cache, key, self._wall(), self._problems(turn))
        found = self.cache.get(each.kind, key.namespace, key.name)
        if observed is None or found is None:
            self._kept.pop(turn, None)
            return None, False
        subject, kept = ref_of(each.kind, found), self._kept.get(turn, {})
        outcome = each.reconcile(observed)
        performed: list[Ref] = []
        for action in outcome.actions:
            try:
                await performer.perform(action, subject)
            except Failure as failure:
                for ref in performed:
                    kept.pop(ref, None)
                self._keep(turn, subject if isinstance(action, Emit) else action.ref, failure)
                await self._tell(turn, performer, subject)
                return failure.retry_after_s, True
            if not isinstance(action, Emit):
                performed.append(action.ref)
        if kept:  # what failed went well this time: it is no problem any more, which may change the status
            del self._kept[turn]
            if any(one.told for one in kept.values()):
                return 0.0, False
        return outcome.requeue_after_s, False

    async def _tell(self, turn: Turn, performer: Performer, subject: Ref) -> None:
        """After a failure: statuses and events as they are with it. What fails here has been tried, and comes again."""
        each = self._reconcilers[turn.place]
        observed = each.observe(self.cache, turn.key, self._wall(), self._problems(turn))
        if observed is None:
            return
        for action in each.reconcile(observed).actions:
            if isinstance(action, PatchStatus | Emit):
                try:
                    await performer.perform(action, subject)
                except Failure as failure:
                    log.warning("a status could not be told", extra={"object": str(subject), "why": failure.message})
                    return

    def _keep(self, turn: Turn, ref: Ref, failure: Failure) -> None:
        kept = self._kept.setdefault(turn, {})
        before = kept.get(ref)
        same = before is not None and before.reason == failure.code
        since, times = (before.since, before.times + 1) if before is not None and same else (self._wall(), 1)
        kept[ref] = Kept(failure.code, failure.message, since, times)
        kind = self._reconcilers[turn.place].kind.kind
        self._metrics.failures.labels(kind, failure.code).inc()
        if before is None or not same:
            extra = {"kind": kind, "object": str(turn.key), "reason": failure.code, "why": failure.message}
            log.warning("an action failed; it is tried again", extra=extra)

    def _problems(self, turn: Turn) -> list[Problem]:
        kept = self._kept.get(turn, {})
        return [Problem(ref, one.reason, one.message, one.since) for ref, one in kept.items() if one.told]


def _key(one: Manifest) -> Key:
    metadata = one["metadata"]
    return Key(metadata.get("namespace", ""), metadata["name"])
