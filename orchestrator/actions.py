"""What reconcilers see and what they answer: values that the runtime performs. No I/O, no clock.

A reconciler is two functions. ``observe`` collects what counts for one object from the caches; ``reconcile`` is pure
and says what is to be done, in which order. The runtime (``orchestrator.runtime``) calls both whenever something that
concerns the object has changed, again after failures, and at the latest after ``Outcome.requeue_after_s``. So a
reconciler says what should be, each time, all of it; what is so already costs no write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Literal, Protocol, TypeVar

import msgspec

from helios.kube.kinds import Kind

Manifest = dict[str, Any]
"""An object as JSON has it. What comes out of a cache is shared: nobody changes it."""

MANAGER: Final = "helios-operator"
"""The one field manager of server-side apply, and who reports events."""
OWNER_LABEL: Final = "helios.dev/owner-uid"
"""Label of an object that can't have an owner reference to its owner (another namespace, none at all): the owner's uid.
Who has it is owned like who has a controlling owner reference, but not collected: a finalizer's business."""


class Key(msgspec.Struct, frozen=True, order=True):
    """Whose turn it is: an object of the reconciler's kind. The namespace is empty for what lies in none."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}" if self.namespace else self.name


class Ref(msgspec.Struct, frozen=True):
    """One object; with a uid this one, and none that comes later under its name."""

    kind: Kind
    namespace: str
    name: str
    uid: str = ""

    def __str__(self) -> str:
        return f"{self.kind.kind} {Key(self.namespace, self.name)}"


def ref_of(kind: Kind, manifest: Mapping[str, Any]) -> Ref:
    """The reference of an object that has been read or made."""
    metadata = manifest["metadata"]
    return Ref(kind, metadata.get("namespace", ""), metadata["name"], metadata.get("uid", ""))


def owner_reference(owner: Ref) -> Manifest:
    """The controlling owner reference to ``owner``, for ``metadata.ownerReferences`` of what it owns."""
    return {
        "apiVersion": owner.kind.api_version, "kind": owner.kind.kind, "name": owner.name, "uid": owner.uid,
        "controller": True, "blockOwnerDeletion": True,
    }  # fmt: skip


# --- what is to be done ---


class Apply(msgspec.Struct, frozen=True):
    """Make the object have these fields, creating it if need be (server-side apply, conflicts forced).

    ``manifest``: apiVersion, kind, metadata (with the owner reference or ``OWNER_LABEL``) and every field that is
    Helios' to say, and no other: fields that were applied before and are not there any more are removed, those of
    others (an autoscaler's ``spec.replicas``) stay. No status. An object of this name that somebody else owns is not
    touched: that is a problem.
    """

    kind: Kind
    manifest: Manifest

    @property
    def ref(self) -> Ref:
        return ref_of(self.kind, self.manifest)


class Delete(msgspec.Struct, frozen=True):
    """Delete exactly what was seen: by uid and resource version. Refused where it is not owned by the reconciled
    object; well if it is gone already."""

    ref: Ref
    resource_version: str


class PatchStatus(msgspec.Struct, frozen=True):
    """Make the status of the object be this (server-side apply of the subresource). ``status`` is all of it that is
    Helios' to say, ``observedGeneration`` and conditions with their times included."""

    ref: Ref
    status: Manifest


class Scale(msgspec.Struct, frozen=True):
    """Set the number of replicas through the scale subresource, for who applies no ``spec.replicas``."""

    ref: Ref
    replicas: int


class Emit(msgspec.Struct, frozen=True):
    """Tell people (events.k8s.io/v1). The same again within minutes is one event with a count. ``reason`` is one word
    in CamelCase; ``regarding`` None: the reconciled object."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str
    regarding: Ref | None = None


class SetFinalizer(msgspec.Struct, frozen=True):
    """Nothing is deleted before this name is taken out; set it before anything is made that no one would collect."""

    ref: Ref
    name: str


class RemoveFinalizer(msgspec.Struct, frozen=True):
    """All is cleaned up: the object may go. ``after``: a kind of which it owns some by ``OWNER_LABEL``; the API server
    itself is asked for them, since one whose creation was not answered may not have been seen yet."""

    ref: Ref
    name: str
    after: Kind | None = None


Action = Apply | Delete | PatchStatus | Scale | Emit | SetFinalizer | RemoveFinalizer


class Outcome(msgspec.Struct, frozen=True):
    """What is to be done now, one after the other; the first that fails ends the turn (but statuses and events are told
    in any case), which begins again after a growing wait. ``requeue_after_s``: when to look again, in seconds, if
    nothing changes before; None: not before the next resync."""

    actions: Sequence[Action] = ()
    requeue_after_s: float | None = None


# --- what is seen ---


class Problem(msgspec.Struct, frozen=True):
    """An action that failed, for a condition. ``reason`` is one of QuotaExceeded, Forbidden, Invalid, Conflict,
    NotFound, NotOwned, Contested (somebody changes it again and again), TooManyRequests, Unavailable; ``since``: when
    it failed first, in Unix seconds."""

    ref: Ref
    reason: str
    message: str
    since: float


class View(Protocol):
    """The caches, as they are now. Answers are shared and not to be changed."""

    def get(self, kind: Kind, namespace: str, name: str) -> Manifest | None: ...

    def all(self, kind: Kind, namespace: str | None = None) -> Iterable[Manifest]:
        """Every object of a kind, in one namespace or in all."""
        ...

    def owned(self, kind: Kind, uid: str) -> Sequence[Manifest]:
        """The objects of a kind whose controlling owner reference or ``OWNER_LABEL`` has this uid, by name."""
        ...

    def served(self, kind: Kind) -> bool:
        """Whether the API server knows this kind: False where its definition (Istio's, say) is not installed."""
        ...


Observed = TypeVar("Observed")


class Reconciler(Protocol[Observed]):
    """What one kind of objects is turned into. ``observe`` and ``reconcile`` neither wait nor change anything."""

    kind: Kind
    """For whose objects there are turns."""
    owns: Sequence[Kind]
    """Kinds of what it makes: whatever happens to one of these objects is a turn for its owner."""
    maps: Mapping[Kind, Callable[[View, Manifest], Iterable[Key]]]
    """Other kinds that it reads, and whose turn it is when one of their objects has changed or gone."""

    def observe(self, view: View, key: Key, now: float, problems: Sequence[Problem]) -> Observed | None:
        """All that counts for this object at ``now`` (Unix seconds); None: it is gone, and there is nothing to do."""
        ...

    def reconcile(self, observed: Observed) -> Outcome: ...
