"""How actions are performed. What is so already costs nothing: in steady state nothing is written.

Conflicts of server-side apply are forced: the operator owns what its reconcilers apply, and nobody else is to. Never
forced is the creation of an object: one of this name that came meanwhile, and that no cache has shown yet, is somebody
else's until it is looked at. Every later apply names the uid of the object that was seen, so it can't hit another one.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from helios.errors import HeliosError
from helios.kube.following import why
from helios.kube.kinds import EVENT, Kind
from helios.metrics import OperatorMetrics
from orchestrator.actions import (
    OWNER_LABEL,
    Action,
    Apply,
    Delete,
    Emit,
    Manifest,
    PatchStatus,
    Ref,
    RemoveFinalizer,
    Scale,
    SetFinalizer,
)
from orchestrator.runtime.cache import Cache, owners
from orchestrator.runtime.drift import APPLIED, Repairs, digest, same, shown
from orchestrator.runtime.events import Create, Recorder
from orchestrator.runtime.refusals import CONFLICT, CONTESTED, NOT_OWNED, Failure, NotLeading, failure
from orchestrator.runtime.writes import FAILURES, Writer

log = logging.getLogger("helios.operator")

MOST: Final = 200_000
"""Last applies of objects and versions that are remembered; a forgotten one may cost a write that changes nothing."""


class Settled:
    """What the API server made of what was applied: object and part -> digests of what was wanted and of the answer.
    And which version of an object was found to be as is wanted, so that it is compared but once."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[Ref, str], tuple[str, str]] = OrderedDict()

    def put(self, ref: Ref, part: str, wanted: str, made: str) -> None:
        self._known[ref, part] = wanted, made
        self._known.move_to_end((ref, part))
        while len(self._known) > MOST:
            self._known.popitem(last=False)

    def is_so(self, ref: Ref, part: str, wanted: str, made: str) -> bool:
        return self._known.get((ref, part)) == (wanted, made)

    def looked(self, ref: Ref, wanted: str, found: Manifest) -> None:
        """This version of the object is as is wanted."""
        self.put(ref, "version", wanted, _version(found))

    def has_looked(self, ref: Ref, wanted: str, found: Manifest) -> bool:
        return self.is_so(ref, "version", wanted, _version(found))

    def forget(self, ref: Ref) -> None:
        for part in ("", "status", "version"):
            self._known.pop((ref, part), None)


def _version(found: Manifest) -> str:
    """The same only where nothing of the object has changed."""
    return f"{found['metadata']['uid']} {found['metadata'].get('resourceVersion', '')}"


class Performer:
    """Performs the actions of turns. Used on one event loop; two turns have different objects."""

    def __init__(
        self, cache: Cache, writer: Writer, recorder: Recorder, metrics: OperatorMetrics, clock: Callable[[], float]
    ) -> None:
        self._cache, self._writer, self._recorder, self._metrics = cache, writer, recorder, metrics
        self._settled, self._repairs = Settled(), Repairs(clock)

    async def perform(self, action: Action, subject: Ref) -> None:
        """One action of ``subject``'s turn. Raises Failure, NotLeading."""
        what = f"{type(action).__name__} of {subject if isinstance(action, Emit) else action.ref}"
        try:
            match action:
                case Apply():
                    await self._apply(action, subject)
                case Delete():
                    await self._delete(action, subject)
                case PatchStatus():
                    await self._status(action)
                case Scale():
                    await self._scale(action)
                case Emit():
                    await self._emit(action, action.regarding or subject)
                case SetFinalizer():
                    await self._finalizer(action.ref, action.name, present=True)
                case RemoveFinalizer():
                    if action.after is not None:
                        await self._none_left(action.ref, action.after)
                    await self._finalizer(action.ref, action.name, present=False)
        except (Failure, NotLeading):
            raise
        except FAILURES as error:
            raise failure(what, error) from None

    async def _apply(self, action: Apply, subject: Ref) -> None:
        kind, ref = action.kind, action.ref
        found = self._cache.get(kind, ref.namespace, ref.name)
        if subject.uid not in owners(action.manifest):
            raise Failure(f"{ref} is to be applied without an owner reference to {subject}", code=NOT_OWNED)
        if found is not None and subject.uid not in owners(found):
            raise Failure(
                f"there is a {ref} that is not {subject}'s", code=NOT_OWNED, hint="Remove or rename one of the two."
            )
        if found is not None and found["metadata"].get("deletionTimestamp"):
            raise Failure(f"{ref} is being deleted and can't be made anew before it is gone", code=CONFLICT)
        wanted = digest(action.manifest)
        if found is not None and self._settled.has_looked(ref, wanted, found):
            return
        if found is not None:
            made = shown(action.manifest, found)
            marked = (found["metadata"].get("annotations") or {}).get(APPLIED) == wanted
            if marked and (same(action.manifest, made) or self._settled.is_so(ref, "", wanted, digest(made))):
                self._settled.looked(ref, wanted, found)
                return
            if marked and (wait := self._repairs.wait_s(ref)):
                problem = Failure(f"somebody changes {ref} again and again; it is repaired later", code=CONTESTED)
                problem.retry_after_s = wait
                raise problem
            if marked:
                self._metrics.repairs.labels(kind.kind).inc()
                log.info("repairing what somebody has changed", extra={"object": str(ref)})
        manifest = _marked(action.manifest, wanted, "" if found is None else found["metadata"]["uid"])
        answer = await self._writer.apply(kind, manifest, force=found is not None)
        self._settled.put(ref, "", wanted, digest(shown(action.manifest, answer)))
        self._settled.looked(ref, wanted, answer)
        self._cache.wrote(kind, answer)

    async def _delete(self, action: Delete, subject: Ref) -> None:
        ref = action.ref
        found = self._cache.get(ref.kind, ref.namespace, ref.name)
        if found is None or found["metadata"]["uid"] != ref.uid or found["metadata"].get("deletionTimestamp"):
            return
        if subject.uid not in owners(found):
            raise Failure(f"{ref} is not {subject}'s and is not deleted", code=NOT_OWNED)
        try:
            answer = await self._writer.delete(ref.kind, ref.namespace, ref.name, ref.uid, action.resource_version)
        except HeliosError as error:
            if error.status != 404:
                raise
        else:
            if answer.get("kind") == ref.kind.kind:  # it waits for finalizers, or for its grace period
                self._cache.wrote(ref.kind, answer)
                return
        self._settled.forget(Ref(ref.kind, ref.namespace, ref.name))
        self._cache.deleted(ref.kind, ref.namespace, ref.name, ref.uid)

    async def _status(self, action: PatchStatus) -> None:
        ref, found = action.ref, self._seen(action.ref)
        if found is None:
            return
        wanted, before = digest(action.status), found.get("status") or {}
        if action.status == before or self._settled.is_so(ref, "status", wanted, digest(before)):
            return
        manifest: Manifest = {
            "apiVersion": ref.kind.api_version, "kind": ref.kind.kind,
            "metadata": _named(ref, found["metadata"]["uid"]), "status": action.status,
        }  # fmt: skip
        answer = await self._writer.apply(ref.kind, manifest, subresource="status")
        self._settled.put(ref, "status", wanted, digest(answer.get("status") or {}))
        self._cache.wrote(ref.kind, answer)

    async def _scale(self, action: Scale) -> None:
        ref, found = action.ref, self._seen(action.ref)
        if found is None or (found.get("spec") or {}).get("replicas") == action.replicas:
            return
        patch = {"spec": {"replicas": action.replicas}}
        await self._writer.merge(ref.kind, ref.namespace, ref.name, patch, subresource="scale")

    async def _none_left(self, owner: Ref, kind: Kind) -> None:
        """Raises Failure while there is something of the kind that nobody deletes yet; the cache knows it then."""
        found = await self._writer.labelled(kind, f"{OWNER_LABEL}={owner.uid}")
        there = [one for one in found if not one["metadata"].get("deletionTimestamp")]
        for one in there:
            self._cache.wrote(kind, one)
        if there:
            names = ", ".join(one["metadata"]["name"] for one in there)
            raise Failure(f"{kind.kind} {names} of {owner} goes first", code=CONFLICT)

    async def _finalizer(self, ref: Ref, name: str, *, present: bool) -> None:
        found = self._seen(ref)
        if found is None:
            return
        names = found["metadata"].get("finalizers") or []
        if (name in names) == present:
            return
        after = [*names, name] if present else [one for one in names if one != name]
        # The version: what others have added or removed meanwhile must not be lost.
        metadata = {"finalizers": after, "resourceVersion": found["metadata"]["resourceVersion"]}
        answer = await self._writer.merge(ref.kind, ref.namespace, ref.name, {"metadata": metadata})
        if answer["metadata"].get("deletionTimestamp") and not answer["metadata"].get("finalizers"):
            self._cache.deleted(ref.kind, ref.namespace, ref.name, found["metadata"]["uid"])
        else:
            self._cache.wrote(ref.kind, answer)

    async def _emit(self, action: Emit, regarding: Ref) -> None:
        """Telling people is worth a try, and never a turn's failure."""
        event = self._recorder.record(action, regarding)
        if event is None:
            return
        try:
            if isinstance(event, Create):
                await self._writer.create(EVENT, event.namespace, event.manifest)
            else:
                await self._writer.merge(EVENT, event.namespace, event.name, {"series": event.series})
        except NotLeading:
            raise
        except FAILURES as error:
            if not isinstance(event, Create):
                self._recorder.gone(event)
            log.warning("an event could not be told", extra={"object": str(regarding), "why": why(error)})

    def _seen(self, ref: Ref) -> Manifest | None:
        """The object as the caches have it; None if it is gone, or another one by now."""
        found = self._cache.get(ref.kind, ref.namespace, ref.name)
        return found if found is not None and ref.uid in ("", found["metadata"]["uid"]) else None


def _named(ref: Ref, uid: str) -> Manifest:
    found = {"name": ref.name, "uid": uid}
    return found | {"namespace": ref.namespace} if ref.namespace else found


def _marked(manifest: Manifest, wanted: str, uid: str) -> Manifest:
    """A copy with the annotation, for exactly the object with this uid if there is one."""
    metadata = dict(manifest["metadata"])
    metadata["annotations"] = {**(metadata.get("annotations") or {}), APPLIED: wanted}
    if uid:
        metadata["uid"] = uid
    return {**manifest, "metadata": metadata}
