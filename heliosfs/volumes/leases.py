"""Leases on the commits of this node's volumes: the registry keeps them, whatever happens to their refs.

A volume is readable for as long as it exists, so the registry is told again and again that its commit is in use. When
a volume is deleted, or a node is gone, the lease ends by itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Final, Protocol

import trio

from helios.errors import HeliosError, NotFound
from helios.names import RepoId
from heliosfs.volumes.record import VolumeRecord

log = logging.getLogger("heliosfs.volumes")

LEASE_S: Final = 7 * 86400.0
"""How long a lease lasts, in seconds: a node may be away for so long."""
RENEW_S: Final = 3600.0
"""How often it is renewed, in seconds."""
LOOK_S: Final = 5.0
"""How often it is looked for volumes that are new, or whose lease could not be had, in seconds."""
ANSWER_S: Final = 15.0
"""Longest wait for the registry, in seconds."""


class Lessor(Protocol):
    """Whoever gives leases: a registry. Blocks."""

    def lease(self, holder: str, repo: RepoId, commit: str, seconds: float, timeout_s: float) -> None:
        """Keep a commit for so long from now on."""


class VolumeLeases:
    """Renews the leases until it is cancelled. ``volumes`` gives all volumes by id."""

    def __init__(self, lessor: Lessor, volumes: Callable[[], Mapping[str, VolumeRecord]], holder: str) -> None:
        self._lessor, self._volumes, self._holder = lessor, volumes, holder
        self._due: dict[tuple[str, str], float] = {}
        self._refused: set[tuple[str, str]] = set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Renew what is due, for ever."""
        task_status.started()
        while True:
            await self.renew(trio.current_time())
            await trio.sleep(LOOK_S)

    async def renew(self, now: float) -> None:
        """Renew the leases that are due; one that can't be renewed is due again the next time."""
        wanted = {(record.repo, record.commit): record for record in self._volumes().values()}
        self._due = {key: at for key, at in self._due.items() if key in wanted}
        for key, record in wanted.items():
            if self._due.get(key, now) > now:
                continue
            try:
                await trio.to_thread.run_sync(
                    self._lessor.lease,
                    self._holder,
                    record.repository,
                    record.commit,
                    LEASE_S,
                    ANSWER_S,
                    abandon_on_cancel=True,
                )
            except NotFound as error:  # it has gone there, or the registry knows no leases: asking often helps nobody
                if key not in self._refused:
                    self._refused.add(key)
                    log.warning("the registry does not keep a volume's commit", extra={"reason": error.message})
            except HeliosError as error:
                log.info("a lease could not be renewed yet", extra={"reason": error.message})
                return
            else:
                self._refused.discard(key)
            self._due[key] = now + RENEW_S
