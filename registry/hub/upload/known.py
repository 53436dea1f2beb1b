"""Which stored blobs an upload may name: those its sender has shown to have, or may read anyway."""

from __future__ import annotations

from helios.errors import EntryNotFound, Quarantined
from helios.names import RepoId
from heliosfs.store.manifest import FileEntry
from registry.access import Access
from registry.catalog import Catalog
from registry.hub.upload.pending import Uploading


class Known:
    """Blocking; called in threads."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def check_repo(self, repo: RepoId) -> None:
        """Raise RepoNotFound for a repository that is not there."""
        self._catalog.refs(repo)

    def entry(self, access: Access, repo: RepoId, sha256: str, uploading: Uploading) -> FileEntry | None:
        """The line for a manifest of a stored blob, claimed from here on; None for one that has to be uploaded.

        One that only a repository out of the caller's sight holds has to be uploaded, too: who knows no more of it than
        its hash must not get its content.
        """
        if not (uploading.uploaded(sha256) or self._held(repo, sha256) or self._readable(access, sha256)):
            return None
        return uploading.session.reuse(sha256)

    def _held(self, repo: RepoId, sha256: str) -> bool:
        try:
            self._catalog.held(repo, sha256)
        except (EntryNotFound, Quarantined):
            return False
        return True

    def _readable(self, access: Access, sha256: str) -> bool:
        return any(access.visible(holder) for holder in self._catalog.holders(sha256))
