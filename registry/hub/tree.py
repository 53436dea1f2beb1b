"""A snapshot as a tree of directories, with git's object ids for them: what listings show.

Directory ids are git's (a tree object's sha1 over mode, name and id of each entry), so they equal the Hub's wherever
the snapshot holds the same files.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from heliosfs.store.manifest import FileEntry, Manifest


@dataclass(frozen=True, slots=True)
class Directory:
    """A directory; ``oid`` is git's id of the tree."""

    oid: str


Node = FileEntry | Directory


class Tree:
    """Immutable index of a manifest: every file and directory by path, in path order."""

    def __init__(self, manifest: Manifest) -> None:
        children: dict[str, dict[str, Node]] = {"": {}}
        for path, entry in manifest.files.items():
            _below(children, path)[_name(path)] = entry
        # Deepest first, so that a directory's id is known when its parent needs it.
        for directory in sorted(children, key=lambda path: path.count("/") if path else -1, reverse=True):
            node = Directory(_tree_oid(children[directory]))
            if directory:
                children[_parent(directory)][_name(directory)] = node
            else:
                self.root = node
        self._nodes: dict[str, Node] = {
            f"{directory}/{name}" if directory else name: node
            for directory, entries in children.items()
            for name, node in entries.items()
        }
        self._sorted = sorted(self._nodes)

    def __len__(self) -> int:
        return len(self._sorted)

    def get(self, path: str) -> Node | None:
        """The file or directory at the path; the empty path is the root."""
        return self._nodes.get(path) if path else self.root

    def listing(self, below: str, *, recursive: bool, after: str, limit: int) -> tuple[list[tuple[str, Node]], bool]:
        """At most ``limit`` entries below a directory whose path is greater than ``after``, and whether more follow.

        Sorted by path, so that a page's last path is the cursor to the next one.
        """
        items: list[tuple[str, Node]] = []
        for path in self._paths(below, after):
            if not recursive and "/" in path[len(below) + 1 if below else 0 :]:
                continue
            if len(items) == limit:
                return items, True
            items.append((path, self._nodes[path]))
        return items, False

    def _paths(self, below: str, after: str) -> Iterator[str]:
        prefix = f"{below}/" if below else ""
        start = max(bisect_left(self._sorted, prefix), bisect_right(self._sorted, after))
        for index in range(start, len(self._sorted)):
            if not self._sorted[index].startswith(prefix):
                return
            yield self._sorted[index]


def _below(children: dict[str, dict[str, Node]], path: str) -> dict[str, Node]:
    """The entries of the path's directory, made along with all its parents."""
    directory = _parent(path)
    if directory not in children:
        children[directory] = {}
        _below(children, directory)
    return children[directory]


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _tree_oid(entries: dict[str, Node]) -> str:
    """git's id of a tree: entries sorted by name, where a directory's name counts as ending with a slash."""
    body = bytearray()
    for name, node in sorted(entries.items(), key=lambda item: _sort_key(*item)):
        match node:
            case Directory(oid):
                body += b"40000 " + name.encode() + b"\0" + bytes.fromhex(oid)
            case FileEntry():
                mode = b"100755 " if node.executable else b"100644 "
                body += mode + name.encode() + b"\0" + bytes.fromhex(node.git_oid)
    return hashlib.sha1(b"tree %d\0" % len(body) + body, usedforsecurity=False).hexdigest()


def _sort_key(name: str, node: Node) -> bytes:
    return name.encode() + (b"/" if isinstance(node, Directory) else b"")
