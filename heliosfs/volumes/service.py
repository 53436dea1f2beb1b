"""Making, finding and deleting volumes. One writer: the daemon that owns the cache directory."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final, Protocol

import msgspec
import trio

from helios.errors import Conflict, DeadlineExceeded, IntegrityError, InvalidInput, NoSpace, NotFound, Unavailable
from helios.names import RepoId, check_revision, is_commit
from heliosfs.records import SeenCommit
from heliosfs.resolve import resolve
from heliosfs.store.manifest import Manifest
from heliosfs.tiers.pins import NAMES
from heliosfs.tiers.policy import Priority
from heliosfs.tree.snapshot import Snapshot
from heliosfs.tree.source import Known, Source
from heliosfs.volumes.files import VolumeFiles
from heliosfs.volumes.record import USUAL, VolumeRecord, check_volume_id, frozen_refs

log = logging.getLogger("heliosfs.volumes")

MAX_VOLUMES: Final = 4096
RESOLVE_S: Final = 15.0
"""Time to find a revision's commit and its manifest, in seconds."""


class Usage(msgspec.Struct, frozen=True):
    """How much a volume shows: files, the directories that they are in (the volume's own included), bytes."""

    files: int
    directories: int
    bytes: int


class Keeper(Protocol):
    """Whoever decides which blobs stay on this node (heliosfs/tiers/pins.py)."""

    def keep(self, key: str, blobs: Iterable[str], priority: Priority) -> None:
        """Give blobs a class."""

    def drop(self, key: str) -> None:
        """They have it no more."""


class Volumes:
    """The volumes that there are. All methods but ``manifest`` are called from one trio loop.

    Changes are made one at a time, the disk's before the memory's, and nothing that was found before a wait decides
    after it: two callers who make the same volume at once get the same record.
    """

    def __init__(
        self,
        files: VolumeFiles,
        *,
        limit: int = MAX_VOLUMES,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
        keeper: Keeper | None = None,
    ) -> None:
        """``keeper`` is told which blobs volumes hold."""
        self._keeper = keeper
        self._files, self._limit, self._now, self._clock = files, limit, now, clock
        self._records: dict[str, VolumeRecord] = {}
        self._damaged: dict[str, str] = {}
        self._commits: dict[tuple[str, str], VolumeRecord] = {}
        self._usages: dict[str, Usage] = {}  # by manifest
        self._changing = trio.Lock()

    async def load(self) -> None:
        """Take up the volumes of an earlier run."""
        loaded = await trio.to_thread.run_sync(self._files.load)
        self._records, self._damaged = loaded.records, loaded.damaged
        self._changed()
        if self._keeper is not None:
            for volume, record in self._records.items():
                blobs = await trio.to_thread.run_sync(self._blobs, record)
                self._keeper.keep(_key(volume), blobs, NAMES[record.priority])

    # --- reading ---

    def known(self) -> Known[Mapping[str, VolumeRecord]]:
        """All volumes by id."""
        return Known(self._records, self._clock())

    def get(self, volume: str) -> VolumeRecord:
        """One volume. Raises NotFound, and IntegrityError for one whose record is damaged."""
        if (record := self._records.get(check_volume_id(volume))) is not None:
            return record
        if volume in self._damaged:
            raise IntegrityError(
                f"the record of the volume {volume} is damaged: {self._damaged[volume]}",
                hint="Delete the volume and make it again.",
            )
        raise NotFound(f"there is no volume {volume}")

    def commit(self, repo: RepoId, commit: str) -> SeenCommit | None:
        """A commit that a volume pins, whatever the registry says of it; else None."""
        record = self._commits.get((str(repo), commit))
        return None if record is None else SeenCommit(repo, commit, record.manifest, record.time)

    def manifest(self, digest: str) -> bytes | None:
        """The manifest record of a volume's commit, if it is here. Blocks."""
        return self._files.manifest(digest)

    async def usage(self, volume: str) -> Usage:
        """How much a volume shows. Raises as ``get`` does, and Unavailable where its manifest can't be read here."""
        record = self.get(volume)
        if (known := self._usages.get(record.manifest)) is None:
            known = await trio.to_thread.run_sync(self._measure, record)
            if record.id in self._records:  # else it was deleted meanwhile, and nobody would forget it
                self._usages[record.manifest] = known
        return known

    # --- changing ---

    async def create(
        self,
        volume: str,
        repo: RepoId,
        revision: str,
        source: Source,
        *,
        commit: str | None = None,
        priority: str | None = None,
    ) -> tuple[VolumeRecord, bool]:
        """Pin what ``revision`` names now, or ``commit`` under that name; returns the record and whether it is new.

        For the same repository and revision (and commit and ``priority``, the name of its blobs' class, where they are
        given) an existing volume is returned as it is, at the commit it has, without asking anybody. Raises Conflict
        for others; InvalidInput; RepoNotFound, RevisionNotFound, Unavailable (DeadlineExceeded); NoSpace when there are
        too many or the disk is full.
        """
        check_volume_id(volume)
        check_revision(revision)
        if commit is not None and (not is_commit(commit) or (is_commit(revision) and revision != commit)):
            raise InvalidInput(
                f"{commit[:80]!r} is no commit that a volume of the revision {revision!r} can have: "
                "40 lower-case hexadecimal digits, the revision's own where that is a commit, too"
            )
        if priority is not None and priority not in NAMES:
            raise InvalidInput(f"{priority[:80]!r} is no class: there are {', '.join(NAMES)}")
        if (record := self._same(volume, repo, revision, commit, priority)) is not None:
            return record, False
        snapshot = await find(repo, revision if commit is None else commit, source)
        manifest = await trio.to_thread.run_sync(lambda: Manifest(dict(snapshot.files)).encode())
        async with self._changing:
            if (record := self._same(volume, repo, revision, commit, priority)) is not None:
                return record, False
            if len(self._records) >= self._limit:
                raise NoSpace(f"there are {len(self._records)} volumes, and no more are kept", hint="Delete some.")
            record = VolumeRecord(
                id=volume,
                repo=str(repo),
                commit=snapshot.commit,
                revision=revision,
                manifest=hashlib.sha256(manifest).hexdigest(),
                time=snapshot.time,
                refs=frozen_refs(revision, snapshot.commit),
                created=int(self._now()),
                priority=priority or USUAL,
            )
            await trio.to_thread.run_sync(self._files.write, record, manifest)  # never abandoned: then it counts
            self._records[volume] = record
            self._changed()
            if self._keeper is not None:
                blobs = {entry.sha256 for entry in snapshot.files.values()}
                self._keeper.keep(_key(volume), blobs, NAMES[record.priority])
        log.info("volume made", extra={"volume": volume, "repo": record.repo, "commit": record.commit})
        return record, True

    async def delete(self, volume: str) -> bool:
        """Forget a volume; returns whether there was one. One with a damaged record can be deleted too."""
        check_volume_id(volume)
        async with self._changing:
            record = self._records.get(volume)
            if record is None and volume not in self._damaged:
                return False
            manifest = None
            if record is not None and not any(
                other.manifest == record.manifest for other in self._records.values() if other is not record
            ):
                manifest = record.manifest
            await trio.to_thread.run_sync(self._files.remove, volume, manifest)
            self._records.pop(volume, None)
            self._damaged.pop(volume, None)
            self._changed()
            if self._keeper is not None:
                self._keeper.drop(_key(volume))
        log.info("volume deleted", extra={"volume": volume})
        return True

    def _blobs(self, record: VolumeRecord) -> set[str]:
        """The blobs of a volume's commit; none when its manifest is not here: then nothing is kept for it. Blocks."""
        data = self._files.manifest(record.manifest)
        return (
            set() if data is None else {entry.sha256 for entry in Manifest.decode(data, record.manifest).files.values()}
        )

    def _measure(self, record: VolumeRecord) -> Usage:
        """Blocks. Raises Unavailable."""
        data = self._files.manifest(record.manifest)
        if data is None:
            raise Unavailable(f"the manifest of the volume {record.id} can't be read on this node")
        files = Manifest.decode(data, record.manifest).files
        parents = {path[:end] for path in files for end, letter in enumerate(path) if letter == "/"}
        return Usage(len(files), len(parents) + 1, sum(entry.size for entry in files.values()))

    def _same(
        self, volume: str, repo: RepoId, revision: str, commit: str | None, priority: str | None
    ) -> VolumeRecord | None:
        """The volume of this id, if there is one and it is of this repository, revision and, unless they are None,
        commit and class. Raises Conflict."""
        if volume in self._damaged:
            raise Conflict(
                f"there is a volume {volume} already, and its record is damaged: {self._damaged[volume]}",
                hint="Delete it, then make it again: it will have the commit that the revision names then.",
            )
        record = self._records.get(volume)
        if record is None:
            return None
        same = (record.repo, record.revision) == (str(repo), revision) and commit in (None, record.commit)
        if same and priority in (None, record.priority):
            return record
        if same:
            raise Conflict(
                f"the volume {volume} has the class {record.priority}, not {priority}",
                hint="Delete it first, or take another id.",
            )
        wanted = f"{repo}@{revision}" if commit is None else f"{repo}@{revision} at {commit}"
        raise Conflict(
            f"the volume {volume} is {record.repo}@{record.revision} at {record.commit}, not {wanted}",
            hint="Delete it first, or take another id.",
        )

    def _changed(self) -> None:
        self._commits = {(record.repo, record.commit): record for record in self._records.values()}
        manifests = {record.manifest for record in self._records.values()}
        self._usages = {digest: usage for digest, usage in self._usages.items() if digest in manifests}


async def find(repo: RepoId, revision: str, source: Source) -> Snapshot:
    """What a revision names now, in bounded time. Raises RepoNotFound, RevisionNotFound, Unavailable."""
    with _deadline(f"{repo.id}@{revision}"):
        return await resolve(repo, revision, source)


def _key(volume: str) -> str:
    return f"volume:{volume}"


@contextlib.contextmanager
def _deadline(what: str) -> Iterator[None]:
    try:
        with trio.fail_after(RESOLVE_S):
            yield
    except trio.TooSlowError:
        raise DeadlineExceeded(f"{what} was not found out within {RESOLVE_S:g} seconds") from None
