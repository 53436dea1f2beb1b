"""Which blobs are served over Xet, and their layouts. Blocking: routes call it in threads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Final

from helios.errors import EntryNotFound, IntegrityError, NotFound
from helios.names import RepoId
from heliosfs.store.keys import xet_key
from heliosfs.store.manifest import FileEntry
from registry.cache import Cache
from registry.catalog import Catalog
from registry.metadata import xet
from registry.metadata.database import batches
from registry.xet.hashes import from_text
from registry.xet.layout import Layout

KEPT: Final = 16
"""Layouts in memory: that of a file of 50 GB takes some 5 MB."""


class Layouts:
    """The layouts there are. Threads may share it."""

    def __init__(self, catalog: Catalog, *, on: bool, least: int) -> None:
        """Files of at least ``least`` bytes are announced to clients, if ``on``.

        What was announced once is served for ever: clients keep listings with its hash.
        """
        self.catalog, self.on, self.least = catalog, on, max(least, 1)
        self._layouts: Cache[str, Layout] = Cache(KEPT)

    def announced(self, entries: Iterable[FileEntry]) -> dict[str, str]:
        """Xet hashes, as text, by sha256, of the files that clients are told to get over Xet."""
        wanted = sorted({entry.sha256 for entry in entries if self.concerns(entry)})
        out: dict[str, str] = {}
        if wanted:
            with self.catalog.database.read() as connection:
                for batch in batches(wanted):
                    out |= xet.files_of(connection, self.catalog.domain, batch)
        return out

    def concerns(self, entry: FileEntry) -> bool:
        """Whether the file is one that may be announced. Does not block."""
        # The Hub keeps none but LFS files in Xet, so clients have never seen another one there.
        return self.on and entry.lfs and entry.size >= self.least

    def find(self, repo: RepoId, file: str) -> Layout:
        """The layout of the blob with this Xet hash. Raises EntryNotFound unless the repository holds the blob."""
        with self.catalog.database.read() as connection:
            found = xet.blobs_of(connection, self.catalog.domain, file)
        for blob in found:
            self.catalog.held(repo, blob)
            return self.of(blob)
        raise EntryNotFound(f"{repo.id} holds no file with the Xet hash {file}")

    def of(self, blob: str) -> Layout:
        """The layout of a blob. Raises EntryNotFound where there is none, IntegrityError for a damaged one."""
        return self._layouts.get(blob, lambda: self._load(blob))

    def _load(self, blob: str) -> Layout:
        with self.catalog.database.read() as connection:
            digest = xet.record_of(connection, self.catalog.domain, blob)
        if digest is None:
            raise EntryNotFound(f"blob {blob} has no Xet layout")
        key = xet_key(self.catalog.domain, digest)
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
