"""What is read through this mount, told to the registry now and then: else it would know of no read that a node's own
disk has answered (docs/registry-usage.md).

Best effort: no read ever waits for it, memory is bounded, and what a mount that is killed has not told is lost. A
report whose answer got lost is sent again as it was, under the same number, and counts once.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import trio

from helios.errors import HeliosError, InvalidInput, NotFound
from helios.names import RepoId

log = logging.getLogger("heliosfs.usage")

REPORT_S: Final = 60.0
"""How often what was read is told, in seconds."""
MODELS: Final = 1000
"""Most revisions of one report; of more in so short a time the further ones are not counted."""
ANSWER_S: Final = 10.0
"""Longest wait for the registry, in seconds..."""
LAST_S: Final = 2.0
"""...and for the last report, when the mount ends."""


@dataclass(frozen=True, slots=True)
class Row:
    """Files opened, and bytes read, of one revision."""

    repo: str
    commit: str
    reads: int
    bytes: int


class ReadCounts:
    """Counts in memory. Any thread may count; it never waits."""

    def __init__(self, most: int = MODELS) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._counts: dict[tuple[RepoId, str], list[int]] = {}

    def opened(self, repo: RepoId, commit: str) -> None:
        """A file of the revision was opened."""
        self._add(repo, commit, 1, 0)

    def read(self, repo: RepoId, commit: str, count: int) -> None:
        """So many bytes of the revision were read."""
        self._add(repo, commit, 0, count)

    def take(self) -> list[Row]:
        """What was counted since the last call."""
        with self._lock:
            counts, self._counts = self._counts, {}
        return [Row(str(repo), commit, reads, size) for (repo, commit), (reads, size) in counts.items()]

    def _add(self, repo: RepoId, commit: str, reads: int, size: int) -> None:
        with self._lock:
            found = self._counts.get((repo, commit))
            if found is None:
                if len(self._counts) >= self._most:
                    return
                found = self._counts[repo, commit] = [0, 0]
            found[0] += reads
            found[1] += size


class Listener(Protocol):
    """Whoever keeps what was read: a registry. Blocks."""

    def report_reads(
        self, node: str, reporter: str, sequence: int, rows: Sequence[Row], age_s: float, timeout_s: float
    ) -> None:
        """Add a report, once however often it is sent."""


@dataclass(frozen=True, slots=True)
class _Report:
    sequence: int
    rows: Sequence[Row]
    at: float


class ReadReports:
    """Tells a registry what was counted, until cancelled, and then once more."""

    def __init__(self, counts: ReadCounts, listener: Listener, node: str) -> None:
        self._counts, self._listener, self._node = counts, listener, node
        self._reporter = secrets.token_hex(16)
        self._sequence = 0
        self._waiting: _Report | None = None

    async def run(
        self, every_s: float = REPORT_S, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Report for ever."""
        task_status.started()
        try:
            while True:
                await trio.sleep(every_s)
                await self.report(ANSWER_S)
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + LAST_S):
                await self.report(LAST_S / 2)

    async def report(self, timeout_s: float) -> None:
        """Send what could not be sent the last time, and what was counted since."""
        while True:
            if self._waiting is None:
                rows = self._counts.take()
                if not rows:
                    return
                self._sequence += 1
                self._waiting = _Report(self._sequence, rows, trio.current_time())
            if not await self._send(self._waiting, timeout_s):
                return
            self._waiting = None

    async def _send(self, report: _Report, timeout_s: float) -> bool:
        """Whether the registry has it, or never will."""
        age_s = trio.current_time() - report.at
        try:
            await trio.to_thread.run_sync(
                self._listener.report_reads,
                self._node,
                self._reporter,
                report.sequence,
                report.rows,
                age_s,
                timeout_s,
                abandon_on_cancel=True,
            )
        except (InvalidInput, NotFound) as error:  # an older registry, or one that counts otherwise
            log.info("the registry takes no reports of reads", extra={"reason": error.message})
            return True
        except HeliosError as error:
            log.debug("what was read is told later", extra={"reason": error.message})
            return False
        return True
