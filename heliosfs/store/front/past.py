"""What is done in the cloud while the front's disk can't be told, or nobody knows what that says.

The disk may come at any moment in between, with what waited on it. Whoever begins something has the key's turn in the
cloud until the end, so nothing of that is done meanwhile; what was begun is noted before the disk is taken, or its
disk was known. At the end the cloud is right, and what the disk brought is crossed off.
"""

from __future__ import annotations

from collections.abc import Callable

from helios.errors import Unavailable
from heliosfs.store.front.near import Near
from heliosfs.store.front.waiting import Item


class Past:
    """What goes past the front. The caller has the key's turn in the cloud throughout."""

    def __init__(self, near: Near) -> None:
        self._near = near

    def begin(self, key: str) -> bool:
        """Something is about to be done with the key; whether nobody knows what the disk says of it."""
        near = self._near
        with near.journal:
            if near.disk is not None:
                return False
            near.miss(key, sure=False)
            return True

    def put(self, key: str, item: Item | None, unknown: bool) -> None:
        """The cloud has the object. ``unknown``: what ``begin`` said; ``item``: what waited then. The caller has the
        key's turn in the front, too."""
        near = self._near
        with near.journal:
            if near.disk is None:
                near.miss(key, sure=True)
                return
        found = near.item(key)
        if found is not None and (found is item or (unknown and found.loaded)):
            near.forget(key)
            if near.item(key) is found:
                raise Unavailable("the store is closed")  # and the next process does what waits

    def remove(self, key: str, remove: Callable[[], None]) -> None:
        """Remove the object, from the cloud by ``remove``. The caller has the key's turn in the front, too."""
        near = self._near
        if not self.begin(key):
            if near.item(key) is None:
                # First here: what is here and clean is in the cloud, whatever happens in between.
                near.remove(key)
            else:
                near.missed(key)
        remove()
        with near.journal:
            known = near.item(key) is not None or near.has(key)
            if known or near.disk is None or near.has_missed(key):
                near.miss(key, sure=True)
        if known:
            near.dropped(key)
            near.forget(key)
