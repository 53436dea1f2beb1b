"""Counts reads in memory and writes them down every few seconds: no read waits for the database.

What a registry that is killed had not written is lost, the reads of ``FLUSH_S`` at most; one that stops in order loses
nothing. Reports of mounts are on disk when they are acknowledged, and count once however often they are sent.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from helios.errors import HeliosError
from helios.metrics import RegistryMetrics
from registry.metadata import usage
from registry.metadata.database import Changes, Database
from registry.metadata.usage import DAY, HOUR, OTHERS, Key, Reads
from registry.threads import Threads

log = logging.getLogger("helios.registry.usage")

FLUSH_S: Final = 5.0
"""How often what was counted is written, in seconds."""
TIDY_S: Final = 3600.0
"""How often what is too old is looked for."""
PENDING: Final = 10_000
"""Most counts in memory."""
HOUR_ROWS: Final = 20_000
"""Rows of an hour from which on further nodes count as others."""
ROWS: Final = 2_000_000
"""Most rows in all: the oldest go first."""
HOURS_S: Final = 14 * DAY
"""How long hours are told apart; then days."""
REPORTER_S: Final = 7 * DAY
"""How long it is remembered which report of a mount was the last."""


class Recorder:
    """The reads of one registry. ``read`` never blocks and may be called from any thread; other methods block."""

    def __init__(
        self,
        database: Database,
        metrics: RegistryMetrics,
        *,
        keep_s: float,
        now: Callable[[], float] = time.time,
        hour_rows: int = HOUR_ROWS,
        rows: int = ROWS,
    ) -> None:
        """``keep_s``: how long reads are known; 0: they are not recorded."""
        self._database, self._metrics, self._keep_s, self.now = database, metrics, keep_s, now
        self._hour_rows, self._rows = hour_rows, rows
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._counts: dict[Key, Reads] = {}

    @property
    def on(self) -> bool:
        """Whether anything is recorded."""
        return self._keep_s > 0

    def read(self, repo: str, commit: str, node: str, *, reads: int, count: int) -> None:
        """A node has read ``count`` bytes of a revision."""
        if not self.on or not (reads or count):
            return
        key = Key(_hour(self.now()), repo, commit, node)
        with self._lock:
            self._count(key, Reads(reads, count))

    def report(
        self, reporter: str, sequence: int, node: str, age_s: float, rows: Iterable[tuple[str, str, Reads]]
    ) -> bool:
        """Add what a mount has counted until ``age_s`` seconds ago: (repository, commit, reads). False for a report
        that was added before."""
        if not self.on:
            return True
        now = self.now()
        hour = _hour(now - age_s)
        counts: dict[Key, Reads] = {}
        for repo, commit, reads in rows:
            key = Key(hour, repo, commit, node)
            counts[key] = counts.get(key, Reads()) + reads
        with self._database.write(changes=Changes.NOTHING) as connection:
            if not usage.is_new(connection, reporter, sequence, int(now)):
                return False
            merged = usage.add(connection, counts, self._hour_rows)
        self._told(len(counts), merged)
        return True

    def ask(
        self,
        by: Sequence[str],
        *,
        since: int,
        until: int,
        repo: str | None = None,
        shown: Callable[[str], bool] | None = None,
        limit: int,
    ) -> list[dict[str, object]]:
        """What was read, with what this process has not written yet; see ``usage.ask``. ``shown`` says which
        repositories may be told of (None: all, and what counts for others)."""
        self.flush()
        with self._database.read() as connection:
            repos = None if repo is None else [repo]
            if shown is not None:
                names = usage.repositories_in(connection, since, until)
                repos = [name for name in names if name != OTHERS and shown(name)]
            return usage.ask(connection, by, since=since, until=until, repos=repos, limit=limit)

    def flush(self) -> None:
        """Write down what was counted before the call. What can't be written stays for the next time."""
        with self._flushing:  # what another thread took but has not written yet was counted before, too
            with self._lock:
                counts, self._counts = self._counts, {}
            if not counts:
                return
            try:
                with self._database.write(lazy=True, changes=Changes.NOTHING) as connection:
                    merged = usage.add(connection, counts, self._hour_rows)
            except HeliosError:
                self._take_back(counts)
                raise
            self._told(len(counts), merged)

    def _take_back(self, counts: dict[Key, Reads]) -> None:
        with self._lock:
            for key, reads in counts.items():
                self._count(key, reads)

    def _count(self, key: Key, reads: Reads) -> None:
        """Under the lock. Where there is no room for one more, it counts for others: one of them for each hour."""
        if key not in self._counts and len(self._counts) >= PENDING:
            self._metrics.usage_rows.labels("merged").inc()
            key = Key(key.time, OTHERS, "", OTHERS)
        self._counts[key] = self._counts.get(key, Reads()) + reads

    def _told(self, rows: int, merged: int) -> None:
        self._metrics.usage_rows.labels("recorded").inc(rows - merged)
        self._metrics.usage_rows.labels("merged").inc(merged)

    def tidy(self) -> None:
        """Make days of old hours, and forget what is older than it is kept, or more than fits."""
        now = int(self.now())
        with self._database.write(lazy=True, changes=Changes.NOTHING) as connection:
            usage.forget(connection, now - int(self._keep_s), now - REPORTER_S)
        more = True
        while more:  # a day at a time: others wait meanwhile
            with self._database.write(lazy=True, changes=Changes.NOTHING) as connection:
                more = usage.compact(connection, now - HOURS_S)
        with self._database.write(lazy=True, changes=Changes.NOTHING) as connection:
            gone = usage.cut(connection, self._rows)
        if gone:
            log.warning("more usage than is kept: the oldest was dropped", extra={"rows": gone})

    async def run(self, upkeep: Threads) -> None:
        """Write and tidy until cancelled, then write once more. Run by the daemon as a task of its own."""
        if not self.on:
            return
        tidy_at = time.monotonic()
        try:
            while True:
                await _try(upkeep, self.flush)
                if time.monotonic() >= tidy_at:
                    tidy_at = time.monotonic() + TIDY_S
                    await _try(upkeep, self.tidy)
                await asyncio.sleep(FLUSH_S)
        finally:
            await asyncio.shield(_try(upkeep, self.flush))


async def _try(upkeep: Threads, work: Callable[[], None]) -> None:
    try:
        await upkeep(work)
    except HeliosError as error:
        log.warning("usage could not be written; trying again later", extra={"error": error.message})


def _hour(at: float) -> int:
    return int(at) - int(at) % HOUR
