"""What the registry does for its object store from time to time: see ``ObjectStore.tidy``."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from helios.errors import HeliosError
from heliosfs.store.objects import ObjectStore

log = logging.getLogger("helios.registry")

EVERY_S: Final = 3600.0


async def keep_tidy(store: ObjectStore) -> None:
    """Tidy up at once and then every hour, until cancelled."""
    while True:
        try:
            await asyncio.to_thread(store.tidy)
        except HeliosError as error:
            log.warning("the object store could not be tidied", extra={"reason": str(error)})
        await asyncio.sleep(EVERY_S)
