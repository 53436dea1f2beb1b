"""Before chunks of a blob can be asked for: what the disk has of it, and its recipe."""

from __future__ import annotations

import logging
from collections.abc import Callable

from helios.errors import IntegrityError
from heliosfs.fetch.ahead import Ahead
from heliosfs.fetch.blob import Blob, Blobs, wrong_size
from heliosfs.fetch.engine import Engine
from heliosfs.fetch.lanes import Lanes
from heliosfs.fetch.source import BlobRef, Source
from heliosfs.store.recipe import Recipe
from heliosfs.tiers.local import Loaded
from heliosfs.tiers.pool import Pool
from heliosfs.tiers.tiers import Tiers

log = logging.getLogger("heliosfs.fetch")


class Preparer:
    """Makes blobs ready, each once at a time. All methods run on the trio loop."""

    def __init__(self, blobs: Blobs, engine: Engine, room: Tiers, pool: Pool, lanes: Lanes, ahead: Ahead) -> None:
        self._blobs, self._engine, self._room, self._pool = blobs, engine, room, pool
        self._lanes, self._ahead = lanes, ahead

    async def load(self, blob: Blob) -> None:
        """Find out what the disk has of it. Raises IntegrityError when that shows that the blob's size is wrong."""
        async with blob.preparing:
            if blob.loaded:
                return
            busy = self._room.busy(blob.want.sha256)
            found: Loaded | None = None
            if not busy and blob.local.load_at_once(blob.want.recipe_digest):
                found = Loaded(whole=True)
            while found is None:
                local = blob.local
                try:
                    found = await self._room.find(local, blob.want.recipe_digest)
                finally:
                    if found is None:  # a thread may still be at it
                        blob.local = self._room.instead_of_late(local)
            for place, error in found.failed:
                fields = {"file": blob.want.path, "tier": place.name, "reason": error.strerror}
                log.warning("a cached file can't be opened; it is looked for elsewhere", extra=fields)
            if found.doubted is not None:
                raise wrong_size(blob, found.size)
            if found.whole or found.recipe is not None:
                self._blobs.prove(blob)
            blob.loaded, blob.whole = True, found.whole
            self._room.loaded(blob.local)
            if found.recipe is not None:
                self._engine.add(blob, found.recipe, found.have)

    async def prepare(self, blob: Blob) -> None:
        """Make chunks of the blob ready to be asked for: find the recipe. Raises HeliosError."""
        while True:
            await self.load(blob)
            async with blob.preparing:
                if blob.whole or blob.planned:
                    return
                recipe = self.remembered(blob.want)
                if recipe is None:
                    await self._ahead.settled(blob.want.repo, blob.want.commit)
                    recipe = await self._lanes.ask(f"the recipe of {blob.want.path}", self._recipe_of(blob.want))
                self._blobs.prove(blob)
                local = blob.local
                if blob.proved and await self._room.adopt(local, recipe):
                    self._room.loaded(local)
                if blob.loaded:
                    self._engine.add(blob, recipe, None)
                    return
                # its disk hung meanwhile (Healer.elsewhere): the others are looked at

    def remembered(self, want: BlobRef) -> Recipe | None:
        """The blob's recipe, where the pool has it."""
        return self._pool.recipe(want.recipe_digest, want.sha256, want.size)

    def _recipe_of(self, want: BlobRef) -> Callable[[Source, float], Recipe]:
        """What a thread does to get the blob's recipe, checked."""

        def ask(source: Source, timeout_s: float) -> Recipe:
            record = source.recipe(want, timeout_s)
            try:
                recipe = Recipe.decode(record, want.recipe_digest)
            except IntegrityError:  # damaged on its way, perhaps: like a chunk it is asked for once more
                record = source.recipe(want, timeout_s)
                recipe = Recipe.decode(record, want.recipe_digest)
            if recipe.blob != want.sha256 or recipe.size != want.size:
                raise IntegrityError(f"the recipe of {want.path} is one of another blob, {recipe.blob}")
            self._pool.offer_recipe(want.recipe_digest, record)
            return recipe

        return ask
