"""What is known of the cluster: the objects of some kinds, by name and by owner. No I/O.

Objects are JSON as it came, without ``managedFields``, which are most of an object's bytes and nobody's business here.
They are shared by all who read them and changed by nobody. What the operator itself has written is known at once from
the answer, and what a watch says of an earlier version of the same object is passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from helios.decoding import from_json
from helios.kube.kinds import Kind
from helios.kube.reflector import Reflector
from helios.kube.wire import Metadata
from orchestrator.actions import OWNER_LABEL, Manifest

Changed = Callable[[Kind, Manifest | None, Manifest | None], None]
"""Told of a change: the object before and after it."""
Trim = Callable[[Manifest], None]
"""Takes out of an object of some kind what nobody reads."""


class Live:
    """An object as it was seen; two of one uid and resource version are the same."""

    __slots__ = ("manifest", "metadata")

    def __init__(self, manifest: Manifest, metadata: Metadata) -> None:
        self.manifest, self.metadata = manifest, metadata

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Live):
            return NotImplemented
        ours, theirs = self.metadata, other.metadata
        return (ours.uid, ours.resource_version) == (theirs.uid, theirs.resource_version)

    __hash__ = None  # type: ignore[assignment]


def live(manifest: Manifest, kind: Kind, trim: Trim | None = None) -> Live:
    """An object of the API server, slimmed; raises msgspec.ValidationError for what has no metadata."""
    metadata = manifest.get("metadata")
    if not isinstance(metadata, dict):
        raise msgspec.ValidationError("an object has no metadata")
    metadata.pop("managedFields", None)
    # Lists leave both out of their items.
    manifest["apiVersion"], manifest["kind"] = kind.api_version, kind.kind
    if trim is not None:
        trim(manifest)
    identity = Metadata(
        name=str(metadata.get("name", "")), namespace=str(metadata.get("namespace", "")),
        uid=str(metadata.get("uid", "")), resource_version=str(metadata.get("resourceVersion", "")),
    )  # fmt: skip
    return Live(manifest, identity)


def owners(manifest: Manifest) -> list[str]:
    """Uids of who owns it: of its controlling owner reference, and in ``OWNER_LABEL``."""
    metadata = manifest["metadata"]
    found = [str(one.get("uid", "")) for one in metadata.get("ownerReferences") or () if one.get("controller")]
    label = (metadata.get("labels") or {}).get(OWNER_LABEL)
    return [uid for uid in (*found, label) if uid]


class Cache:
    """A ``View``. ``followed`` are for who keeps them as the server has them (``helios.kube.following``)."""

    def __init__(self, kinds: Iterable[Kind], changed: Changed, trims: Mapping[Kind, Trim] | None = None) -> None:
        self._changed = changed
        self._owned: dict[Kind, dict[str, set[tuple[str, str]]]] = {}
        self._names: dict[str, tuple[Kind, str, str]] = {}
        self._trims = trims or {}
        self.followed: dict[Kind, Reflector[Live]] = {}
        for kind in dict.fromkeys(kinds):
            self._owned[kind] = {}
            self.followed[kind] = self._reflector(kind)

    def _reflector(self, kind: Kind) -> Reflector[Live]:
        trim = self._trims.get(kind)

        def decode(content: Any) -> Live:
            return live(from_json(content, dict[str, Any]), kind, trim)

        return Reflector(decode, lambda before, after: self._tell(kind, before, after), newer=newer)

    @property
    def missing(self) -> list[Kind]:
        """Kinds that have not been listed yet."""
        return [kind for kind, known in self.followed.items() if not known.listed]

    def __len__(self) -> int:
        return sum(len(known.objects) for known in self.followed.values())

    # --- a View ---

    def get(self, kind: Kind, namespace: str, name: str) -> Manifest | None:
        found = self.followed[kind].objects.get((namespace, name))
        return None if found is None else found.manifest

    def all(self, kind: Kind, namespace: str | None = None) -> Iterator[Manifest]:
        for (place, _), one in self.followed[kind].objects.items():
            if namespace is None or place == namespace:
                yield one.manifest

    def owned(self, kind: Kind, uid: str) -> Sequence[Manifest]:
        known = self.followed[kind].objects
        return [known[key].manifest for key in sorted(self._owned[kind].get(uid, ()))]

    def served(self, kind: Kind) -> bool:
        known = self.followed[kind]
        return known.listed and bool(known.version)

    # --- for the runtime ---

    def by_uid(self, uid: str) -> tuple[Kind, str, str] | None:
        """Kind, namespace and name of the object with this uid."""
        return self._names.get(uid)

    def wrote(self, kind: Kind, manifest: Manifest) -> None:
        """The object as an answer to a write showed it."""
        if kind in self.followed:
            self.followed[kind].put(live(manifest, kind, self._trims.get(kind)))

    def deleted(self, kind: Kind, namespace: str, name: str, uid: str) -> None:
        """This object is gone for certain."""
        known = self.followed.get(kind)
        if known is not None and (found := known.objects.get((namespace, name))) and found.metadata.uid == uid:
            known.drop((namespace, name))

    def _tell(self, kind: Kind, before: Live | None, after: Live | None) -> None:
        if before is not None:
            self._index(kind, before, present=False)
        if after is not None:
            self._index(kind, after, present=True)
        self._changed(kind, None if before is None else before.manifest, None if after is None else after.manifest)

    def _index(self, kind: Kind, one: Live, *, present: bool) -> None:
        key, index = (one.metadata.namespace, one.metadata.name), self._owned[kind]
        if present:
            self._names[one.metadata.uid] = (kind, *key)
        else:
            self._names.pop(one.metadata.uid, None)
        for uid in owners(one.manifest):
            known = index.setdefault(uid, set())
            if present:
                known.add(key)
            else:
                known.discard(key)
                if not known:
                    del index[uid]


def newer(known: Live, coming: Live) -> bool:
    """Whether ``coming`` is not an earlier version of the same object. Versions are numbers that grow with each write
    (kubernetes.io/docs/reference/using-api/api-concepts, "Resource versions"); of what is none, nothing is known."""
    ours, theirs = known.metadata, coming.metadata
    if ours.uid != theirs.uid or not (ours.resource_version.isdigit() and theirs.resource_version.isdigit()):
        return True
    return int(theirs.resource_version) >= int(ours.resource_version)
