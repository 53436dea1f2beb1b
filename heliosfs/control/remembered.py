"""What a mount was asked for and is not done with, so that the process that serves it next goes on: draining, jobs.

It is remembered as long as the mount exists, in one small file in $HELIOS_HOME/run (docs/control-api.md): a mount that
is made anew begins with nothing. A file that can't be read or written costs a warning: then the next process does not
go on.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import msgspec
import trio

from helios.errors import HeliosError, IntegrityError, Unavailable
from heliosfs.control.drain import Drain
from heliosfs.control.jobs import Jobs, Wish, Work
from heliosfs.tiers.keeping import read_record, write_record

log = logging.getLogger("heliosfs.control")

MAGIC: Final = b"helios-work 1\n"

RESUMES: Final = 3
"""A job is taken up again at most so often: one that the process did not survive may be why."""

PAUSE_S: Final = 1.0
LONGEST_PAUSE_S: Final = 30.0
"""While nobody says what is in a commit, it is asked again after so many seconds, at first and at most."""


class Kept(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file: ``mount`` is when the mount was made, in ns; of each job how often it was taken up again."""

    mount: int = 0
    draining: bool = False
    jobs: list[tuple[Wish, int]] = []


class Remembered:
    """The file at ``path``, of the mount made at ``mounted_ns``; None: the mount ends with its process.

    ``make`` finds out what a wish is about and makes the work. All methods run on the trio loop.
    """

    def __init__(
        self,
        path: Path | None,
        mounted_ns: int,
        jobs: Jobs,
        drain: Drain,
        make: Callable[[Wish], Awaitable[Work]],
    ) -> None:
        self._path, self._mount, self._jobs, self._drain, self._make = path, mounted_ns, jobs, drain, make
        self._resumed: dict[Wish, int] = {}
        self._coming: set[Wish] = set()
        """Jobs of an earlier process that are not begun yet."""
        self._saving = trio.Lock()
        self._saved = Kept()
        self._failed = False

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Drain again before anything begins, take jobs up again, and note when they are over, until cancelled."""
        kept = Kept() if self._path is None else await trio.to_thread.run_sync(_load, self._path)
        if kept.mount != self._mount:
            kept = Kept()
        self._saved, self._resumed = kept, dict(kept.jobs)
        self._coming = set(self._resumed)
        if kept.draining:
            log.info("the mount is still being drained")
            await self._drain.begin()
        async with trio.open_nursery() as nursery:
            task_status.started()
            for wish, times in kept.jobs:
                nursery.start_soon(self._resume, wish, times)
            while True:
                await self._jobs.changed.wait()
                await self.save()

    async def save(self) -> None:
        """What is asked for now is on the disk when this returns, or a warning in the log."""
        if self._path is None:
            return
        async with self._saving:
            changed, self._jobs.changed = self._jobs.changed, trio.Event()
            changed.set()
            wishes = {job.work.wish for job in self._jobs.all() if job.active} | self._coming
            self._resumed = {wish: self._resumed.get(wish, 0) for wish in wishes}
            jobs = sorted(self._resumed.items(), key=repr)
            kept = Kept(self._mount, self._drain.draining, jobs)
            if kept == self._saved:
                return
            try:
                await trio.to_thread.run_sync(write_record, self._path, MAGIC, kept)
                self._saved, self._failed = kept, False
            except OSError as error:
                if not self._failed:
                    fields = {"path": str(self._path), "reason": error.strerror}
                    log.warning("what the mount is asked for can't be remembered", extra=fields)
                self._failed = True

    def forget(self) -> None:
        """The mount is gone."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    async def _resume(self, wish: Wish, times: int) -> None:
        fields = {"kind": wish.kind, "repo": wish.repo, "commit": wish.commit}
        try:
            if times >= RESUMES:
                log.error("a job was interrupted too often and is not taken up again", extra=fields)
                return
            self._resumed[wish] = times + 1
            await self.save()
            work = await self._found(wish)
            if not self._drain.draining:
                self._jobs.start(work)
                log.info("a job that was interrupted is taken up again", extra=fields)
        except HeliosError as error:
            log.warning("an interrupted job can't be taken up again", extra={**fields, "reason": str(error)})
        finally:
            self._coming.discard(wish)
            self._jobs.changed.set()

    async def _found(self, wish: Wish) -> Work:
        """Raises HeliosError where asking again is of no use."""
        pause = PAUSE_S
        while True:
            try:
                return await self._make(wish)
            except Unavailable:
                await trio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)


def _load(path: Path) -> Kept:
    try:
        return read_record(path, MAGIC, Kept())
    except (OSError, IntegrityError) as error:
        log.warning("what the mount was asked for is not known any more", extra={"reason": str(error)})
        return Kept()
