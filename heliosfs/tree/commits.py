"""The directories under one commit, as plain files and as the Hugging Face cache shows them. They never change."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from helios.errors import RevisionNotFound
from helios.names import RepoId
from heliosfs.store.manifest import FileEntry
from heliosfs.tree.nodes import Absent, BlobFile, Directory, Found, Link, Node
from heliosfs.tree.snapshot import Snapshot, etag
from heliosfs.tree.source import FOREVER, Source

Leaf = Callable[[Snapshot, str, FileEntry], Node]
"""Makes the node that shows a file."""


def plain_file(snapshot: Snapshot, path: str, entry: FileEntry) -> Node:
    """The file itself."""
    return BlobFile(entry, snapshot, path, executable=entry.executable)


def hub_link(snapshot: Snapshot, path: str, entry: FileEntry) -> Node:
    """A link from ``snapshots/<commit>/<path>`` to ``blobs/<etag>``."""
    target = "../" * (path.count("/") + 2) + f"blobs/{etag(entry)}"
    return Link(("hub-file", str(snapshot.repo), snapshot.commit, path), target, mtime=snapshot.time)


class CommitDirectory(Directory):
    """A directory of a commit: the top (path ``""``) or one below it. ``view`` tells the two presentations apart."""

    __slots__ = ("commit", "leaf", "path", "repo", "view")

    def __init__(self, view: str, leaf: Leaf, repo: RepoId, commit: str, time: int, path: str = "") -> None:
        super().__init__((view, str(repo), commit, path), mtime=time, lifetime=FOREVER)
        self.view, self.leaf, self.repo, self.commit, self.path = view, leaf, repo, commit, path

    def xattrs(self) -> dict[str, str]:
        return {"repo": str(self.repo), "commit": self.commit}

    async def lookup(self, name: str, source: Source) -> Found | Absent:
        snapshot = await self._snapshot(source)
        names = snapshot.directories[self.path]
        if name not in names:
            return Absent(f"{self.repo.id} at {self.commit} has no {self._below(name)!r}")
        return Found(name, self._child(snapshot, name, names[name]))

    async def entries(self, source: Source) -> Iterable[Found]:
        snapshot = await self._snapshot(source)
        names = snapshot.directories[self.path]
        return (Found(name, self._child(snapshot, name, entry)) for name, entry in names.items())

    def _child(self, snapshot: Snapshot, name: str, entry: FileEntry | None) -> Node:
        path = self._below(name)
        if entry is None:
            return CommitDirectory(self.view, self.leaf, self.repo, self.commit, snapshot.time, path)
        return self.leaf(snapshot, path, entry)

    def _below(self, name: str) -> str:
        return f"{self.path}/{name}" if self.path else name

    async def _snapshot(self, source: Source) -> Snapshot:
        snapshot = (await source.snapshot(self.repo, self.commit)).value
        if snapshot is None:
            raise RevisionNotFound(f"{self.repo.id} no longer has the commit {self.commit}")
        return snapshot


def plain_commit(repo: RepoId, commit: str, time: int) -> CommitDirectory:
    """``/<org>/<name>/<commit>``."""
    return CommitDirectory("commit", plain_file, repo, commit, time)


def hub_snapshot(repo: RepoId, commit: str, time: int) -> CommitDirectory:
    """``/.hub/models--org--name/snapshots/<commit>``."""
    return CommitDirectory("hub-snapshot", hub_link, repo, commit, time)
