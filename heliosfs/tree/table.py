"""Inodes: which node an inode number stands for, for as long as the kernel holds it.

An inode's number is taken from a hash of the node's key, so it is the same in every mount and after every restart. Two
keys with the same hash are told apart by hashing once more with a counter: the number of the later one then depends on
the order, which costs nothing but the stability.

The kernel counts every entry it is given; it names the inode until it has forgotten all of them. The table holds
exactly the inodes that the kernel holds, plus the root; after a restart of the worker, those of them that came up
since. The others are in the node log (nodelog.py), and are found again when the kernel names them (restore.py).

How often the kernel counted an inode before the restart is not known: at least once. It gives all of them back at once,
but for a single entry that it refuses as soon as it got it. So an inode of before is over when the kernel gives back
more than this worker handed out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Final

from heliosfs.tree.nodelog import NodeLog
from heliosfs.tree.noderecords import Record
from heliosfs.tree.nodes import Directory, Key, Node

ROOT: Final = 1
"""The root's inode number, fixed by the FUSE protocol."""


def hash_key(key: Key, attempt: int) -> int:
    """A number of 63 bits from a key: some programs take inode numbers for signed."""
    data = "\0".join((str(attempt), *key)).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1


def identify(key: Key) -> int:
    """Another hash of a key, of 64 bits, which tells apart keys that collide in ``hash_key``."""
    data = "\0".join(key).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, person=b"identity").digest(), "big")


class Slot:
    """One inode. ``mtime`` stays what it was at first: a changed one would make the kernel drop cached pages.

    ``attempt`` is the counter its number was hashed with; ``place`` a hash of where the log says that it is.
    """

    __slots__ = ("attempt", "count", "ino", "mtime", "node", "place")

    def __init__(self, ino: int, node: Node, attempt: int = 0) -> None:
        self.ino, self.node, self.mtime, self.attempt = ino, node, node.mtime, attempt
        self.count = 0
        self.place: int | None = None


class NodeTable:
    """Used from one task at a time: no method waits. Without a ``log`` nothing outlives the process."""

    def __init__(
        self, root: Directory, hashed: Callable[[Key, int], int] = hash_key, *, log: NodeLog | None = None
    ) -> None:
        self._hashed, self._log = hashed, log
        top = Slot(ROOT, root)
        top.count = 1
        self._by_ino = {ROOT: top}
        self._by_key = {root.key: top}

    def __len__(self) -> int:
        return len(self._by_ino)

    def hold(self, node: Node, parent: int, name: bytes) -> Slot:
        """The node's inode, counted once more. Of two nodes with one key the later one stays.

        It was found as ``name`` in the directory ``parent``. Call ``record`` before the kernel is answered.
        """
        slot = self._by_key.get(node.key)
        if slot is None:
            slot = self._slot_of(node)
            self._by_ino[slot.ino] = self._by_key[node.key] = slot
        elif slot.node is not node:
            node.succeed(slot.node)
        slot.node = node
        slot.count += 1
        if self._log is not None:
            place = hash((parent, name))
            if slot.place != place:
                slot.place = place
                self._log.held(Record(slot.ino, parent, name, slot.mtime, slot.attempt, identify(node.key)))
        return slot

    def record(self) -> None:
        """Write down what was handed out, so that the next worker knows it."""
        if self._log is not None:
            self._log.flush()

    def forget(self, ino: int, count: int) -> None:
        """The kernel dropped ``count`` of its references; an unknown inode is none of ours any more."""
        if ino == ROOT:
            return
        slot = self._by_ino.get(ino)
        if slot is not None:
            slot.count -= count
            if slot.count > 0:
                return
            del self._by_ino[ino], self._by_key[slot.node.key]
        if self._log is not None and (slot is not None or ino in self._log):
            self._log.forgotten(ino)

    def get(self, ino: int) -> Slot | None:
        """The inode, or None where this worker has not met it."""
        return self._by_ino.get(ino)

    def recorded(self, ino: int) -> Record | None:
        """Where an earlier worker found the inode, or None where none did."""
        return None if self._log is None else self._log.find(ino)

    def is_held(self, ino: int) -> bool:
        """Whether the kernel holds an inode of an earlier worker, as far as is known."""
        record = self.recorded(ino)
        return record is not None and record.live

    def is_of(self, record: Record, node: Node) -> bool:
        """Whether the node is what had the record's number."""
        return self._hashed(node.key, record.attempt) == record.ino and identify(node.key) == record.identity

    def restore(self, record: Record, node: Node) -> Slot:
        """The inode of an earlier worker, now that its node was found again: the kernel holds it."""
        slot = self._by_key.get(node.key)
        if slot is None:
            slot = self._restored(record, node)
            slot.count = 1
            self._by_ino[slot.ino] = self._by_key[node.key] = slot
            if self._log is not None and not record.live:  # it was given back, and yet is named
                self._log.held(record)
                self._log.flush()
        return slot

    def _slot_of(self, node: Node) -> Slot:
        """A new slot. A node whose number an earlier worker gave out keeps it, with its time and its count."""
        record = None if self._log is None else self._log.moved(identify(node.key))
        attempt = 0
        while record is None:
            ino = self._hashed(node.key, attempt)
            if ino > ROOT and ino not in self._by_ino:
                earlier = self.recorded(ino)
                if earlier is None:
                    return Slot(ino, node, attempt)
                if earlier.identity == identify(node.key):
                    record = earlier
            attempt += 1
        slot = self._restored(record, node)
        if record.live:
            slot.count = 1
        else:  # the log must say that it is live again
            slot.place = None
        return slot

    @staticmethod
    def _restored(record: Record, node: Node) -> Slot:
        slot = Slot(record.ino, node, record.attempt)
        slot.mtime = record.mtime
        slot.place = hash((record.parent, record.name))
        return slot
