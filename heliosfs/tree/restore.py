"""Inodes of an earlier worker: found again through the tree, when the kernel names one.

The node log says under which name in which directory an inode was found last. So the way up to the root, or to the
first directory that is known, is walked down again by name. What is found is the inode only if its key is the one that
the inode had: under a commit it always is; a link that has moved since is another inode, and the old one is stale. The
kernel answers ESTALE by looking the name up again.
"""

from __future__ import annotations

from typing import Final

from helios.errors import NotFound
from heliosfs.flights import Flights
from heliosfs.tree.noderecords import Record
from heliosfs.tree.nodes import Directory, Found, Node
from heliosfs.tree.source import Source
from heliosfs.tree.table import NodeTable, Slot

MAX_DEPTH: Final = 4096
"""A path of PATH_MAX bytes has at most half as many parts; a log that says more is wrong."""


class Restorer:
    """Finds the slot of any inode. Used from one trio loop."""

    def __init__(self, table: NodeTable, source: Source) -> None:
        self._table, self._source = table, source
        self._flights: Flights[int] = Flights()

    async def slot(self, ino: int) -> Slot | None:
        """The inode, or None where it is stale. Raises HeliosError when nobody can say."""
        slot = self._table.get(ino)
        if slot is None and self._table.recorded(ino) is not None:
            slot = await self._flights.share(ino, lambda: self._restore(ino))
        return slot

    async def _restore(self, ino: int) -> Slot | None:
        way, slot = self._way(ino)
        node = None if slot is None else slot.node
        while node is not None and way:
            record = way.pop()
            node = await self._look(node, record.name)
            if node is None or not self._table.is_of(record, node):
                return None
            if not way or self._table.is_held(record.ino):
                slot = self._table.restore(record, node)
        return slot

    def _way(self, ino: int) -> tuple[list[Record], Slot | None]:
        """The records from the inode up to what is known, and that; None where the way ends nowhere."""
        way: list[Record] = []
        while (slot := self._table.get(ino)) is None:
            record = self._table.recorded(ino)
            if record is None or len(way) == MAX_DEPTH:
                return way, None
            way.append(record)
            ino = record.parent
        return way, slot

    async def _look(self, node: Node, name: bytes) -> Node | None:
        if not isinstance(node, Directory):
            return None
        try:
            found = await node.lookup(name.decode(), self._source)
        except NotFound:
            return None
        return found.node if isinstance(found, Found) else None
