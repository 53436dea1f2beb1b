"""Replication: repositories of another registry brought here, by the difference of manifests.

Pull-based: this registry asks its peer. For each ref that may follow (registry/transfer/refs.py) it looks at the
commit, brings what it lacks, oldest first, and moves the ref. One that may not stays, and the conflict is reported.
Notices come first, so that a model which was retired there is retired here whatever else goes wrong. What the peer
removed stays here; removing is a decision of each registry.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Final

from helios import registry_answers as answers
from helios.errors import (
    Conflict,
    HeliosError,
    IntegrityError,
    InvalidInput,
    RepoNotFound,
    RevisionNotFound,
    Unavailable,
)
from helios.names import RepoId, check_ref, is_commit
from helios.registry_answers import Commit, RefTable, Repo
from heliosfs.store.manifest import CommitRecord, FileEntry
from heliosfs.store.recipe import Recipe
from registry.catalog import Catalog
from registry.ingest import Source
from registry.metadata import repositories
from registry.metadata.notices import REPLICA, WHOLE, Notice
from registry.metadata.repositories import Move
from registry.sessions import Sessions
from registry.transfer.arrive import Arrivals, check_record
from registry.transfer.peer import Peer, PeerSource
from registry.transfer.refs import check_kind, obstacle

log = logging.getLogger("helios.registry.transfer")

PROBLEMS: Final = 1000
"""Most problems that are reported."""
HISTORY: Final = 1000
"""Most commits of one ref that are looked at."""


@dataclass(slots=True)
class Outcome:
    """What a replication did; bytes that travelled, of the bytes of all files brought; ``notices`` put up, changed and
    taken down."""

    commits: int = 0
    refs: int = 0
    notices: int = 0
    logical_bytes: int = 0
    travelled_bytes: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _PeerOrigin:
    """A commit's content at the peer."""

    peer: Peer
    repo: RepoId
    stopped: Callable[[], bool]

    def recipe(self, path: str, entry: FileEntry) -> Recipe:
        return self.peer.recipe(self.repo, entry.sha256, entry.recipe, entry.size)

    def chunks(self, path: str, recipe: Recipe, numbers: list[int], until: ExitStack) -> Source:
        source = PeerSource(self.peer, self.repo, recipe, numbers, self.stopped)
        until.callback(source.close)
        return source


@dataclass(frozen=True, slots=True)
class _Run:
    """One replication: from whom, and who is told."""

    peer: Peer
    history: bool
    say: Callable[[str], None]
    stopped: Callable[[], bool]
    outcome: Outcome = field(default_factory=Outcome)

    @property
    def author(self) -> str:
        """Who moves refs here and puts notices up."""
        return f"{REPLICA}{self.peer.url}"

    def check(self) -> None:
        if self.stopped():
            raise Unavailable("the replication was stopped", hint="Start it again: what is here stays.")

    def problem(self, what: str) -> None:
        """Keep what went wrong, once each, as long as there are not too many of them to be read."""
        if len(self.outcome.problems) < PROBLEMS and what not in self.outcome.problems:
            self.outcome.problems.append(what)
            self.say(what)


class Replicator:
    """Brings a peer's repositories here. Blocks; called in a thread."""

    def __init__(self, catalog: Catalog, sessions: Sessions) -> None:
        self._catalog, self._arrivals = catalog, Arrivals(catalog, sessions)

    def run(
        self,
        peer: Peer,
        patterns: Sequence[str],
        *,
        history: bool,
        say: Callable[[str], None],
        stopped: Callable[[], bool],
    ) -> Outcome:
        """Bring the repositories whose id fits a pattern; ``history`` brings all commits of a ref, not only its last.

        A repository or ref that fails is reported and does not stop the others. Raises Unavailable when the peer can't
        be reached or ``stopped`` says so.
        """
        run = _Run(peer, history, say, stopped)
        for found in peer.repos():
            try:
                wanted = any(fnmatch.fnmatchcase(found.id.id, pattern) for pattern in patterns)
            except InvalidInput as error:
                run.problem(error.message[:200])
                continue
            if wanted:
                try:
                    self._bring(run, found)
                except HeliosError as error:
                    self._failed(run, found.id, None, error)
            run.check()
        return run.outcome

    def _bring(self, run: _Run, found: Repo) -> None:
        repo = found.id
        told = [_notice(each) for each in run.peer.notices(repo)]
        self._heed(run, repo, told)
        away = self._retired(repo)
        away |= {notice.commit for notice in told if notice.state == "retired"}
        if WHOLE in away:  # the peer does not give it out, or nobody here could use it
            run.say(f"{repo.id} is retired: nothing more of it is brought")
            return
        brought = run.outcome.commits
        for ref, commit in found.refs.items():
            if run.stopped():
                return
            try:
                self._ref(run, repo, check_ref(ref), commit, found.kinds.get(ref, "branch"), away)
            except HeliosError as error:
                self._failed(run, repo, ref, error)
        if told and run.outcome.commits > brought:  # of what has come only now
            self._heed(run, repo, told)

    def _failed(self, run: _Run, repo: RepoId, ref: str | None, error: HeliosError) -> None:
        what = {"repo": str(repo), "ref": None if ref is None else ref[:250]}
        log.warning("not replicated", extra=what | {"peer": run.peer.url, "error": error.message})
        run.problem(f"{repo.id}{'' if ref is None else f'@{ref[:250]}'}: {error.message}")

    def _heed(self, run: _Run, repo: RepoId, told: list[Notice]) -> None:
        done = self._catalog.heed(repo, told, run.author, complete=True)
        run.outcome.notices += done.changes
        for notice in done.up:
            run.say(notice.text(f"{repo.id}{'@' + notice.commit if notice.commit else ''}"))
        for notice in done.ignored:
            what = f"{repo.id}{'@' + notice.commit if notice.commit else ''}"
            run.problem(f"{what} is retired at {run.peer.url}; a later notice of this registry keeps it in use here")

    def _retired(self, repo: RepoId) -> set[str]:
        """What is retired here."""
        try:
            return {notice.commit for notice in self._catalog.notices_on(repo) if notice.state == "retired"}
        except RepoNotFound:
            return set()

    def _ref(self, run: _Run, repo: RepoId, ref: str, commit: str, kind: str, retired: set[str]) -> None:
        if not is_commit(commit):
            raise IntegrityError(f"{run.peer.url} says that it points at {commit[:80]!r}, which is no commit")
        check_kind(kind, run.peer.url)
        here = self._here(repo)
        old, followed, last = here.refs.get(ref), self._moved(repo, ref, REPLICA), self._moved(repo, ref)
        if old == commit:
            # It may have come as another kind, from a peer that did not tell.
            ours = followed is not None and (followed.author, followed.new) == (run.author, old)
            if ours and here.kinds.get(ref, "branch") != kind:
                self._catalog.follow_ref(repo, ref, commit, old, author=run.author, kind=kind)
            return
        if commit in retired:
            run.say(f"{repo.id}@{ref} is at a commit that is retired, {commit}: it is not brought")
            return
        records = run.peer.history(repo, commit, HISTORY)
        if not records or records[0].commit != commit:
            raise RevisionNotFound(f"{run.peer.url} has no commit {commit}, which its ref {ref} names")
        why = obstacle(old, [record.commit for record in records], run.author, followed, last)
        if why is not None:
            raise Conflict(f"{why}; it stays there, and at {run.peer.url} it is at {commit}")
        wanted = [told for told in records if told.commit not in retired] if run.history else records[:1]
        held = self._held(repo, [told.commit for told in wanted])
        for told in reversed(wanted):
            if told.commit not in held:
                self._commit(run, repo, told)
        self._catalog.follow_ref(repo, ref, commit, old, author=run.author, kind=kind)
        run.outcome.refs += 1
        run.say(f"{repo.id}@{ref} is {commit}")

    def _commit(self, run: _Run, repo: RepoId, told: Commit) -> None:
        record = CommitRecord(
            told.repo, told.commit, told.manifest, told.author, told.time, told.message, told.parent, told.lineage
        )
        check_record(repo, record)
        manifest = run.peer.manifest(repo, told)
        origin = _PeerOrigin(run.peer, repo, run.stopped)
        arrived = self._arrivals.bring(repo, record, manifest, origin, lambda path, done, size: None)
        run.outcome.commits += 1
        run.outcome.logical_bytes += arrived.logical
        run.outcome.travelled_bytes += arrived.travelled
        run.say(f"{repo.id}: commit {told.commit}, {arrived.travelled} of {arrived.logical} bytes travelled")

    def _moved(self, repo: RepoId, ref: str, by: str = "") -> Move | None:
        """The ref's last move; of those ``by`` somebody whose name begins so."""
        with self._catalog.database.read() as connection:
            return next(iter(repositories.moves_of(connection, repo, ref, 1, by)), None)

    def _held(self, repo: RepoId, commits: list[str]) -> set[str]:
        """Those of the commits that are here."""
        with self._catalog.database.read() as connection:
            found = repositories.find(connection, repo)
            return set() if found is None else repositories.held_of(connection, found, commits)

    def _here(self, repo: RepoId) -> RefTable:
        try:
            return RefTable(self._catalog.refs(repo), self._catalog.ref_kinds(repo))
        except RepoNotFound:
            return RefTable({})


def _notice(told: answers.Notice) -> Notice:
    return Notice(told.commit, told.state, told.message, told.replacement, told.author, told.time)
