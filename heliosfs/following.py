"""What follows a weight file that is opened: the files that are loaded with it are fetched behind everything else.

Which they are may stand in an index of the model (heliosfs/tree/shards.py), a file like any other: it is read in the
background, mostly from the memory pool, since loaders have just read it. An index that is too long, can't be had or
makes no sense says nothing.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from typing import Final

import trio

from helios.errors import HeliosError
from helios.names import RepoId
from heliosfs.blobs import BlobRef, BlobStore
from heliosfs.store.manifest import FileEntry
from heliosfs.tiers.pool import SMALL_BYTES
from heliosfs.tree.nodes import BlobFile
from heliosfs.tree.shards import following, indexes, read_index
from heliosfs.tree.snapshot import Snapshot
from heliosfs.tree.source import Source

log = logging.getLogger("heliosfs.fuse")

MAX_INDEX: Final = SMALL_BYTES
"""Longest index that is looked at, in bytes: one of a million tensors is some 100 MB, of a large model 10 MB."""

MAX_INDEXES: Final = 4
"""Indexes of one directory that are looked at: a model's own, Mistral's, and variants."""

MAX_KNOWN: Final = 64
"""Indexes remembered, by their content: at most 4096 names each."""

MAX_READING: Final = 4
"""Directories whose indexes are read at a time; with more, what follows is not known."""

MAX_OPENED: Final = 64
"""Files that are opened while the indexes of their directory are read, and are followed after that."""


class Following:
    """All methods run on the trio loop."""

    def __init__(self, source: Source, blobs: BlobStore) -> None:
        self._source, self._blobs = source, blobs
        self._known: OrderedDict[str, frozenset[str]] = OrderedDict()
        self._reading: dict[tuple[RepoId, str, str], dict[str, None]] = {}
        """Directories whose indexes are read, with the files that were opened there and are to be followed."""
        self._parsing = trio.CapacityLimiter(1)

    async def opened(self, node: BlobFile) -> None:
        """A file was opened: whoever opens a weight file will read the others of its model next."""
        try:
            snapshot = (await self._source.snapshot(node.repo, node.commit)).value
        except HeliosError as error:
            log.debug("what follows is not known", extra={"file": node.path, "reason": str(error)})
            return
        if snapshot is None or node.path not in snapshot.files:
            return
        entries = _indexes(snapshot, node.path)
        if all(entry.sha256 in self._known for entry in entries.values()):
            self._follow(snapshot, node.path, entries)
            return
        directory = (node.repo, node.commit, node.path.rpartition("/")[0])
        if (opened := self._reading.get(directory)) is not None:
            if len(opened) < MAX_OPENED:
                opened[node.path] = None
        elif len(self._reading) < MAX_READING:
            self._reading[directory] = {node.path: None}
            self._blobs.soon(partial(self._read, directory, snapshot))

    def _follow(self, snapshot: Snapshot, path: str, entries: Mapping[str, FileEntry]) -> None:
        named = [self._known.get(entry.sha256, frozenset()) for entry in entries.values()]
        files, repo, commit = snapshot.files, snapshot.repo, snapshot.commit
        self._blobs.prefetch(blob_ref(files[other], repo, commit, other) for other in following(snapshot, path, named))

    async def _read(self, directory: tuple[RepoId, str, str], snapshot: Snapshot) -> None:
        opened = self._reading[directory]
        try:
            while opened:
                path = next(iter(opened))
                entries = _indexes(snapshot, path)
                for index, entry in entries.items():
                    if entry.sha256 not in self._known and entry.size <= MAX_INDEX:
                        await self._learn(blob_ref(entry, snapshot.repo, snapshot.commit, index))
                del opened[path]
                self._follow(snapshot, path, entries)
        finally:
            del self._reading[directory]

    async def _learn(self, index: BlobRef) -> None:
        try:
            handle = await self._blobs.open(index)
            try:
                data = await handle.read(0, index.size)
            finally:
                await handle.close()
        except HeliosError as error:
            log.info("an index of weights can't be read", extra={"file": index.path, "reason": str(error)})
            return
        self._known[index.sha256] = await trio.to_thread.run_sync(read_index, data, limiter=self._parsing)
        while len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)


def _indexes(snapshot: Snapshot, path: str) -> dict[str, FileEntry]:
    """The indexes that may name the file, and what follows it."""
    return {index: snapshot.files[index] for index in indexes(snapshot, path)[:MAX_INDEXES]}


def blob_ref(entry: FileEntry, repo: RepoId, commit: str, path: str, also: tuple[RepoId, ...] = ()) -> BlobRef:
    """A file of a commit, as what reads its content wants it named."""
    return BlobRef(repo, commit, path, entry.sha256, entry.size, entry.recipe, also)
