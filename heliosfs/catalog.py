"""What the registry says about names and commits, remembered for as long as it may be believed.

Refs and lists of repositories are believed for ``NAME_TTL_S``; commits and manifests for ever. While no registry
answers, names keep the last value that was seen and commits that were seen stay readable; a name never seen raises
Unavailable, which a reader sees as EIO, never as "no such file" (asking.py). What was seen survives a restart
(records.py).

All methods run in one trio loop; the registry's and the disk's blocking calls in threads. State changes only between
waits, and one question is asked once however many tasks wait for it.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Final, Protocol, TypeVar

import trio

from helios.errors import NotFound, Unavailable
from helios.names import RepoId
from heliosfs.asking import NEVER, PATIENCE, Asking, Patience
from heliosfs.flights import Flights
from heliosfs.records import Records, SeenCommit
from heliosfs.snapshots import Snapshots, Unusable, build
from heliosfs.store.manifest import CommitRecord
from heliosfs.tiers.silence import HANG_S, Asked
from heliosfs.tree.snapshot import Snapshot
from heliosfs.tree.source import NAME_TTL_S, UNKNOWN_TTL_S, Known, Repos

log = logging.getLogger("heliosfs.catalog")

T = TypeVar("T")

MAX_ABSENT: Final = 10_000
"""Repositories and commits remembered as absent."""

DISK_THREADS: Final = 4
"""What was seen is read and written in threads of its own: it does not wait for a registry that is silent."""

REPOS: Final = ("repos",)


class Registry(Protocol):
    """What is asked of a registry. Calls block for at most ``timeout_s`` and raise HeliosError."""

    def listing(self, timeout_s: float) -> Mapping[RepoId, Mapping[str, str]]:
        """Every repository with its refs."""

    def refs(self, repo: RepoId, timeout_s: float) -> Mapping[str, str]:
        """One repository's refs; RepoNotFound."""

    def commit(self, repo: RepoId, commit: str, timeout_s: float) -> CommitRecord:
        """A commit's record; RepoNotFound, RevisionNotFound."""

    def manifest(self, repo: RepoId, commit: str, timeout_s: float) -> bytes:
        """The manifest record's bytes."""


class Kept(Protocol):
    """Commits that stay readable whatever the registry says of them: the volumes'."""

    def commit(self, repo: RepoId, commit: str) -> SeenCommit | None:
        """The commit, if it is one of these."""

    def manifest(self, digest: str) -> bytes | None:
        """The record of such a commit's manifest, if it is here. Blocks; called from threads."""


class NothingKept:
    """No commit is kept."""

    def commit(self, repo: RepoId, commit: str) -> SeenCommit | None:
        return None

    def manifest(self, digest: str) -> bytes | None:
        return None


NOTHING_KEPT: Final = NothingKept()


class Catalog:
    """A ``heliosfs.tree.source.Source`` on a registry."""

    def __init__(
        self,
        registry: Registry,
        records: Records,
        kept: Kept = NOTHING_KEPT,
        *,
        patience: Patience = PATIENCE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry, self._records, self._kept, self._clock = registry, records, kept, clock
        self._asking = Asking(patience, clock)
        self._limiter, self._asked = trio.CapacityLimiter(DISK_THREADS), Asked()
        self._flights: Flights[tuple[str, ...]] = Flights()
        self._refs: dict[RepoId, Known[Mapping[str, str]]] = {}
        self._repos: Known[Repos] | None = None
        self._commits: dict[RepoId, dict[str, SeenCommit]] = {}
        self._absent: dict[tuple[RepoId, str | None], float] = {}  # commits, and (None) whole repositories
        self._snapshots = Snapshots()

    async def load(self) -> None:
        """Take up what was seen before a restart, as values that are to be asked for again."""
        seen = await trio.to_thread.run_sync(self._records.load)
        for repo, refs in seen.refs.items():
            self._refs[repo] = Known(refs, NEVER)
        for record in seen.commits:
            self._commits.setdefault(record.repo, {})[record.commit] = record
        if seen.refs:
            self._repos = Known(Repos.of(seen.refs), NEVER)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Notice when a registry that was away answers again; without it the catalog may not. Returns never."""
        await self._asking.run(task_status=task_status)

    @property
    def answering(self) -> bool:
        """Whether the last question was answered."""
        return self._asking.answering

    @property
    def snapshot_bytes(self) -> int:
        """Memory that the snapshots take, about."""
        return self._snapshots.bytes

    # --- names ---

    async def repos(self, *, fresh: bool = False) -> Known[Repos]:
        since = self._clock() - (0.0 if fresh else NAME_TTL_S)
        known = self._repos
        try:
            while known is None or known.at < since:  # an answer that we share may have been asked for too early
                known = await self._flights.share((*REPOS, str(fresh)), lambda: self._ask_repos(fresh))
        except Unavailable:
            if fresh or known is None:
                raise
            return Known(known.value, self._clock())
        return known

    async def refs(self, repo: RepoId, *, fresh: bool = False) -> Known[Mapping[str, str] | None]:
        since = self._clock() - (0.0 if fresh else NAME_TTL_S)
        absent = self._known_absent(repo, None)
        if absent is not None:
            return Known(None, absent)
        known: Known[Mapping[str, str] | None] | None = self._refs.get(repo)  # type: ignore[assignment]
        try:
            while known is None or known.at < since:
                work = ("refs", str(repo), str(fresh))  # who needs an answer shares none that gave up at once
                known = await self._flights.share(work, lambda: self._ask_refs(repo, fresh))
        except Unavailable:
            if fresh or known is None:
                raise
            return Known(known.value, self._clock())
        return known

    # --- commits ---

    async def commit_time(self, repo: RepoId, commit: str) -> Known[int | None]:
        record = await self._commit(repo, commit)
        return Known(None if record is None else record.time, self._said(repo, commit))

    async def snapshot(self, repo: RepoId, commit: str) -> Known[Snapshot | None]:
        snapshot = self._snapshots.get(repo, commit)
        if snapshot is None:
            work = ("snapshot", str(repo), commit)
            snapshot = await self._flights.share(work, lambda: self._load_snapshot(repo, commit))
        return Known(snapshot, self._said(repo, commit))

    async def seen(self, repo: RepoId) -> Known[tuple[str, ...]]:
        refs = await self.refs(repo)
        commits = dict.fromkeys((refs.value or {}).values())
        commits |= dict.fromkeys(reversed(self._commits.get(repo, {})))
        return Known(tuple(commits), refs.at)

    def commits(self, most: int) -> list[tuple[RepoId, str]]:
        """Commits that were seen, the latest of each repository first, at most so many of them."""
        found = ((repo, commit) for repo, commits in self._commits.items() for commit in reversed(commits))
        return list(itertools.islice(found, most))

    async def told(self, repo: RepoId, commit: str, summary: Callable[[Snapshot], T]) -> T | None:
        """What a function says of a seen commit, in a thread; None where its files are not known. Asks nobody."""
        snapshot, record = self._snapshots.peek(repo, commit), self._commits.get(repo, {}).get(commit)

        def tell() -> T | None:
            if snapshot is not None:
                return summary(snapshot)
            if record is None or self._snapshots.refused(record.manifest) is not None:
                return None
            data = self._recorded(record.manifest)
            with suppress(Unusable):  # whoever asks for it is told
                return None if data is None else summary(build(record, data).snapshot)
            return None

        return await self._in_thread(tell)

    def refs_at(self, repo: RepoId, commit: str) -> list[str]:
        """The refs that named this commit when they were last asked for, sorted."""
        known = self._refs.get(repo)
        return [] if known is None else sorted(ref for ref, value in known.value.items() if value == commit)

    # --- asking ---

    async def _ask_repos(self, patient: bool) -> Known[Repos]:
        asked = self._clock()
        listing = await self._asking.ask(self._registry.listing, fallback=self._repos is not None, patient=patient)
        self._repos = answer = Known(Repos.of(listing), asked)
        await self._dropped([repo for repo in self._refs if repo not in listing], asked)
        await self._learned(listing, asked)
        return answer

    async def _ask_refs(self, repo: RepoId, patient: bool) -> Known[Mapping[str, str] | None]:
        asked, ask = self._clock(), partial(self._registry.refs, repo)
        try:
            refs = await self._asking.ask(ask, fallback=repo in self._refs, patient=patient)
        except NotFound:
            self._note_absent(repo, None, asked)
            await self._dropped([repo], asked)
            return Known(None, asked)
        await self._learned({repo: refs}, asked)
        return Known(refs, asked)

    async def _commit(self, repo: RepoId, commit: str) -> SeenCommit | None:
        record = self._commits.get(repo, {}).get(commit) or self._kept.commit(repo, commit)
        if record is not None or self._known_absent(repo, commit) is not None:
            return record
        return await self._flights.share(("commit", str(repo), commit), lambda: self._ask_commit(repo, commit))

    async def _ask_commit(self, repo: RepoId, commit: str) -> SeenCommit | None:
        asked = self._clock()
        try:
            ask = partial(self._registry.commit, repo, commit)
            found = await self._asking.ask(ask, fallback=False, patient=True)
        except NotFound:
            self._note_absent(repo, commit, asked)
            return None
        record = SeenCommit(repo, commit, found.manifest, found.time)
        self._commits.setdefault(repo, {})[commit] = record
        self._absent.pop((repo, commit), None)
        await self._in_thread(lambda: self._records.add_commit(record))
        return record

    async def _load_snapshot(self, repo: RepoId, commit: str) -> Snapshot | None:
        record = await self._commit(repo, commit)
        if record is None:
            return None
        if (why := self._snapshots.refused(record.manifest)) is not None:
            raise Unusable(why)
        data = await self._in_thread(lambda: self._recorded(record.manifest))
        known = data is not None
        if data is None:
            ask = partial(self._registry.manifest, repo, commit)
            data = await self._asking.ask(ask, fallback=False, patient=True)
        snapshot = await self._snapshots.make(record, data)
        if not known:
            await self._in_thread(lambda: self._records.add_manifest(record.manifest, data))
        return snapshot

    def _recorded(self, digest: str) -> bytes | None:
        return self._records.manifest(digest) or self._kept.manifest(digest)

    async def _learned(self, listing: Mapping[RepoId, Mapping[str, str]], asked: float) -> None:
        """Take refs in, unless a question asked later was answered sooner."""
        changed = {}
        for repo, refs in listing.items():
            old = self._refs.get(repo, Known({}, NEVER))
            if old.at < asked:
                self._refs[repo] = Known(refs, asked)
                self._absent.pop((repo, None), None)
                if old.value != refs:
                    changed[repo] = refs
        if changed:
            await self._in_thread(lambda: self._records.set_refs(changed))

    async def _dropped(self, repos: Iterable[RepoId], asked: float) -> None:
        """The registry has these repositories no more: what they held is no longer shown."""
        gone = [repo for repo in repos if self._refs.get(repo, Known({}, NEVER)).at < asked]
        known = [repo for repo in gone if self._refs.pop(repo, None) is not None]
        for repo in gone:
            for commit in self._commits.pop(repo, {}):
                self._snapshots.drop(repo, commit)
        if known:
            await self._in_thread(lambda: self._records.drop(known))

    def _known_absent(self, repo: RepoId, commit: str | None) -> float | None:
        """When the registry said that there is no such thing, if that may still be believed."""
        said = self._absent.get((repo, commit))
        return said if said is not None and self._clock() < said + UNKNOWN_TTL_S else None

    def _note_absent(self, repo: RepoId, commit: str | None, asked: float) -> None:
        if len(self._absent) >= MAX_ABSENT:
            self._absent.clear()
        self._absent[repo, commit] = asked

    def _said(self, repo: RepoId, commit: str) -> float:
        """When the registry spoke of a commit: for one that exists that matters no more."""
        return self._absent.get((repo, commit), self._clock())

    async def _in_thread(self, call: Callable[[], T]) -> T | None:
        """Ask the records, or tell them something. None, and no more until it answers, where their disk hangs: they are
        only a cache."""

        def asking() -> T:
            with self._asked.call():
                return call()

        if self._asked.longest() < HANG_S:
            with trio.move_on_after(HANG_S):
                return await trio.to_thread.run_sync(asking, abandon_on_cancel=True, limiter=self._limiter)
            log.warning("what is seen of the registry can't be kept: the disk does not answer")
        return None
