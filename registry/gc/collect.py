"""The collector: marks what nothing keeps, and removes what has been garbage for the grace.

1. *Mark.* Commits that no ref points at, nobody has pinned and that were not in use for ``keep_commits_s`` are
   condemned; so are blobs that no commit holds any more.
2. *Sweep.* What has been condemned for ``grace_s`` and is garbage still, as the transaction that removes it finds,
   goes: rows of commits, then, of their repositories, which blobs they show, then rows of blobs, their chunks and
   objects.
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
from typing import Final, TypeVar

from sqlalchemy.engine import Connection

from helios.errors import IntegrityError, NotFound, Unavailable
from helios.names import RepoId
from heliosfs.store.keys import commit_key, manifest_key
from registry.burial import bury
from registry.catalog import Catalog
from registry.gc.repack import Repacker
from registry.gc.report import Report
from registry.gc.turns import turn
from registry.metadata import claims, content, gc, pins
from registry.metadata.database import Changes, batches
from registry.metadata.repositories import Repository
from registry.removal import COUNT, finish_removals, forget_leftovers, slices

log = logging.getLogger("helios.registry.gc")

MARKS: Final = 500
"""Most rows condemned in one transaction."""
COMMITS: Final = 64
"""Most commits removed in one transaction."""

Found = TypeVar("Found", bound=tuple[object, ...])


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
        self._database = catalog.database

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
        with turn(self.catalog, "gc", "collecting garbage"):
            for what, step in (
                ("removing repositories", self._finish),
                ("cleaning up after pushes and pulls", self._clean),
                ("marking", self._mark),
                ("removing commits", self._sweep_commits),
                ("looking at what is left of their repositories", self._recount),
                ("removing files", self._sweep_blobs),
                ("rewriting packs", self._repack),
                ("deleting objects", self._bury),
            ):
                say(what)
                step(report, stopped)
        with self._database.read() as connection:
            report.condemned_commits, report.condemned_blobs = gc.count_condemned(connection)
            report.waiting_objects = gc.count_waiting(connection)
        log.info("collected", extra=report.result())
        return report

    # --- what sessions left ---

    def _finish(self, _report: Report, stopped: Callable[[], bool]) -> None:
        """Go on with removals of repositories that somebody was killed in."""
        finish_removals(self._database, self.times.lease_s, stopped)

    def _clean(self, _report: Report, _stopped: Callable[[], bool]) -> None:
        """Forget what ended sessions left, as they do themselves unless they are killed just then."""
        with self._database.read() as connection:
            if not content.any_unneeded(connection):
                return
        forget_leftovers(self._database)

    # --- mark ---

    def _mark(self, report: Report, stopped: Callable[[], bool]) -> None:
        """Nobody waits while garbage is looked for: writing transactions see to what was found, and look again."""
        keep = self.times.keep
        with self._database.write(changes=Changes.NOTHING) as connection:
            pins.forget_pins(connection, pins.clock(connection, self._database.kind.now))
        with self._database.read() as connection:
            _fill(report, gc.kept(connection, self._clock(connection), keep))
        self._each(lambda c: gc.commits_to_acquit(c, self._clock(c), keep, MARKS), gc.acquit_commits, stopped)
        self._each(lambda c: gc.blobs_to_acquit(c, MARKS), gc.acquit_blobs, stopped)
        self._each(
            lambda c: gc.commits_to_condemn(c, self._clock(c), keep, MARKS),
            lambda c, found: gc.condemn_commits(c, found, self._clock(c), keep),
            stopped,
        )
        self._each(
            lambda c: gc.blobs_to_condemn(c, MARKS),
            lambda c, found: gc.condemn_blobs(c, found, self._clock(c)),
            stopped,
        )

    def _each(
        self,
        look: Callable[[Connection], list[Found]],
        see_to: Callable[[Connection, list[Found]], None],
        stopped: Callable[[], bool],
    ) -> None:
        """See to what is found, at most ``MARKS`` at a time, until there is no more."""
        while True:
            _go_on(stopped)
            with self._database.read() as connection:
                found = look(connection)
            if found:
                with self._database.write(changes=Changes.NOTHING) as connection:
                    see_to(connection, found)
            if len(found) < MARKS:
                return

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
        """Remove those of the commits that are garbage still; returns how many, 0 for: look again."""
        with self._database.write() as connection:
            now = self._clock(connection)
            garbage = gc.still_garbage(connection, repository, dying, now, self.times.keep)
            if alive := dying.keys() - garbage.keys():
                gc.acquit_commits(connection, [(repository.id, commit) for commit in sorted(alive)])
                return 0
            gc.remove_commits(connection, repository, garbage, min(dying.values()))
            repo = RepoId.from_canonical(repository.name)
            records = {commit_key(repository.domain, repo, commit) for commit in garbage}
            records |= {manifest_key(repository.domain, digest) for digest in garbage.values()}
            claims.doom(connection, records, now + self.times.lease_s)
        return len(garbage)

    def _recount(self, report: Report, stopped: Callable[[], bool]) -> None:
        after = 0
        while True:
            with self._database.read() as connection:
                found = gc.to_recount(connection, after)
            if found is None:
                return
            after = found[0].id
            while not self._recounted(*found, report, stopped):
                _go_on(stopped)

    def _recounted(self, repository: Repository, since: float, report: Report, stopped: Callable[[], bool]) -> bool:
        """Take from what a repository shows all that no commit of it holds; whether nothing came between.

        What commits hold stands in their manifests, which are read before: if there is one more when it comes to
        removing, nothing is done. Where one can't be read all stays, and is looked at the next time.
        """
        with self._database.read() as connection:
            seen = gc.manifests_besides(connection, repository, ())
            lost = set(gc.shown_by(connection, repository))
        problems = len(report.problems)
        for digest in seen:
            if not lost:
                break
            lost -= self._holds(repository.domain, digest, lost, report)
        for batch in batches(sorted(lost)):
            _go_on(stopped)
            with self._database.write() as connection:
                if not gc.manifests_besides(connection, repository, ()) <= seen:
                    return False
                gc.remove_shown(connection, repository, batch, since)
        if len(report.problems) > problems:
            return True
        with self._database.write(changes=Changes.NOTHING) as connection:
            if not gc.manifests_besides(connection, repository, ()) <= seen:
                return False
            gc.recounted(connection, repository)
        return True

    def _holds(self, domain: str, digest: str, all_: set[str], report: Report) -> set[str]:
        """The blobs of a manifest; ``all_`` where it can't be read: what it holds must stay."""
        try:
            return {entry.sha256 for entry in self.catalog.contents.manifest_of(domain, digest).files.values()}
        except (NotFound, IntegrityError) as error:
            report.problems.append(f"a manifest can't be read, so its repository's files stay: {error.message}")
            return set(all_)

    def _sweep_blobs(self, report: Report, stopped: Callable[[], bool]) -> None:
        before = self._now() - self.times.grace_s
        for domain in self.catalog.stored_domains():
            self._sweep_domain(domain, before, report, stopped)

    def _sweep_domain(self, domain: str, before: float, report: Report, stopped: Callable[[], bool]) -> None:
        after = ""
        while True:
            _go_on(stopped)
            with self._database.read() as connection:
                due = gc.due_blobs(connection, domain, before, after, COUNT)
            if not due:
                return
            batch = [sha256 for sha256, _ in next(slices(due, lambda row: row[1]))]
            after = batch[-1]
            with self._database.write() as connection:
                until = self._clock(connection) + self.times.lease_s + self.times.grace_s
                removed = gc.remove_blobs(connection, domain, batch, until)
            report.removed_blobs += len(removed.blobs)
            report.busy_blobs += len(removed.claimed)
            report.removed_objects += removed.objects
            report.freed_bytes += removed.bytes

    def _repack(self, report: Report, stopped: Callable[[], bool]) -> None:
        repacker = Repacker(self.catalog, self.times.lease_s + self.times.grace_s)
        domains = self.catalog.stored_domains()
        for key, number in (found for domain in domains for found in repacker.candidates(domain)):
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
            now = self._clock(connection)
            _fill(report, gc.kept(connection, now, keep))
            dying = gc.unreachable(connection, now, keep)
            report.condemned_commits, report.condemned_blobs = gc.count_condemned(connection)
            report.waiting_objects = gc.count_waiting(connection)
            by_repository: dict[int, set[str]] = {number: set() for number in gc.all_to_recount(connection)}
            for number, commit, _ in dying:
                by_repository.setdefault(number, set()).add(commit)
            lost: dict[str, dict[int, set[str]]] = {}
            for number, commits in by_repository.items():
                repository = gc.repository(connection, number)
                left = set(gc.shown_by(connection, repository))
                for digest in gc.manifests_besides(connection, repository, commits):
                    left -= self._holds(repository.domain, digest, left, report)
                lost.setdefault(repository.domain, {})[number] = left
        report.removed_commits = len(dying)
        for domain in self.catalog.stored_domains():
            self._plan_domain(domain, lost.get(domain, {}), report)

    def _plan_domain(self, domain: str, lost: dict[int, set[str]], report: Report) -> None:
        """What would go of a domain whose repositories lose these blobs."""
        with self._database.read() as connection:
            gone = set(gc.unheld_blobs(connection, domain)) | gc.shown_nowhere_besides(connection, domain, lost)
            objects = gc.objects_of(connection, domain, gone)
        report.removed_blobs += len(gone)
        report.removed_objects += len(objects)
        report.freed_bytes += sum(size for _, size in objects.values())
        repacker = Repacker(self.catalog, 0.0)
        for key, number in repacker.candidates(domain, losing=gone):
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
            return self._clock(connection)

    def _clock(self, connection: Connection) -> float:
        return pins.clock(connection, self._database.kind.now)


def _go_on(stopped: Callable[[], bool]) -> None:
    if stopped():
        raise Unavailable("the collection was stopped", hint="The next one goes on where it was.")


def _fill(report: Report, counts: dict[str, int]) -> None:
    report.commits = counts["all"]
    report.kept_refs, report.kept_history = counts["refs"], counts["history"]
    report.kept_pinned, report.kept_recent = counts["pinned"], counts["recent"]
