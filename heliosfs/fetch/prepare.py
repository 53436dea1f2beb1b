"""Before chunks of a blob can be asked for: what the disk has of it, and its recipe."""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from helios.errors import IntegrityError
from heliosfs.fetch.ahead import Ahead
from heliosfs.fetch.blob import Blob
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

    def __init__(
        self, engine: Engine, room: Tiers, pool: Pool, lanes: Lanes, ahead: Ahead, limiter: trio.CapacityLimiter
    ) -> None:
        self._engine, self._room, self._pool = engine, room, pool
        self._lanes, self._ahead, self._limiter = lanes, ahead, limiter

    async def load(self, blob: Blob) -> None:
        """Find out what the disk has of it."""
        async with blob.preparing:
            if blob.loaded:
                return
            await self._room.settled(blob.want.sha256)
            found = Loaded(whole=blob.local.load_at_once())
            if not found.whole:
                load, digest, places = blob.local.load, blob.want.recipe_digest, self._room.places()
                found = await trio.to_thread.run_sync(lambda: load(digest, *places), limiter=self._limiter)
            for place, error in found.failed:
                fields = {"file": blob.want.path, "tier": place.name, "reason": error.strerror}
                log.warning("a cached file can't be opened; it is looked for elsewhere", extra=fields)
            blob.loaded, blob.whole = True, found.whole
            self._room.loaded(blob.local)
            if found.recipe is not None:
                self._engine.add(blob, found.recipe, found.have)

    async def prepare(self, blob: Blob) -> None:
        """Make chunks of the blob ready to be asked for: find the recipe. Raises HeliosError."""
        await self.load(blob)
        async with blob.preparing:
            if blob.whole or blob.planned:
                return
            recipe = self.remembered(blob.want)
            if recipe is None:
                await self._ahead.settled(blob.want.repo, blob.want.commit)
                recipe = await self._lanes.ask(f"the recipe of {blob.want.path}", self._recipe_of(blob.want))
            if await trio.to_thread.run_sync(blob.local.adopt, recipe, limiter=self._limiter):
                self._room.loaded(blob.local)
            self._engine.add(blob, recipe, None)

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
