"""What a node of the tree is.

A node is a value. Its ``key`` says what it is and decides its inode number; two nodes with the same key are the same
thing. Whatever may change has the change in its key: a link that moves to another commit is another node, so nothing
that the kernel remembers about an inode ever becomes wrong.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from helios.names import RepoId, others
from heliosfs.store.manifest import FileEntry
from heliosfs.tree.snapshot import Snapshot
from heliosfs.tree.source import FOREVER, NAME_TTL_S, Source

Key = tuple[str, ...]

DIRECTORY: Final = stat.S_IFDIR | 0o555
REGULAR: Final = stat.S_IFREG | 0o444
EXECUTABLE: Final = stat.S_IFREG | 0o555
SYMLINK: Final = stat.S_IFLNK | 0o777


class Node:
    """``mode`` holds the file type; ``size`` is in bytes; ``mtime`` in seconds since 1970, None for the mount's own.

    ``lifetime`` is how long the kernel may keep the attributes, in seconds.
    """

    __slots__ = ("key", "lifetime", "mode", "mtime", "size")

    def __init__(
        self, key: Key, mode: int, *, size: int = 0, mtime: int | None = None, lifetime: float = FOREVER
    ) -> None:
        self.key, self.mode, self.size, self.mtime, self.lifetime = key, mode, size, mtime, lifetime

    def xattrs(self) -> Mapping[str, str]:
        """The ``user.helios.*`` attributes that the tree knows, without that prefix."""
        return {}

    def succeed(self, earlier: Node) -> None:
        """Take the place of the node that had this key before: what that knew and this one doesn't, it may keep."""


class BlobFile(Node):
    """A file of a repository. Its inode belongs to the content and the executable bit, wherever it was found.

    The size is part of it, though the hash decides it: a manifest that lies must not change a file of another one.

    ``snapshot`` and ``path`` say where: a blob may be in many places. ``also`` are other repositories it was found in.
    """

    __slots__ = ("also", "commit", "entry", "path", "repo")

    def __init__(self, entry: FileEntry, snapshot: Snapshot, path: str, *, executable: bool) -> None:
        key = ("blob", entry.sha256, str(entry.size), "x" if executable else "-")
        super().__init__(key, EXECUTABLE if executable else REGULAR, size=entry.size, mtime=snapshot.time)
        self.entry, self.repo, self.commit, self.path = entry, snapshot.repo, snapshot.commit, path
        self.also: tuple[RepoId, ...] = ()

    def succeed(self, earlier: Node) -> None:
        if isinstance(earlier, BlobFile) and (earlier.also or earlier.repo != self.repo):
            self.also = others(self.repo, (*self.also, earlier.repo, *earlier.also))

    def xattrs(self) -> Mapping[str, str]:
        return {"sha256": self.entry.sha256, "repo": str(self.repo), "commit": self.commit}


class TextFile(Node):
    """A small file made on the spot, such as ``refs/main``. The key must change with the content."""

    __slots__ = ("content",)

    def __init__(self, key: Key, content: bytes, *, mtime: int | None = None, lifetime: float = FOREVER) -> None:
        super().__init__(key, REGULAR, size=len(content), mtime=mtime, lifetime=lifetime)
        self.content = content


class Link(Node):
    """A symbolic link. The key must change with the target."""

    __slots__ = ("target",)

    def __init__(self, key: Key, target: str, *, mtime: int | None = None) -> None:
        super().__init__(key, SYMLINK, size=len(target.encode()), mtime=mtime)
        self.target = target


class Directory(Node):
    """A directory; one whose entries come and go has ``lifetime=NAME_TTL_S``."""

    __slots__ = ()

    def __init__(self, key: Key, *, mtime: int | None = None, lifetime: float = NAME_TTL_S) -> None:
        super().__init__(key, DIRECTORY, mtime=mtime, lifetime=lifetime)

    async def lookup(self, name: str, source: Source) -> Found | Absent:
        """Find one entry. Raises HeliosError when nobody can say."""
        raise NotImplementedError

    async def entries(self, source: Source) -> Iterable[Found]:
        """All entries, in a stable order. Raises HeliosError when nobody can say."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Found:
    """A directory entry. ``until``: how long the name may be remembered, in monotonic seconds."""

    name: str
    node: Node
    until: float = FOREVER


@dataclass(frozen=True, slots=True)
class Absent:
    """There is no such entry; ``until`` as in ``Found``, ``reason`` for the log."""

    reason: str
    until: float = FOREVER
