"""Replication: repositories of another registry brought here, by the difference of manifests.

Pull-based: this registry asks its peer. For each ref it looks at the commit, and brings those it lacks, oldest first.
Then the ref follows, but never over somebody's own work: it moves if it is new here, if the last who moved it was this
replication, or if it points at an ancestor of where it is to point. Otherwise it stays, and the conflict is reported.
What the peer removed stays here; removing is a decision of each registry.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Final

from helios.errors import Conflict, HeliosError, RepoNotFound, RevisionNotFound, Unavailable
from helios.names import RepoId, check_ref
from helios.registry_client import Commit
from heliosfs.store.manifest import CommitRecord, FileEntry
from heliosfs.store.recipe import Recipe
from registry.catalog import Catalog
from registry.ingest import Source
from registry.metadata import repositories
from registry.sessions import Sessions
from registry.transfer.arrive import Arrivals, check_record
from registry.transfer.peer import Peer, PeerSource

log = logging.getLogger("helios.registry.transfer")

HISTORY: Final = 1000
"""Most commits of one ref that are looked at."""


@dataclass(slots=True)
class Outcome:
    """What a replication did; bytes that travelled, of the bytes of all files brought."""

    commits: int = 0
    refs: int = 0
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
        outcome = Outcome()
        for found in peer.repos():
            if not any(fnmatch.fnmatchcase(found.id.id, pattern) for pattern in patterns):
                continue
            for ref, commit in found.refs.items():
                if stopped():
                    raise Unavailable("the replication was stopped", hint="Start it again: what is here stays.")
                try:
                    self._ref(peer, found.id, check_ref(ref), commit, outcome, history, say, stopped)
                except HeliosError as error:
                    outcome.problems.append(f"{found.id.id}@{ref}: {error.message}")
                    log.warning(
                        "a ref was not replicated",
                        extra={"repo": found.repo, "ref": ref, "peer": peer.url, "error": error.message},
                    )
                    say(outcome.problems[-1])
        return outcome

    def _ref(
        self,
        peer: Peer,
        repo: RepoId,
        ref: str,
        commit: str,
        outcome: Outcome,
        history: bool,
        say: Callable[[str], None],
        stopped: Callable[[], bool],
    ) -> None:
        here = self._here(repo)
        if here.get(ref) == commit:
            return
        records = peer.history(repo, commit, HISTORY)
        if not records or records[0].commit != commit:
            raise RevisionNotFound(f"{peer.url} has no commit {commit}, which its ref {ref} names")
        for told in reversed(records if history else records[:1]):
            if not self._catalog.holds(repo, told.commit):
                self._commit(peer, repo, told, outcome, say, stopped)
        self._follow(peer, repo, ref, here.get(ref), records)
        outcome.refs += 1
        say(f"{repo.id}@{ref} is {commit}")

    def _commit(
        self,
        peer: Peer,
        repo: RepoId,
        told: Commit,
        outcome: Outcome,
        say: Callable[[str], None],
        stopped: Callable[[], bool],
    ) -> None:
        record = CommitRecord(
            told.repo, told.commit, told.manifest, told.author, told.time, told.message, told.parent, told.lineage
        )
        check_record(repo, record)
        manifest = peer.manifest(repo, told)
        origin = _PeerOrigin(peer, repo, stopped)
        arrived = self._arrivals.bring(repo, record, manifest, origin, lambda path, done, size: None)
        outcome.commits += 1
        outcome.logical_bytes += arrived.logical
        outcome.travelled_bytes += arrived.travelled
        say(f"{repo.id}: commit {told.commit}, {arrived.travelled} of {arrived.logical} bytes travelled")

    def _follow(self, peer: Peer, repo: RepoId, ref: str, old: str | None, records: list[Commit]) -> None:
        """Move the ref unless that would undo what somebody did here."""
        author = f"replica of {peer.url}"
        new = records[0].commit
        if old is not None and old not in {record.commit for record in records}:
            with self._catalog.database.read() as connection:
                moves = repositories.moves_of(connection, repo, ref, 1)
            if not moves or moves[0].author != author:
                raise Conflict(f"the ref is at {old} here, which the peer's history does not hold; it stays there")
        self._catalog.set_ref(repo, ref, new, old, author=author)

    def _here(self, repo: RepoId) -> dict[str, str]:
        try:
            return self._catalog.refs(repo)
        except RepoNotFound:
            return {}
