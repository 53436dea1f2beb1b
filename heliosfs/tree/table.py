"""Inodes: which node an inode number stands for, for as long as the kernel holds it.

An inode's number is taken from a hash of the node's key, so it is the same in every mount and after every restart. Two
keys with the same hash are told apart by hashing once more with a counter: the number of the later one then depends on
the order, which costs nothing but the stability.

The kernel counts every entry it is given; it names the inode until it has forgotten all of them. The table holds
exactly the inodes that the kernel holds, plus the root.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Final

from heliosfs.tree.nodes import Directory, Key, Node

ROOT: Final = 1
"""The root's inode number, fixed by the FUSE protocol."""


def hash_key(key: Key, attempt: int) -> int:
    """A number of 63 bits from a key: some programs take inode numbers for signed."""
    data = "\0".join((str(attempt), *key)).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1


class Slot:
    """One inode. ``mtime`` stays what it was at first: a changed one would make the kernel drop cached pages."""

    __slots__ = ("count", "ino", "mtime", "node")

    def __init__(self, ino: int, node: Node) -> None:
        self.ino, self.node, self.mtime, self.count = ino, node, node.mtime, 0


class NodeTable:
    """Used from one task at a time: no method waits."""

    def __init__(self, root: Directory, hashed: Callable[[Key, int], int] = hash_key) -> None:
        self._hashed = hashed
        top = Slot(ROOT, root)
        top.count = 1
        self._by_ino = {ROOT: top}
        self._by_key = {root.key: top}

    def __len__(self) -> int:
        return len(self._by_ino)

    def hold(self, node: Node) -> Slot:
        """The node's inode, counted once more. Of two nodes with one key the later one stays."""
        slot = self._by_key.get(node.key)
        if slot is None:
            slot = Slot(self._free_number(node.key), node)
            self._by_ino[slot.ino] = self._by_key[node.key] = slot
        slot.node = node
        slot.count += 1
        return slot

    def forget(self, ino: int, count: int) -> None:
        """The kernel dropped ``count`` of its references; an unknown inode is none of ours any more."""
        slot = self._by_ino.get(ino)
        if slot is None or ino == ROOT:
            return
        slot.count -= count
        if slot.count <= 0:
            del self._by_ino[ino], self._by_key[slot.node.key]

    def get(self, ino: int) -> Slot | None:
        """The inode, or None where the kernel can't know it."""
        return self._by_ino.get(ino)

    def _free_number(self, key: Key) -> int:
        attempt = 0
        while (ino := self._hashed(key, attempt)) <= ROOT or ino in self._by_ino:
            attempt += 1
        return ino
