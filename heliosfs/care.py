"""Care for what lies on the disk: bytes are looked at again, and what has rotted goes and is fetched anew.

A whole blob with wrong bytes is taken away under its name, to the quarantine (a link to the store's object is dropped);
whoever opens it next, or has it open and reads through us, gets bytes that are fetched and verified as if it had never
been here. A partial blob loses the chunks that are wrong, or goes whole when nobody has it open.

All methods run on the trio loop, but for the hashing, which has a thread of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import trio

from helios.errors import IntegrityError
from helios.metrics import MountMetrics
from heliosfs.blob_status import Tier
from heliosfs.blobs import BlobStore
from heliosfs.store.recipe import Recipe
from heliosfs.tiers import bitmap
from heliosfs.tiers.directory import TierDirectory
from heliosfs.tiers.examine import Examination, load_sums
from heliosfs.tiers.places import save_sums, unlink
from heliosfs.tiers.quarantine import Taken
from heliosfs.tiers.sums import Sums

log = logging.getLogger("heliosfs.tiers")

THREADS: Final = 2
"""Files that are hashed at a time."""

TRIES: Final = 3
"""A partial blob is opened or closed at any time: what to do about wrong chunks is decided anew, this often."""

Paced = Callable[[int], Awaitable[None]]
"""Told of the bytes of each chunk that was looked at; returns when the next may be."""

Located = Callable[[str], Awaitable[None]]
"""Told the sha256 of a blob that went: whoever knows a place that needs it now has it fetched again."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What a look at a blob found: ``bytes`` were right or wrong together; ``reason`` says what was wrong, if
    anything, ``outcome`` what became of it, ``taken`` whether it is gone from where it was, and ``in_use`` whether
    somebody had it open then."""

    bytes: int = 0
    reason: str = ""
    outcome: str = ""
    in_use: bool = False
    taken: bool = False


class Care:
    """Looks at blobs of ``store``'s tiers; ``wanted`` is told of those that were taken away."""

    def __init__(self, store: BlobStore, metrics: MountMetrics, wanted: Located) -> None:
        self._store, self._metrics, self._wanted = store, metrics, wanted
        self._limiter = trio.CapacityLimiter(THREADS)
        self.bad = 0
        """Blobs that were found to be wrong."""

    async def check(self, sha256: str, paced: Paced) -> Checked:
        """Hash every local byte of a blob, in every tier, with the strong hash."""
        total = 0
        for tier in self._store.tiers:
            found = await self.check_whole(tier, sha256, paced, strong=True)
            if found is None:
                found = await self._check_partial(tier, sha256, paced)
            total += found.bytes
            if found.reason:
                return replace(found, bytes=total)
        return Checked(total)

    async def check_whole(
        self, tier: Tier, sha256: str, paced: Paced, *, strong: bool, start: int = 0
    ) -> Checked | None:
        """Look at a whole file, with its sums from chunk ``start``, or strongly where there are none.

        None where there is no such file.
        """
        path, sums_path = tier.files.whole_path(sha256), tier.files.sums_path(sha256)

        def begin() -> Examination | None:
            try:
                return Examination(path, sha256, load_sums(sums_path, sha256), strong=strong, start=start)
            except FileNotFoundError:
                return None

        try:
            examination = await trio.to_thread.run_sync(begin, limiter=self._limiter)
        except OSError as error:
            log.warning("a cached file can't be opened", extra={"path": path, "reason": error.strerror})
            return Checked(0, f"it can't be opened: {error.strerror}", "it stays")
        if examination is None:
            return None
        count = await self._run(examination, paced)
        if examination.bad:
            in_use = tier.room.policy.holds(sha256) > 0
            if examination.unreadable and not await self._answers(tier):
                return Checked(count, examination.reason, "it stays: its disk does not answer", in_use)
            outcome, taken = await self._take_away(tier, sha256, examination)
            return Checked(count, examination.reason, outcome, in_use, taken)
        if examination.fresh is not None:
            fresh = examination.fresh
            await trio.to_thread.run_sync(_save, path, sums_path, fresh, limiter=self._limiter)
            await tier.room.measure(sha256)
        return Checked(count)

    async def _run(self, examination: Examination, paced: Paced) -> int:
        count = 0
        try:
            while step := await trio.to_thread.run_sync(examination.step, limiter=self._limiter):
                count += step
                await paced(step)
        finally:
            examination.close()
        return count

    async def _answers(self, tier: Tier) -> bool:
        """Whether a tier's directory can be used: else nothing that a read says is about a file."""
        try:
            await trio.to_thread.run_sync(tier.files.check, limiter=self._limiter)
        except OSError as error:
            log.info("a tier can't be looked at", extra={"tier": tier.name, "reason": error.strerror})
            return False
        return True

    async def _take_away(self, tier: Tier, sha256: str, examination: Examination) -> tuple[str, bool]:
        """What became of it, and whether it is gone."""
        inode = examination.inode
        try:
            taken = await trio.to_thread.run_sync(tier.files.take_away, sha256, inode, limiter=self._limiter)
        except OSError as error:
            fields = {"blob": sha256, "reason": examination.reason, "trouble": error.strerror}
            log.error("a cached blob is damaged and can't be taken away", extra=fields)
            return f"it stays: {error.strerror}", False
        if taken is None:
            return "it went meanwhile", False
        tier.room.taken_away(sha256, taken.grown)
        self._count(tier)
        await self._store.healer.gone_wrong(sha256, (examination.device, inode))
        outcome = _outcome(tier.files, sha256, taken)
        fields = {"blob": sha256, "tier": tier.name, "reason": examination.reason, "outcome": outcome}
        log.error("a cached blob is damaged; it is fetched again", extra=fields)
        await self._wanted(sha256)
        return outcome, True

    async def _check_partial(self, tier: Tier, sha256: str, paced: Paced) -> Checked:
        count = 0
        for _ in range(TRIES):
            known = self._store.healer.chunks_here(sha256)
            if known is None:
                known = await trio.to_thread.run_sync(_journal, tier.files, sha256, limiter=self._limiter)
            if known is None:
                return Checked()
            recipe, chunks = known

            def begin(recipe: Recipe = recipe, chunks: Sequence[int] = chunks) -> Examination | None:
                try:
                    return Examination(tier.files.data_path(sha256), sha256, Sums(recipe), strong=True, chunks=chunks)
                except FileNotFoundError:
                    return None

            examination = await trio.to_thread.run_sync(begin, limiter=self._limiter)
            if examination is None:
                return Checked()
            count = await self._run(examination, paced)
            if not examination.bad:
                return Checked(count)
            if examination.unreadable and not await self._answers(tier):
                return Checked(count, examination.reason, "it stays: its disk does not answer")
            bad = [index for index in examination.bad if index >= 0] or chunks
            if await self._store.healer.chunks_wrong(sha256, bad):
                outcome = "those chunks are fetched again"
            elif await tier.room.discard(sha256):
                outcome = "what was here of it was removed"
                await self._wanted(sha256)
            else:
                continue  # opened, closed or made whole meanwhile
            self._count(tier)
            fields = {"blob": sha256, "tier": tier.name, "chunks": bad, "outcome": outcome}
            log.error("a partial blob is damaged", extra=fields)
            return Checked(count, examination.reason, outcome)
        return Checked(count, "chunks are wrong", "it stays: it is in use")

    def _count(self, tier: Tier) -> None:
        self.bad += 1
        self._metrics.verify_failures.labels(tier.name).inc()
        self._metrics.damaged.inc()


def _journal(tier: TierDirectory, sha256: str) -> tuple[Recipe, list[int]] | None:
    try:
        journal = bitmap.replay(Path(tier.map_path(sha256)).read_bytes(), sha256)
    except (FileNotFoundError, IntegrityError):
        return None
    return journal.recipe, [index for index, flag in enumerate(journal.have) if flag]


def _save(path: str, sums_path: str, sums: Sums) -> None:
    """Keep sums, unless the blob went while they were made."""
    save_sums(sums_path, sums)
    try:
        with open(path, "rb"):
            return
    except OSError:
        unlink(sums_path)


def _outcome(tier: TierDirectory, sha256: str, taken: Taken) -> str:
    if taken.path is not None:
        return f"kept as {taken.path}"
    if taken.linked:
        return f"the link to {tier.object_path(sha256) or 'another file'} was dropped; that file is damaged too"
    return "removed: it is too large to be kept"
