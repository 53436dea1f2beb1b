"""From a listing to a commit: when the store holds every file of a mirrored snapshot, that is published.

Until then only the Hub API shows it. From then on it is a commit like any other: nodes mount it, ``helios show`` lists
it, and the refs that follow it point there.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from typing import Final

from helios.errors import HeliosError, RepoNotFound, RevisionNotFound
from helios.names import RepoId
from heliosfs.store.manifest import FileEntry
from registry.catalog import Catalog
from registry.mirror.state import MirrorState
from registry.pull.listing import RemoteFile, Snapshot
from registry.pull.pulls import Pull, Pulls
from registry.pull.upstream import Token

log = logging.getLogger("helios.registry.mirror")

TRACKED: Final = 256
"""Snapshots whose missing files are counted in memory; another one is counted again when somebody asks for it."""


class Completing:
    """What is missing of the snapshots that somebody wants. Blocking; threads may share it."""

    def __init__(self, catalog: Catalog, state: MirrorState, pulls: Pulls, *, whole: bool) -> None:
        """``whole``: fetch all files of a snapshot as soon as it is known."""
        self._catalog, self._state, self._pulls, self._whole = catalog, state, pulls, whole
        self._lock = threading.Lock()
        self._missing: OrderedDict[tuple[RepoId, str], tuple[set[str], Snapshot, Token]] = OrderedDict()
        pulls.listen(self._pulled)

    def learnt(self, snapshot: Snapshot, token: Token) -> None:
        """A listing is known, or a ref has moved to it."""
        repo, commit = snapshot.repo, snapshot.commit
        if self._is_published(repo, commit):
            self._state.published(repo, commit)
        elif self._whole:
            self.complete(snapshot, token)
        else:
            self.track(snapshot, token)

    def track(self, snapshot: Snapshot, token: Token) -> None:
        """Publish the snapshot when its last file is stored: at once if that is so."""
        key = snapshot.repo, snapshot.commit
        with self._lock:  # held while SQL is asked, so that no file is stored unseen in between
            if key in self._missing:
                self._missing.move_to_end(key)
                return
            missing = self._state.missing(snapshot)
            if missing:
                self._missing[key] = missing, snapshot, token
                if len(self._missing) > TRACKED:
                    self._missing.popitem(last=False)
        if not missing:
            self.complete(snapshot, token)

    def stored(self, repo: RepoId, file: RemoteFile, entry: FileEntry) -> None:
        """A download has ended well. Content of the Large File Storage counts for every repository of the domain."""
        done, domain = [], self._catalog.domain_of(repo)
        with self._lock:
            for key, (missing, snapshot, token) in list(self._missing.items()):
                shared = file.lfs and self._catalog.domain_of(key[0]) == domain
                if file.key in missing and (shared or key[0] == repo):
                    missing.discard(file.key)
                    if missing and self._catalog.database.kind.shared:  # other processes may have brought the rest
                        missing.intersection_update(self._state.missing(snapshot))
                    if not missing:
                        del self._missing[key]
                        done.append((snapshot, token))
        for snapshot, token in done:
            self.complete(snapshot, token)

    def complete(self, snapshot: Snapshot, token: Token) -> None:
        """Fetch what is missing, in the background, and publish the snapshot."""
        try:
            self._pulls.complete(snapshot, token)
        except HeliosError as error:  # too many pulls, or the registry ends: the next request tries again
            log.warning("a snapshot can't be completed now", extra={"repo": str(snapshot.repo), "error": error.message})

    def _pulled(self, pull: Pull) -> None:
        """A commit was published: somebody's pull, which also moves a followed ref, or our own completion."""
        if pull.commit is not None:
            by_ref = None if pull.revision == pull.commit else pull.revision
            self._state.published(pull.repo, pull.commit, by_ref)

    def _is_published(self, repo: RepoId, commit: str) -> bool:
        try:
            self._catalog.resolve(repo, commit)
        except (RepoNotFound, RevisionNotFound):
            return False
        return True
