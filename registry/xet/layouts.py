"""Which blobs are served over Xet, and their layouts. Blocking: routes call it in threads."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Final

from helios.errors import EntryNotFound, IntegrityError, NotFound, RepoNotFound
from helios.names import RepoId
from heliosfs.store.keys import xet_key
from heliosfs.store.manifest import FileEntry
from heliosfs.store.placement import PlacedBlob
from registry.cache import Cache
from registry.catalog import Catalog
from registry.metadata import xet
from registry.metadata.database import batches
from registry.xet.hashes import from_text
from registry.xet.layout import Layout

KEPT: Final = 16
"""Layouts in memory: that of a file of 50 GB takes some 5 MB."""


GB: Final = 1000**3

Listed = Callable[[RepoId, str, str], PlacedBlob | None]
"""Where a blob lies that a commit of a repository lists which is not published yet; None: it lists it not, or the blob
is not here, or must not leave."""


def nothing_listed(_repo: RepoId, _commit: str, _blob: str) -> PlacedBlob | None:
    """Of a registry that mirrors nothing."""
    return None


class Layouts:
    """The layouts there are. Threads may share it."""

    def __init__(
        self, catalog: Catalog, *, on: bool, least: int, most: int = 50 * GB, listed: Listed = nothing_listed
    ) -> None:
        """Files of at least ``least`` bytes are announced to clients, if ``on``; those of more than ``most`` they take
        in no other way.

        What was announced once is served for ever: clients keep listings with its hash.
        """
        self.catalog, self.on, self.least, self.most = catalog, on, max(least, 1), most
        self._listed = listed
        self._layouts: Cache[tuple[str, str], Layout] = Cache(KEPT)

    def announced(self, repo: RepoId, entries: Iterable[FileEntry]) -> dict[str, str]:
        """Xet hashes, as text, by sha256, of the repository's files that clients are told to get over Xet."""
        wanted = sorted({entry.sha256 for entry in entries if self.concerns(entry)})
        out: dict[str, str] = {}
        if wanted:
            domain = self.catalog.domain_of(repo)
            with self.catalog.database.read() as connection:
                for batch in batches(wanted):
                    out |= xet.files_of(connection, domain, batch)
        return out

    def concerns(self, entry: FileEntry) -> bool:
        """Whether the file is one that may be announced. Does not block."""
        # The Hub keeps none but LFS files in Xet, so clients have never seen another one there.
        return self.on and entry.lfs and entry.size >= self.least

    def needed(self, entry: FileEntry) -> bool:
        """Whether clients take the file over Xet alone. Does not block."""
        return self.concerns(entry) and entry.size > self.most

    def failures(self, repo: RepoId, sha256: str) -> int:
        """How often a layout of the blob, which has none yet, was tried in vain."""
        with self.catalog.database.read() as connection:
            return xet.failures_of(connection, self.catalog.domain_of(repo), sha256)

    def placed(self, repo: RepoId, commit: str, blob: str) -> PlacedBlob:
        """Where a blob lies. Raises EntryNotFound or RepoNotFound unless the repository holds it, or the commit, which
        need not be published yet, lists it; and Quarantined."""
        try:
            return self.catalog.contents.placed(repo, blob)
        except (EntryNotFound, RepoNotFound):
            placed = self._listed(repo, commit, blob)
            if placed is None:
                raise
            return placed

    def find(self, repo: RepoId, commit: str, file: str) -> Layout:
        """The layout of the blob with this Xet hash, for those who may read the blob. Raises as ``placed``."""
        domain = self.catalog.domain_of(repo)
        with self.catalog.database.read() as connection:
            found = xet.blobs_of(connection, domain, file)
        for blob in found:
            try:
                self.catalog.contents.held(repo, blob)
            except (EntryNotFound, RepoNotFound):
                if self._listed(repo, commit, blob) is None:
                    raise
            return self.of(domain, blob)
        raise EntryNotFound(f"{repo.id} holds no file with the Xet hash {file}")

    def of(self, domain: str, blob: str) -> Layout:
        """The layout of a blob. Raises EntryNotFound where there is none, IntegrityError for a damaged one."""
        return self._layouts.get((domain, blob), lambda: self._load(domain, blob))

    def _load(self, domain: str, blob: str) -> Layout:
        with self.catalog.database.read() as connection:
            digest = xet.record_of(connection, domain, blob)
        if digest is None:
            raise EntryNotFound(f"blob {blob} has no Xet layout")
        key = xet_key(domain, digest)
        try:
            data = bytearray(self.catalog.store.info(key).size)
            self.catalog.store.read_into(key, 0, memoryview(data))
        except NotFound as error:  # a client that hears "not found" would believe it
            raise IntegrityError(f"the registry's store has a gap: {error.message}") from None
        if hashlib.sha256(data).hexdigest() != digest:
            raise IntegrityError(
                f"the Xet layout of {blob} does not match its digest", hint=f"Restore the object {key} from a copy."
            )
        layout = Layout.decode(bytes(data))
        if layout.blob != blob:
            raise IntegrityError(f"the object {key} is the Xet layout of {layout.blob}, not of {blob}")
        return layout


def check_hash(text: str) -> str:
    """A Xet hash in a path; raises InvalidInput."""
    from_text(text)
    return text
