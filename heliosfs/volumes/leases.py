"""Leases on the commits that this node uses: the registry keeps them, whatever happens to their refs.

A volume is readable for as long as it exists, and an open file for as long as it is open, so the registry is told again
and again that their commits are in use. When a volume is deleted, a file closed, or a node is gone, the lease ends by
itself. A file that is whole on this node needs no registry, and most are within a minute: only what is open for longer
is leased.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
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
OPEN_S: Final = 86400.0
"""How long the lease of a commit lasts of which files are open, in seconds."""
OPEN_AFTER_S: Final = 60.0
"""How long they must be open before, in seconds."""
LOOK_S: Final = 5.0
"""How often it is looked for what is new, or whose lease could not be had, in seconds."""
ANSWER_S: Final = 15.0
"""Longest wait for the registry, in seconds."""


class Lessor(Protocol):
    """Whoever gives leases: a registry. Blocks."""

    def lease(self, holder: str, repo: RepoId, commit: str, seconds: float, timeout_s: float) -> None:
        """Keep a commit for so long from now on."""


class VolumeLeases:
    """Renews the leases until it is cancelled. ``volumes`` gives all volumes by id; ``opened`` the commits, each with
    its repository's canonical name, of which files are open that are not whole here."""

    def __init__(
        self,
        lessor: Lessor,
        volumes: Callable[[], Mapping[str, VolumeRecord]],
        opened: Callable[[], Collection[tuple[str, str]]],
        holder: str,
    ) -> None:
        self._lessor, self._volumes, self._opened, self._holder = lessor, volumes, opened, holder
        self._since: dict[tuple[str, str], float] = {}
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
        self._since = {key: self._since.get(key, now) for key in self._opened()}
        wanted = {key: OPEN_S for key, since in self._since.items() if now - since >= OPEN_AFTER_S}
        wanted |= {(record.repo, record.commit): LEASE_S for record in self._volumes().values()}
        self._due = {key: at for key, at in self._due.items() if key in wanted}
        for key, seconds in wanted.items():
            if self._due.get(key, now) > now:
                continue
            try:
                await trio.to_thread.run_sync(
                    self._lessor.lease,
                    self._holder,
                    RepoId.from_canonical(key[0]),
                    key[1],
                    seconds,
                    ANSWER_S,
                    abandon_on_cancel=True,
                )
            except NotFound as error:  # it has gone there, or the registry knows no leases: asking often helps nobody
                if key not in self._refused:
                    self._refused.add(key)
                    log.warning("the registry does not keep a commit that is in use", extra={"reason": error.message})
            except HeliosError as error:
                log.info("a lease could not be renewed yet", extra={"reason": error.message})
                return
            else:
                self._refused.discard(key)
            self._due[key] = now + RENEW_S
