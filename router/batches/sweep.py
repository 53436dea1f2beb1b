"""Removes what is over its time, and contents that no record names: what interrupted uploads and deletions leave.

Every process sweeps now and then; what two of them remove is removed once.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from typing import Final

from helios.errors import HeliosError, NotFound
from router.batches.records import born_at
from router.batches.shelf import Shelf

log = logging.getLogger("helios.router")

EVERY_S: Final = 6 * 3600.0
ORPHANED_S: Final = 3 * 86400.0
"""Content without a file's record is garbage after so many seconds: by then its batch is long over."""


class Sweep:
    """One process's. ``now`` gives unix seconds."""

    def __init__(self, shelf: Shelf, keep_s: float, now: Callable[[], float] = time.time) -> None:
        """``keep_s``: how long batches are kept that are over."""
        self._shelf, self._keep_s, self._now = shelf, keep_s, now
        self._expiries: dict[str, float | None] = {}
        """When files expire, by their ids: records never change."""

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(EVERY_S * random.uniform(0.5, 1.0))  # noqa: S311 - spreads processes out
            try:
                await self.sweep()
            except HeliosError as error:
                log.warning("old files and batches could not be removed", extra={"reason": error.message})

    async def sweep(self) -> None:
        """Once. Raises Unavailable."""
        files = await self._files()
        now, kept = self._now(), files | await self._of_open_batches()
        for key in await self._shelf.keys("v1/batches"):
            tenant, name = key.split("/")[-2:]
            await self._batch(tenant, name.removesuffix(".json"))
        contents = {tuple(key.split("/")[2:4]) for key in await self._shelf.keys("v1/content")}
        for tenant, identity in contents:
            if (tenant, identity) not in kept and now - born_at(identity) > ORPHANED_S:
                await self._shelf.drop_content(tenant, identity)

    async def _files(self) -> set[tuple[str, str]]:
        """The files that stay."""
        stay, expiries = set(), {}
        for key in await self._shelf.keys("v1/files"):
            tenant, name = key.split("/")[-2:]
            identity = name.removesuffix(".json")
            try:
                if identity not in self._expiries:
                    self._expiries[identity] = (await self._shelf.file(tenant, identity)).expires_at
                expires = self._expiries[identity]
                if expires is not None and self._now() >= expires:
                    await self._shelf.drop_file(tenant, identity)
                    continue
            except NotFound:
                continue
            expiries[identity] = expires
            stay.add((tenant, identity))
        self._expiries = expiries
        return stay

    async def _of_open_batches(self) -> set[tuple[str, str]]:
        """Files that batches are writing."""
        found = set()
        for tenant, identity in await self._shelf.open_batches():
            try:
                record = (await self._shelf.batch(tenant, identity)).record
            except NotFound:
                continue
            found |= {(tenant, record.output_file_id), (tenant, record.error_file_id)}
        return found

    async def _batch(self, tenant: str, identity: str) -> None:
        if self._now() - born_at(identity) <= self._keep_s:
            return
        try:
            if (await self._shelf.batch(tenant, identity)).record.over:
                await self._shelf.drop_batch(tenant, identity)
        except NotFound:
            pass
