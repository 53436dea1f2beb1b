"""What the registry says about names and commits, remembered for as long as it may be believed.

Refs and lists of repositories are believed for ``NAME_TTL_S``; commits and manifests for ever. While no registry
answers, names keep the last value that was seen and commits that were seen stay readable; a name never seen raises
Unavailable, which a reader sees as EIO, never as "no such file". What was seen survives a restart (records.py).

All methods run in one trio loop; the registry's and the disk's blocking calls in threads. State changes only between
waits, and one question is asked once however many tasks wait for it.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

import trio

from helios.errors import DeadlineExceeded, IntegrityError, NotFound, Unavailable
from helios.names import RepoId
from heliosfs.flights import Flights
from heliosfs.records import Records, SeenCommit
from heliosfs.store.bulk import MAX_DIRECTORY_BYTES, directory_bytes
from heliosfs.store.manifest import CommitRecord, Manifest
from heliosfs.tree.snapshot import Snapshot
from heliosfs.tree.source import NAME_TTL_S, UNKNOWN_TTL_S, Known, Repos

log = logging.getLogger("heliosfs.catalog")

T = TypeVar("T")

SNAPSHOT_BYTES: Final = 64 << 20
"""Memory of the snapshots that are kept, in bytes; the least recently used goes. The last one asked for stays, whatever
its size: no manifest of more than 32 MiB is taken (metadata.py), so none has more than 128 MiB."""

INFLATION: Final = 3
"""A snapshot takes at most so many times its manifest's bytes, beside its directories."""

MAX_ABSENT: Final = 10_000
"""Repositories and commits remembered as absent."""

MAX_REFUSED: Final = 1000
"""Manifests remembered as unusable."""

NEVER: Final = -1e9
"""A time long ago, in seconds of the monotonic clock."""

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


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a registry may take, in seconds: for a name never seen, and for one whose last value would do."""

    unknown_s: float = 5.0
    known_s: float = 2.0
    pause_s: float = 1.0
    """After a failure nobody asks again for this long, doubled with every failure up to ``longest_pause_s``."""
    longest_pause_s: float = 5.0


class Unusable(IntegrityError):
    """A manifest that is the commit's, and can't be shown: it will be no better when it is asked for again."""


@dataclass(frozen=True, slots=True)
class _Held:
    """A snapshot in memory, and the bytes that it takes there."""

    snapshot: Snapshot
    cost: int


class Catalog:
    """A ``heliosfs.tree.source.Source`` on a registry."""

    def __init__(
        self,
        registry: Registry,
        records: Records,
        kept: Kept = NOTHING_KEPT,
        *,
        patience: Patience = Patience(),
        clock: Callable[[], float] = time.monotonic,
        threads: int = 8,
    ) -> None:
        self._registry, self._records, self._kept = registry, records, kept
        self._patience, self._clock = patience, clock
        self._limiter = trio.CapacityLimiter(threads)
        self._flights: Flights[tuple[str, ...]] = Flights()
        self._refs: dict[RepoId, Known[Mapping[str, str]]] = {}
        self._repos: Known[Repos] | None = None
        self._commits: dict[RepoId, dict[str, SeenCommit]] = {}
        self._absent: dict[tuple[RepoId, str | None], float] = {}  # commits, and (None) whole repositories
        self._snapshots: OrderedDict[tuple[RepoId, str], _Held] = OrderedDict()
        self._refused: dict[str, str] = {}  # by the manifest's digest: why
        self._one_at_a_time = trio.CapacityLimiter(1)
        self.snapshot_bytes = 0
        """Memory that the snapshots take, about."""
        self._pause = 0.0
        self._quiet_until = NEVER

    async def load(self) -> None:
        """Take up what was seen before a restart, as values that are to be asked for again."""
        seen = await trio.to_thread.run_sync(self._records.load)
        for repo, refs in seen.refs.items():
            self._refs[repo] = Known(refs, NEVER)
        for record in seen.commits:
            self._commits.setdefault(record.repo, {})[record.commit] = record
        if seen.refs:
            self._repos = Known(Repos.of(seen.refs), NEVER)

    @property
    def answering(self) -> bool:
        """Whether the last question was answered."""
        return self._pause == 0.0

    # --- names ---

    async def repos(self, *, fresh: bool = False) -> Known[Repos]:
        since = self._clock() - (0.0 if fresh else NAME_TTL_S)
        known = self._repos
        try:
            while known is None or known.at < since:  # an answer that we share may have been asked for too early
                known = await self._flights.share(REPOS, self._ask_repos)
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
                known = await self._flights.share(("refs", str(repo)), lambda: self._ask_refs(repo))
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
        held = self._snapshots.get((repo, commit))
        snapshot = None if held is None else held.snapshot
        if snapshot is None:
            work = ("snapshot", str(repo), commit)
            snapshot = await self._flights.share(work, lambda: self._load_snapshot(repo, commit))
        if (repo, commit) in self._snapshots:
            self._snapshots.move_to_end((repo, commit))
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
        held, record = self._snapshots.get((repo, commit)), self._commits.get(repo, {}).get(commit)

        def tell() -> T | None:
            if held is not None:
                return summary(held.snapshot)
            data = self._recorded(record.manifest) if record and record.manifest not in self._refused else None
            with suppress(Unusable):  # whoever asks for it is told
                return summary(_snapshot(record, data).snapshot) if record and data is not None else None
            return None

        return await self._in_thread(tell)

    def refs_at(self, repo: RepoId, commit: str) -> list[str]:
        """The refs that named this commit when they were last asked for, sorted."""
        known = self._refs.get(repo)
        return [] if known is None else sorted(ref for ref, value in known.value.items() if value == commit)

    # --- asking ---

    async def _ask_repos(self) -> Known[Repos]:
        asked = self._clock()
        listing = await self._ask(self._registry.listing, self._repos is not None)
        self._repos = answer = Known(Repos.of(listing), asked)
        await self._dropped([repo for repo in self._refs if repo not in listing], asked)
        await self._learned(listing, asked)
        return answer

    async def _ask_refs(self, repo: RepoId) -> Known[Mapping[str, str] | None]:
        asked = self._clock()
        try:
            refs = await self._ask(lambda timeout_s: self._registry.refs(repo, timeout_s), repo in self._refs)
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
            found = await self._ask(lambda timeout_s: self._registry.commit(repo, commit, timeout_s), known=False)
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
        if (why := self._refused.get(record.manifest)) is not None:
            raise Unusable(why)
        data = await self._in_thread(lambda: self._recorded(record.manifest))
        known = data is not None
        if data is None:
            data = await self._ask(lambda timeout_s: self._registry.manifest(repo, commit, timeout_s), known=False)
        try:
            held = await trio.to_thread.run_sync(_snapshot, record, data, limiter=self._one_at_a_time)
        except Unusable as error:
            if len(self._refused) >= MAX_REFUSED:
                self._refused.clear()
            self._refused[record.manifest] = error.message
            raise
        if not known:
            await self._in_thread(lambda: self._records.add_manifest(record.manifest, data))
        self._snapshots[repo, commit] = held
        self.snapshot_bytes += held.cost
        while self.snapshot_bytes > SNAPSHOT_BYTES and len(self._snapshots) > 1:
            _, old = self._snapshots.popitem(last=False)
            self.snapshot_bytes -= old.cost
        return held.snapshot

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
                if (held := self._snapshots.pop((repo, commit), None)) is not None:
                    self.snapshot_bytes -= held.cost
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

    async def _ask(self, call: Callable[[float], T], known: bool) -> T:
        """Ask the registry, again for a while when it does not answer; raises Unavailable in the end.

        ``known``: there is a last value to fall back on, so it is not worth waiting for long.
        """
        if self._clock() < self._quiet_until:
            raise Unavailable("the registry does not answer")
        patience = self._patience.known_s if known else self._patience.unknown_s
        end = self._clock() + patience
        pause = 0.05
        while True:
            try:
                with trio.fail_after(max(0.0, end - self._clock()) + 0.5):
                    value = await self._in_thread(lambda: call(max(0.05, end - self._clock())))
            except (Unavailable, trio.TooSlowError) as error:
                again = self._pause == 0.0 and self._clock() + pause < end
                if again:
                    await trio.sleep(pause)
                    pause *= 2
                    continue
                self._silent(error)
                raise DeadlineExceeded("the registry does not answer") from error
            except NotFound:
                self._answered()
                raise
            self._answered()
            return value

    def _silent(self, error: Exception) -> None:
        if self._pause == 0.0:
            log.warning(
                "the registry does not answer: names keep their last value, unknown ones give EIO",
                extra={"reason": str(error) or "no answer before the deadline"},
            )
        self._pause = min(self._patience.longest_pause_s, max(self._patience.pause_s, self._pause * 2))
        self._quiet_until = self._clock() + self._pause

    def _answered(self) -> None:
        if self._pause:
            log.info("the registry answers again")
        self._pause, self._quiet_until = 0.0, NEVER

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=self._limiter)


def _snapshot(record: SeenCommit, data: bytes) -> _Held:
    """A snapshot from its manifest's record, checked and indexed. In a thread, one at a time: big ones take their time,
    and for a moment several times their size in memory. Raises IntegrityError; Unusable where it will stay so."""
    if hashlib.sha256(data).hexdigest() != record.manifest:
        raise IntegrityError(f"what is said to be the manifest of {record.repo} at {record.commit} is not it")
    try:
        files = Manifest.decode(data).files
    except IntegrityError as error:
        raise Unusable(f"the manifest of {record.repo} at {record.commit} can't be used: {error.message}") from None
    cost = directory_bytes(files)
    if cost > MAX_DIRECTORY_BYTES:
        raise Unusable(f"the manifest of {record.repo} at {record.commit} names too many directories")
    return _Held(Snapshot(record.repo, record.commit, record.time, files), cost + INFLATION * len(data))
