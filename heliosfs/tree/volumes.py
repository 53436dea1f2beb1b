"""``/.volumes/<id>/{model,hub}``: one commit of one repository, and nothing that could change.

``model`` holds the commit's files, ``hub`` the same in the layout of the Hugging Face cache. Both are the directories
that the rest of the tree has (commits.py, hub.py), shown a source that knows nothing but the volume. Each can be bound
somewhere else alone: no link leaves it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from helios.names import RepoId
from heliosfs.tree.commits import plain_commit
from heliosfs.tree.hub import Hub
from heliosfs.tree.nodes import Absent, Directory, Found
from heliosfs.tree.snapshot import Snapshot
from heliosfs.tree.source import FOREVER, Known, Repos, Source
from heliosfs.volumes.record import VolumeRecord


class VolumeList(Protocol):
    """The volumes that there are."""

    def known(self) -> Known[Mapping[str, VolumeRecord]]:
        """All of them by id, now."""


class VolumesDirectory(Directory):
    """``/.volumes``. The kernel asks for a name each time: a volume may be bound as soon as it is made."""

    __slots__ = ("_volumes",)

    def __init__(self, volumes: VolumeList) -> None:
        super().__init__(("volumes",))
        self._volumes = volumes

    async def lookup(self, name: str, source: Source) -> Found | Absent:
        volumes = self._volumes.known()
        record = volumes.value.get(name)
        if record is None:
            return Absent(f"there is no volume {name!r}", volumes.at)
        return Found(name, VolumeDirectory(record), volumes.at)

    async def entries(self, source: Source) -> Iterable[Found]:
        volumes = self._volumes.known()
        return [Found(name, VolumeDirectory(record), volumes.at) for name, record in sorted(volumes.value.items())]


class VolumeDirectory(Directory):
    """``/.volumes/<id>``. Another volume of the same id is another directory."""

    __slots__ = ("_parts", "_record")

    def __init__(self, record: VolumeRecord) -> None:
        super().__init__(("volume", record.id, record.digest), mtime=record.created, lifetime=FOREVER)
        self._record = record
        self._parts: dict[str, Directory] = {
            "hub": Pinned(record, Hub()),
            "model": Pinned(record, plain_commit(record.repository, record.commit, record.time)),
        }

    def xattrs(self) -> Mapping[str, str]:
        record = self._record
        return {"repo": record.repo, "commit": record.commit, "revision": record.revision}

    async def lookup(self, name: str, source: Source) -> Found | Absent:
        if name not in self._parts:
            return Absent(f"a volume has no {name!r}: it has {' and '.join(self._parts)}")
        return Found(name, self._parts[name])

    async def entries(self, source: Source) -> Iterable[Found]:
        return [Found(name, node) for name, node in self._parts.items()]


class Pinned(Directory):
    """A directory of the tree as a volume shows it: with inodes of its own, and so has every directory below it.

    Files and links are those of the rest of the tree: their inodes belong to what they hold.
    """

    __slots__ = ("_inner", "_record")

    def __init__(self, record: VolumeRecord, inner: Directory) -> None:
        super().__init__(("volume", record.id, record.digest, *inner.key), mtime=inner.mtime, lifetime=FOREVER)
        self._record, self._inner = record, inner

    def xattrs(self) -> Mapping[str, str]:
        return self._inner.xattrs()

    async def lookup(self, name: str, source: Source) -> Found | Absent:
        found = await self._inner.lookup(name, PinnedSource(self._record, source))
        return found if isinstance(found, Absent) else self._pinned(found)

    async def entries(self, source: Source) -> Iterable[Found]:
        return [self._pinned(found) for found in await self._inner.entries(PinnedSource(self._record, source))]

    def _pinned(self, found: Found) -> Found:
        if not isinstance(found.node, Directory):
            return found
        return Found(found.name, Pinned(self._record, found.node), found.until)


class PinnedSource:
    """A ``Source`` that knows one commit of one repository, for ever; its files come from another source."""

    def __init__(self, record: VolumeRecord, source: Source) -> None:
        self._record, self._repo, self._source = record, record.repository, source

    async def repos(self, *, fresh: bool = False) -> Known[Repos]:
        return Known(Repos.of([self._repo]), FOREVER)

    async def refs(self, repo: RepoId, *, fresh: bool = False) -> Known[Mapping[str, str] | None]:
        return Known(self._record.refs if repo == self._repo else None, FOREVER)

    async def commit_time(self, repo: RepoId, commit: str) -> Known[int | None]:
        return Known(self._record.time if self._holds(repo, commit) else None, FOREVER)

    async def snapshot(self, repo: RepoId, commit: str) -> Known[Snapshot | None]:
        if not self._holds(repo, commit):
            return Known(None, FOREVER)
        return Known((await self._source.snapshot(repo, commit)).value, FOREVER)

    async def seen(self, repo: RepoId) -> Known[tuple[str, ...]]:
        return Known((self._record.commit,) if repo == self._repo else (), FOREVER)

    def _holds(self, repo: RepoId, commit: str) -> bool:
        return (repo, commit) == (self._repo, self._record.commit)
