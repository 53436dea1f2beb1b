"""Objects with one counter of versions and a log of changes, as etcd keeps them. Stored objects are never changed."""

from __future__ import annotations

import asyncio
import bisect
import marshal
from dataclasses import dataclass, field
from typing import Any

Manifest = dict[str, Any]
Place = tuple[str, str, str]
"""Resource (``pods``, ``deployments.apps``), namespace, name."""


@dataclass
class Change:
    version: int
    resource: str
    before: Manifest | None
    after: Manifest | None


@dataclass
class Store:
    version: int = 100
    compacted: int = 0
    objects: dict[Place, Manifest] = field(default_factory=dict)
    log: list[Change] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, resource: str, one: Manifest) -> Manifest:
        """Create or replace; the object as it is stored, with its version."""
        one = copied(one)
        place = place_of(resource, one)
        before = self.objects.pop(place, None)
        self.version += 1
        one["metadata"]["resourceVersion"] = str(self.version)
        self.objects[place] = one
        self._note(resource, before, one)
        return one

    def remove(self, place: Place) -> Manifest | None:
        """The object as it was, with the version of its deletion."""
        before = self.objects.pop(place, None)
        self.version += 1
        self._note(place[0], before, None)
        if before is None:
            return None
        return {**before, "metadata": {**before["metadata"], "resourceVersion": str(self.version)}}

    def _note(self, resource: str, before: Manifest | None, after: Manifest | None) -> None:
        self.log.append(Change(self.version, resource, before, after))
        self.wake()

    def since(self, version: int) -> list[Change]:
        """What came after a version."""
        return self.log[bisect.bisect_right(self.log, version, key=lambda one: one.version) :]

    def at(self, version: int) -> dict[Place, Manifest]:
        """All objects as they were then."""
        there = dict(self.objects)
        for change in reversed(self.since(version)):
            one = change.after or change.before
            if one is not None:
                there.pop(place_of(change.resource, one), None)
                if change.before is not None:
                    there[place_of(change.resource, change.before)] = change.before
        return there

    def compact(self) -> None:
        """Forget every version before the present one."""
        self.version += 1
        self.compacted, self.log = self.version, []

    def wake(self) -> None:
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()


def copied(one: Any) -> Any:
    """A copy of JSON, in a fraction of ``copy.deepcopy``'s time."""
    return marshal.loads(marshal.dumps(one))


def place_of(resource: str, one: Manifest) -> Place:
    return resource, one["metadata"].get("namespace", ""), one["metadata"]["name"]
