"""The collector: marks what nothing keeps, and removes what has been garbage for the grace.

1. *Mark.* Commits that no ref points at, nobody has pinned and that were not in use for ``keep_commits_s`` are
   condemned; so are blobs that no commit holds any more.
2. *Sweep.* What has been condemned for ``grace_s`` and is garbage still, as the transaction that removes it finds,
   goes: rows of commits, then of blobs, their chunks and objects.
3. *Bury.* Objects are deleted when another ``lease_s`` + ``grace_s`` are over: nobody can hold a placement then that
   names them (registry/burial.py).

Each step is a transaction of its own, in bounded batches, and needs nothing of the one before but what that has
committed. So a run may be killed anywhere; the next one goes on. Nothing depends on being alone, either: only one
process collects at a time because two would do the same work.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from helios.errors import Conflict, HeliosError, IntegrityError, NotFound, Unavailable
from helios.names import RepoId
from heliosfs.store.keys import commit_key, manifest_key
from registry.burial import bury
from registry.catalog import Catalog
from registry.gc.repack import Repacker
from registry.gc.report import Report
from registry.metadata import claims, content, gc, pins
from registry.metadata.database import Changes
from registry.metadata.repositories import Repository

log = logging.getLogger("helios.registry.gc")

MARKS: Final = 500
"""Most rows condemned in one transaction."""
COMMITS: Final = 64
"""Most commits removed in one transaction."""
BLOBS: Final = 64
BYTES: Final = 32 << 30
"""Most blobs, and bytes of blobs, removed in one transaction: the latter bounds the rows of chunks."""


@dataclass(frozen=True, slots=True)
class Times:
    """In seconds: how long a commit stays that was in use, the grace, and the longest lease of a placement."""

    keep_commits_s: float = 30 * 86400.0
    grace_s: float = 86400.0
    lease_s: float = 300.0
    keep_history: bool = False
    """Whether what a ref's commit came from stays as well, however old it is."""

    @property
    def keep(self) -> gc.Keep:
        return gc.Keep(self.keep_commits_s, self.keep_history)


class Collector:
    """Of one registry."""

    def __init__(self, catalog: Catalog, times: Times) -> None:
        self.catalog, self.times = catalog, times
        self._database, self._domain = catalog.database, catalog.domain

    def run(
        self,
        *,
        dry_run: bool = False,
        say: Callable[[str], None] = lambda _line: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Report:
        """One collection. Raises Conflict while another process collects, Unavailable when stopped in the middle."""
        report = Report(dry_run)
        if dry_run:
            self._plan(report)
            return report
        self._take_turn()
        try:
            for what, step in (
                ("cleaning up after pushes and pulls", self._clean),
                ("marking", self._mark),
                ("removing commits", self._sweep_commits),
                ("removing files", self._sweep_blobs),
                ("rewriting packs", self._repack),
                ("deleting objects", self._bury),
            ):
                say(what)
                step(report, stopped)
        finally:
            self._leave_turn()
        with self._database.read() as connection:
            report.condemned_commits, report.condemned_blobs = gc.count_condemned(connection)
            report.waiting_objects = gc.count_waiting(connection)
        log.info("collected", extra=report.result())
        return report

    # --- turns ---

    def _take_turn(self) -> None:
        kind = self._database.kind
        with self._database.write(lazy=True, changes=Changes.NOTHING) as connection:
            now = pins.clock(connection, kind.now)
            if not pins.take_turn(connection, "gc", self.catalog.member.id, now, shared=kind.shared):
                raise Conflict("another process of this registry is collecting garbage; wait until it is done")

    def _leave_turn(self) -> None:
        try:
            with self._database.write(lazy=True, changes=Changes.NOTHING) as connection:
                pins.leave_turn(connection, "gc", self.catalog.member.id)
        except HeliosError as error:  # it ends by itself
            log.warning("the collector's turn could not be given back", extra={"error": error.message})

    # --- what sessions left ---

    def _clean(self, _report: Report, _stopped: Callable[[], bool]) -> None:
        """Forget what ended sessions left, as they do themselves unless they are killed just then."""
        with self._database.read() as connection:
            if not content.any_unneeded(connection, self._domain):
                return
        with self._database.write() as connection:
            claims.doom(connection, content.drop_pending(connection, self._domain))

    # --- mark ---

    def _mark(self, report: Report, stopped: Callable[[], bool]) -> None:
        keep = self.times.keep
        with self._database.write(changes=Changes.NOTHING) as connection:
            now = pins.clock(connection, self._database.kind.now)
            pins.forget_pins(connection, now)
            _fill(report, gc.kept(connection, now, keep))
            gc.acquit_commits(connection, now, keep)
            gc.acquit_blobs(connection, self._domain)
        more = True
        while more:
            _go_on(stopped)
            with self._database.write(changes=Changes.NOTHING) as connection:
                now = pins.clock(connection, self._database.kind.now)
                more = gc.condemn_commits(connection, now, keep, MARKS) == MARKS
                more |= gc.condemn_blobs(connection, self._domain, now, MARKS) == MARKS

    # --- sweep ---

    def _sweep_commits(self, report: Report, stopped: Callable[[], bool]) -> None:
        before = self._now() - self.times.grace_s
        while True:
            _go_on(stopped)
            with self._database.read() as connection:
                due = gc.due_commits(connection, before, COMMITS)
            if due is None:
                return
            removed = self._remove_commits(*due, report)
            report.removed_commits += removed

    def _remove_commits(self, repository: Repository, dying: dict[str, float], report: Report) -> int:
        """Remove those of the commits that are garbage still; returns how many, 0 for: look again.

        What the others of the repository hold stands in their manifests, which are read before: if there is one more
        when it comes to removing, nothing is done.
        """
        with self._database.read() as connection:
            seen = gc.manifests_besides(connection, repository, dying)
            lost = set(gc.shown_by(connection, repository))
        for digest in seen:
            if not lost:
                break
            lost -= self._holds(digest, lost, report)
        with self._database.write() as connection:
            now = pins.clock(connection, self._database.kind.now)
            garbage = gc.still_garbage(connection, repository, dying, now, self.times.keep)
            if alive := dying.keys() - garbage.keys():
                gc.acquit(connection, repository, alive)
                return 0
            if not gc.manifests_besides(connection, repository, dying) <= seen:
                return 0
            gc.remove_commits(connection, repository, garbage, lost, min(dying.values()))
            repo = RepoId.from_canonical(repository.name)
            records = {commit_key(self._domain, repo, commit) for commit in garbage}
            records |= {manifest_key(self._domain, digest) for digest in garbage.values()}
            claims.doom(connection, records, now + self.times.lease_s)
        return len(garbage)

    def _holds(self, digest: str, all_: set[str], report: Report) -> set[str]:
        """The blobs of a manifest; ``all_`` where it can't be read: what it holds must stay."""
        try:
            return {entry.sha256 for entry in self.catalog.manifest_of(digest).files.values()}
        except (NotFound, IntegrityError) as error:
            report.problems.append(f"a manifest can't be read, so its repository's files stay: {error.message}")
            return set(all_)

    def _sweep_blobs(self, report: Report, stopped: Callable[[], bool]) -> None:
        before = self._now() - self.times.grace_s
        after = ""
        while True:
            _go_on(stopped)
            with self._database.read() as connection:
                due = gc.due_blobs(connection, self._domain, before, after, BLOBS)
            if not due:
                return
            batch: list[str] = []
            size = 0
            for sha256, length in due:
                if batch and size + length > BYTES:
                    break
                batch.append(sha256)
                size += length
            after = batch[-1]
            with self._database.write() as connection:
                until = pins.clock(connection, self._database.kind.now) + self.times.lease_s + self.times.grace_s
                removed = gc.remove_blobs(connection, self._domain, batch, until)
            report.removed_blobs += len(removed.blobs)
            report.busy_blobs += len(removed.claimed)
            report.removed_objects += removed.objects
            report.freed_bytes += removed.bytes

    def _repack(self, report: Report, stopped: Callable[[], bool]) -> None:
        repacker = Repacker(self.catalog, self.times.lease_s + self.times.grace_s)
        for key, number in repacker.candidates():
            _go_on(stopped)
            try:
                done = repacker.rewrite(key, number)
            except (NotFound, IntegrityError) as error:
                report.problems.append(f"{key} can't be rewritten: {error.message}")
                continue
            if done is not None:
                report.rewritten_objects += 1
                report.rewritten_bytes += done

    def _bury(self, report: Report, _stopped: Callable[[], bool]) -> None:
        report.deleted_objects = bury(self._database, self.catalog.store)

    # --- dry run ---

    def _plan(self, report: Report) -> None:
        """What would go if nothing changed any more, however long it takes until then."""
        keep = self.times.keep
        with self._database.read() as connection:
            now = pins.clock(connection, self._database.kind.now)
            _fill(report, gc.kept(connection, now, keep))
            dying = gc.unreachable(connection, now, keep)
            gone = set(gc.unheld_blobs(connection, self._domain))
            report.condemned_commits, report.condemned_blobs = gc.count_condemned(connection)
            report.waiting_objects = gc.count_waiting(connection)
            by_repository: dict[int, set[str]] = {}
            for number, commit, _ in dying:
                by_repository.setdefault(number, set()).add(commit)
            lost: dict[int, set[str]] = {}
            for number, commits in by_repository.items():
                repository = gc.repository(connection, number)
                lost[number] = set(gc.shown_by(connection, repository))
                for digest in gc.manifests_besides(connection, repository, commits):
                    lost[number] -= self._holds(digest, lost[number], report)
            gone |= gc.shown_nowhere_besides(connection, self._domain, lost)
            objects = gc.objects_of(connection, self._domain, gone)
        report.removed_commits = len(dying)
        report.removed_blobs = len(gone)
        report.removed_objects = len(objects)
        report.freed_bytes = sum(size for _, size in objects.values())
        repacker = Repacker(self.catalog, 0.0)
        for key, number in repacker.candidates(losing=gone):
            if key in {k for k, _ in objects.values()}:
                continue
            try:
                garbage = repacker.garbage(key, number, without=gone)
            except (NotFound, IntegrityError) as error:
                report.problems.append(f"{key} can't be looked at: {error.message}")
                continue
            if garbage is not None:
                report.rewritten_objects += 1
                report.rewritten_bytes += garbage

    def _now(self) -> float:
        with self._database.read() as connection:
            return pins.clock(connection, self._database.kind.now)


def _go_on(stopped: Callable[[], bool]) -> None:
    if stopped():
        raise Unavailable("the collection was stopped", hint="The next one goes on where it was.")


def _fill(report: Report, counts: dict[str, int]) -> None:
    report.commits = counts["all"]
    report.kept_refs, report.kept_history = counts["refs"], counts["history"]
    report.kept_pinned, report.kept_recent = counts["pinned"], counts["recent"]
