"""Which directory the client keeps its chunks in.

A cache directory belongs to one process. Where the home's own is free the client takes it. Where a mount or another
client has it, the client keeps its chunks in ``<cache>/clients/<n>``, the first that nobody has, and reads what the
owner has: whole files in ``<cache>/blobs``, and in those of its second tier, which are verified, read-only and never
change, straight from there; files that a mount has in part, through that mount, which fetches them once for everybody.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from helios import mounts
from helios.errors import Conflict
from helios.home import Home
from heliosfs.blobs import BlobRef, BlobStore
from heliosfs.client.buffers import Descriptor
from heliosfs.tree.names import NO_ORG

log = logging.getLogger("heliosfs.client")

MAX_CLIENTS: Final = 64
"""Clients of one home at a time that have no cache directory of their own choosing."""

OpenStore = Callable[[Path, Path | None], BlobStore]
"""Opens the store in a directory, with a second tier or none; raises Conflict where another process has either."""


@dataclass(frozen=True, slots=True)
class Cache:
    """Where chunks are kept. ``shared`` is the directory of another owner, ``shared_l2`` that one's second tier,
    ``mountpoint`` of the mount that it is."""

    root: Path
    store: BlobStore
    shared: Path | None = None
    mountpoint: Path | None = None
    shared_l2: Path | None = None

    def open_shared(self, want: BlobRef) -> Descriptor | None:
        """The file of the other owner, if that has all of it. Blocks.

        It was verified before it got its name; one that is writable or of another size is not what it should be, and
        left alone.
        """
        for tier in (self.shared, self.shared_l2):
            if tier is not None and (found := whole_file(tier, want.sha256, want.size, want.path)) is not None:
                return found
        return None

    def mounted(self, want: BlobRef) -> Path | None:
        """Where the mount shows a file, if there is a mount."""
        if self.mountpoint is None:
            return None
        top = self.mountpoint if want.repo.kind == "models" else self.mountpoint / f".{want.repo.kind}"
        return top / (want.repo.org or NO_ORG) / want.repo.name / want.commit / want.path


def whole_file(tier: Path, sha256: str, size: int, name: str) -> Descriptor | None:
    """A file of a cache directory, if that has all of it; ``name`` is what it is called in errors. See ``Cache``."""
    path = tier / "blobs" / sha256[:2] / sha256
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:  # not there, not ours to read, or not readable now: then it is fetched
        return None
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_mode & 0o222 or status.st_size != size:
        os.close(fd)
        log.warning("a cached file of another process is not what it should be", extra={"path": str(path)})
        return None
    return Descriptor(fd, name, size)


def choose(home: Home, configured: Path, l2: Path | None, chosen: Path | None, open_store: OpenStore) -> Cache:
    """Open the store in ``chosen``, or else in ``configured`` with ``l2``, or a directory of our own below it.

    Raises Conflict when another process has ``chosen``, Unavailable or NoSpace when nothing can be used.
    """
    if chosen is not None:
        return Cache(chosen, open_store(chosen, None))
    try:
        return Cache(configured, open_store(configured, l2))
    except Conflict as error:
        owned = error
    for number in range(MAX_CLIENTS):
        root = configured / "clients" / str(number)
        try:
            store = open_store(root, None)
        except Conflict:
            continue
        mountpoint = _mount_of(home, configured)
        fields = {"cache": str(root), "mount": str(mountpoint), "reason": owned.message}
        log.info("the cache is in use; what its owner has is shared", extra=fields)
        return Cache(root, store, shared=configured, mountpoint=mountpoint, shared_l2=l2)
    raise Conflict(
        f"{MAX_CLIENTS} clients use {configured / 'clients'} already",
        hint="Close some, or give this one a directory of its own: connect(cache=...).",
    )


def _mount_of(home: Home, cache: Path) -> Path | None:
    """The mount point of the living mount that owns the cache directory."""
    for state, lives in mounts.states(home):
        if lives and Path(state.cache) == cache and mounts.find_mount(Path(state.mountpoint)) is not None:
            return Path(state.mountpoint)
    return None
