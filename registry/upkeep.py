"""What the registry does from time to time, beside serving."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from helios.errors import HeliosError
from heliosfs.store.objects import ObjectStore
from registry.threads import Threads

log = logging.getLogger("helios.registry")

EVERY_S: Final = 3600.0
AGAIN_S: Final = 60.0
"""When upkeep that broke begins again, in seconds."""


async def keep_at(what: str, work: Callable[[], Awaitable[None]]) -> None:
    """Have one task of upkeep done until it is over or cancelled.

    Whatever breaks it is logged, and it begins again: a registry whose disk is full, say, serves what it holds.
    """
    while True:
        try:
            await work()
            return
        except HeliosError as error:
            log.warning("upkeep failed; trying again later", extra={"what": what, "error": error.message})
        except Exception:
            log.exception("upkeep broke; trying again later", extra={"what": what})
        await asyncio.sleep(AGAIN_S)


async def keep_tidy(store: ObjectStore, upkeep: Threads) -> None:
    """Tidy the object store up (``ObjectStore.tidy``) at once and then every hour, until cancelled."""
    while True:
        try:
            await upkeep(store.tidy)
        except HeliosError as error:
            log.warning("the object store could not be tidied", extra={"reason": str(error)})
        await asyncio.sleep(EVERY_S)
