"""Snapshots in memory: made of manifests, checked and indexed, and kept up to a bound."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

import trio

from helios.errors import IntegrityError
from helios.names import RepoId
from heliosfs.records import SeenCommit
from heliosfs.store.bulk import MAX_DIRECTORY_BYTES, directory_bytes
from heliosfs.store.manifest import Manifest
from heliosfs.tree.snapshot import Snapshot

SNAPSHOT_BYTES: Final = 64 << 20
"""Memory of the snapshots that are kept, in bytes; the least recently used goes. The last one asked for stays, whatever
its size: no manifest of more than 32 MiB is taken (metadata.py), so none has more than 128 MiB."""

INFLATION: Final = 3
"""A snapshot takes at most so many times its manifest's bytes, beside its directories."""

MAX_REFUSED: Final = 1000
"""Manifests remembered as unusable."""


class Unusable(IntegrityError):
    """A manifest that is the commit's, and can't be shown: it will be no better when it is asked for again."""


@dataclass(frozen=True, slots=True)
class Held:
    """A snapshot in memory, and the bytes that it takes there."""

    snapshot: Snapshot
    cost: int


class Snapshots:
    """Belongs to one trio loop. ``bytes`` is the memory that the snapshots take, about."""

    def __init__(self) -> None:
        self.bytes = 0
        self._held: OrderedDict[tuple[RepoId, str], Held] = OrderedDict()
        self._refused: dict[str, str] = {}  # by the manifest's digest: why
        self._one_at_a_time = trio.CapacityLimiter(1)

    def __len__(self) -> int:
        return len(self._held)

    def get(self, repo: RepoId, commit: str) -> Snapshot | None:
        """A commit's snapshot, if it is here; it counts as used."""
        if (repo, commit) in self._held:
            self._held.move_to_end((repo, commit))
        return self.peek(repo, commit)

    def peek(self, repo: RepoId, commit: str) -> Snapshot | None:
        """The same, and nobody used it."""
        held = self._held.get((repo, commit))
        return None if held is None else held.snapshot

    def refused(self, digest: str) -> str | None:
        """Why the manifest with this digest can't be used, if that was found."""
        return self._refused.get(digest)

    async def make(self, record: SeenCommit, data: bytes) -> Snapshot:
        """The snapshot of a commit from its manifest's record, kept from here on; raises as ``build`` does."""
        try:
            held = await trio.to_thread.run_sync(build, record, data, limiter=self._one_at_a_time)
        except Unusable as error:
            if len(self._refused) >= MAX_REFUSED:
                self._refused.clear()
            self._refused[record.manifest] = error.message
            raise
        self.drop(record.repo, record.commit)
        self._held[record.repo, record.commit] = held
        self.bytes += held.cost
        while self.bytes > SNAPSHOT_BYTES and len(self._held) > 1:
            self.drop(*next(iter(self._held)))
        return held.snapshot

    def drop(self, repo: RepoId, commit: str) -> None:
        """Forget a commit's snapshot."""
        if (held := self._held.pop((repo, commit), None)) is not None:
            self.bytes -= held.cost


def build(record: SeenCommit, data: bytes) -> Held:
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
    return Held(Snapshot(record.repo, record.commit, record.time, files), cost + INFLATION * len(data))
