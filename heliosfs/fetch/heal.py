"""What turned out to be wrong on the disk, or can't be read there any more, is fetched again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from heliosfs.fetch.blob import Blob, Blobs
from heliosfs.fetch.engine import Engine
from heliosfs.fetch.settle import Settler
from heliosfs.fetch.source import BlobRef
from heliosfs.store.recipe import Recipe
from heliosfs.tiers.tiers import Tiers

log = logging.getLogger("heliosfs.fetch")


class Healer:
    """Heals the open blobs ``blobs``. All methods run on the trio loop."""

    def __init__(
        self,
        blobs: Blobs,
        engine: Engine,
        settler: Settler,
        room: Tiers,
        *,
        new_key: Callable[[BlobRef], str],
        begin_fill: Callable[[Blob], None],
    ) -> None:
        self._blobs, self._engine, self._settler, self._room = blobs, engine, settler, room
        self._new_key, self._begin_fill = new_key, begin_fill
        self._healed: set[str] = set()

    def chunks_here(self, sha256: str) -> tuple[Recipe, list[int]] | None:
        """Of a partial blob that is open or filled: its recipe and the chunks that count as being here."""
        blob = self._blobs.proved(sha256)
        if blob is None or not blob.planned or blob.recipe is None:
            return None
        return blob.recipe, [index for index in range(len(blob.recipe)) if self._engine.have(blob, index)]

    async def gone_wrong(self, sha256: str, file: tuple[int, int]) -> None:
        """The whole file, by device and inode, was wrong and is taken away: who has it open reads right bytes again.

        Descriptors of it that were handed out stay what they are.
        """
        self._healed.add(sha256)
        for blob in self._blobs.of(sha256):
            async with blob.preparing:  # who is just looking at the disk may have found it before it went
                if blob in self._blobs and blob.whole and blob.local.identity == file:
                    blob.renew(self._new_key(blob.want), self._room.instead(blob.local))
                    if blob.handles:
                        self._begin_fill(blob)

    async def chunks_wrong(self, sha256: str, chunks: Sequence[int]) -> bool:
        """Chunks of a partial blob are wrong on the disk and are fetched again; False where nobody has it open."""
        blob = self._blobs.proved(sha256)
        return blob is not None and await self._settler.forget(blob, chunks)

    def was_wrong(self, sha256: str) -> bool:
        """Whether a file of this content was wrong: pages of it that the kernel keeps may be, too."""
        return sha256 in self._healed

    def elsewhere(self, blob: Blob) -> None:
        """The blob's disk hangs: what other tiers have is used, the rest fetched. READs that waited for it see that
        these are other files."""
        self._engine.give_up(blob)
        blob.unflushed, blob.unflushed_bytes, blob.settling = [], 0, False
        blob.renew(self._new_key(blob.want), self._room.instead(blob.local))
        if blob.handles:
            self._begin_fill(blob)

    def broke(self, blob: Blob, error: OSError) -> None:
        """A whole file can't be read any more: the blob is fetched again. Who has the file open keeps it."""
        fields = {"file": blob.want.path, "tier": blob.local.places.name, "reason": error.strerror}
        log.warning("a cached file can't be read; it is fetched again", extra=fields)
        blob.renew(self._new_key(blob.want), self._room.instead(blob.local, broken=True))
        blob.loaded = True  # the disk would only give the same file again
