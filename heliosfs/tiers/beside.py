"""Objects of a store beside the cache, which may be linked. Its disk may be another one, and hang when the cache's
does not: so it is asked for each before anything is done to the cache."""

from __future__ import annotations

import os
import stat
from typing import Final

import trio

from heliosfs.tiers.places import Places
from heliosfs.tiers.silence import HANG_S, Asked

LOOKS: Final = 4
"""Objects that are looked for at a time."""


class Beside:
    """The store's disk. Used from one trio loop."""

    def __init__(self) -> None:
        self._asked, self._limiter = Asked(), trio.CapacityLimiter(LOOKS)

    async def has(self, sha256: str, places: Places) -> bool:
        """Whether the object that is this blob is there, a file on the cache's own disk, which alone is then asked to
        link it. A store that does not answer has nothing, and keeps nobody for longer than HANG_S."""
        path = places.object_path(sha256)
        if path is not None and self._asked.longest() < HANG_S:
            with trio.move_on_after(HANG_S):
                return await trio.to_thread.run_sync(
                    self._look, path, places.device, abandon_on_cancel=True, limiter=self._limiter
                )
        return False

    def _look(self, path: str, device: int) -> bool:
        try:
            with self._asked.call():
                found = os.lstat(path)
        except OSError:
            return False
        return stat.S_ISREG(found.st_mode) and found.st_dev == device
