"""Which of an upstream's regular files a repository has already."""

from __future__ import annotations

from collections.abc import Sequence

from helios.errors import RepoNotFound
from helios.names import RepoId
from registry.catalog import Catalog
from registry.metadata import mirror as tables
from registry.pull.listing import RemoteFile


def stored_regular(catalog: Catalog, repo: RepoId, files: Sequence[RemoteFile]) -> dict[str, str]:
    """Content -> sha256 of those of the files (regular ones) that the repository's commits or downloads have.

    They are known by their git oids, within the repository alone: a sha1 is not believed across repositories. That the
    store still has them is for the caller to find out.
    """
    if not files:
        return {}
    try:
        commits = set(catalog.refs(repo).values())
    except RepoNotFound:
        commits = set()
    entries = [
        entry for commit in commits for entry in catalog.contents.manifest(repo, commit).files.values() if not entry.lfs
    ]
    held = {entry.git_oid: entry.sha256 for entry in entries}
    with catalog.database.read() as connection:
        known = tables.find_downloads(connection, repo, [file.key for file in files])
    return {file.key: held[file.git_oid] for file in files if file.git_oid in held} | known
