"""Which stored blobs an upload may name: those its sender has shown to have, or may read anyway."""

from __future__ import annotations

from helios.names import RepoId
from heliosfs.store.manifest import FileEntry
from registry.access import Access, Lister
from registry.catalog import Catalog
from registry.hub.upload.pending import Uploading
from registry.metadata import mirror
from registry.possession import Possession


class Known:
    """Blocking; called in threads."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog, self._possession = catalog, Possession(catalog)

    def check_repo(self, repo: RepoId) -> None:
        """Raise RepoNotFound for a repository that is not there."""
        self._catalog.refs(repo)

    def entry(self, access: Access, repo: RepoId, sha256: str, uploading: Uploading) -> FileEntry | None:
        """The line for a manifest of a stored blob, claimed from here on; None for one that has to be uploaded.

        One that only a repository out of the caller's sight, or another domain, holds has to be uploaded, too
        (registry/possession.py).
        """
        if not (uploading.uploaded(sha256) or self._possession.may_name(self._sight(access), repo, sha256)):
            return None
        return uploading.session.reuse(sha256)

    def _sight(self, access: Access) -> Lister:
        """What the caller may read for sure: whom an upstream lets in to a gated repository is not asked here."""
        if access.trusted:
            return Lister(access, set())
        with self._catalog.database.read() as connection:
            return Lister(access, mirror.all_restricted(connection))
