"""What the cloud has, past the front: for who looks whether that is whole.

What waits in the front counts as it lies there. An object that the cloud has lost, or has other than it was, comes back
from the front where that has it right: as one that waits to be uploaded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

from helios.errors import IntegrityError, NotFound
from heliosfs.store.front.near import Near
from heliosfs.store.front.waiting import Op
from heliosfs.store.objects import Good, ObjectInfo, ObjectStore
from heliosfs.store.selfcheck import check_content

log = logging.getLogger("helios.store")

T = TypeVar("T")


class Lasting:
    """An ``ObjectStore`` beside a ``FrontStore``, which does all that is not looking."""

    def __init__(self, front: ObjectStore, near: Near, cloud: ObjectStore) -> None:
        self._front, self._near, self._cloud = front, near, cloud

    def info(self, key: str) -> ObjectInfo:
        return self._look(key, lambda store: store.info(key))

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        self._look(key, lambda store: store.read_into(key, offset, buffer))

    def _look(self, key: str, act: Callable[[ObjectStore], T]) -> T:
        if self._near.item(key) is not None:
            return act(self._front)
        try:
            return act(self._cloud)
        except NotFound:
            if not self._again(key):
                raise
        return act(self._front)

    def heal(self, key: str, offset: int, length: int, good: Good) -> bool:
        """Raises nothing for an object that is nowhere."""
        if self._near.item(key) is not None:
            return self._front.heal(key, offset, length, good)
        return self._cloud.heal(key, offset, length, good) or self._again(key)

    def _again(self, key: str) -> bool:
        """Have the object uploaded again; False where the front does not have it as its key says."""
        near, store = self._near, self._near.store
        if store is None or not near.has(key):
            return False
        with near.turn(key):
            if near.item(key) is not None:
                return True
            try:
                check_content(key, store.root / key)
            except (IntegrityError, OSError):
                return False
            entry = near.popular.entries.get(key)
            if entry is None or near.writable() is None or near.remember(key, Op.REPLACE) is None:
                return False
            near.put(key, entry.size, lambda _store: None, held=True)
        log.error(
            "the cloud lost an object or has it wrong; it is uploaded again from the front", extra={"object": key}
        )
        return True

    # --- what the front does ---

    def put_file(self, key: str, path: Path) -> None:
        self._front.put_file(key, path)

    def put_bytes(self, key: str, data: bytes) -> None:
        self._front.put_bytes(key, data)

    def open_local(self, key: str) -> BinaryIO | None:
        return None

    def signed_urls(self, keys: Sequence[str], expires_s: float) -> Sequence[str | None] | None:
        return self._front.signed_urls(keys, expires_s)

    def near(self, key: str) -> bool:
        return False

    def waits(self, key: str) -> bool:
        return self._front.waits(key)

    @property
    def local(self) -> None:
        return None

    @property
    def lasting(self) -> ObjectStore:
        return self

    def delete(self, key: str) -> None:
        self._front.delete(key)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return self._front.list(prefix)

    def staging(self) -> Path:
        return self._front.staging()

    def check(self) -> None:
        self._front.check()

    def problems(self) -> Sequence[str]:
        return self._front.problems()

    def tidy(self) -> int:
        return self._front.tidy()

    def close(self) -> None:
        """Nothing: the front is closed by whoever has it."""

    def describe(self) -> str:
        return self._cloud.describe()
