"""Threads that were given up while they looked for a blob's files: who looks next waits until they are through.

Such a look removes what it takes for half a blob, by name; that must not meet the files of the blob's next life.
"""

from __future__ import annotations

from typing import Final

import trio

from heliosfs.tiers.local import LocalBlob

POLL_S: Final = 0.02
"""How often it is looked whether one is through, in seconds."""


class Behind:
    """Looks that were left behind. All methods run on the trio loop."""

    def __init__(self) -> None:
        self._left: list[LocalBlob] = []

    def leave(self, local: LocalBlob) -> None:
        """These files are not used any more, but a thread may still be looking for them; they are closed after that."""
        local.let_go(behind=True)
        self._left = [other for other in self._left if not other.ended]
        self._left.append(local)

    async def through(self, sha256: str) -> None:
        """Wait for those that look for this blob, but for what hangs: its directory is nobody's while it does."""
        while any(each.sha256 == sha256 and not (each.ended or each.places.silent) for each in self._left):  # noqa: ASYNC110 - it ends with a thread
            await trio.sleep(POLL_S)
