"""One commit from elsewhere, published here under its own id: the part that replication and bundles share.

The manifest says what must come: blobs that are stored here are claimed, of the others only chunks that are not stored
travel. Every byte is hashed by the ingest; a snapshot becomes visible whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final, Protocol

from helios.errors import IntegrityError, InvalidInput
from helios.names import RepoId, is_commit
from heliosfs.store.bulk import check_bulk
from heliosfs.store.manifest import CommitRecord, FileEntry, Manifest
from heliosfs.store.recipe import Recipe
from registry.catalog import Catalog
from registry.ingest import Source
from registry.metadata import content
from registry.metadata.quotas import Amount
from registry.quotas.quotas import COMMIT
from registry.sessions import Session, Sessions
from registry.transfer.compose import Composed, lacking, locate

MAX_RECORD: Final = 1 << 20
"""Longest commit record that is taken, in bytes."""

Progressed = Callable[[str, int, int], None]
"""Called with a path, the bytes of it that are here, and its size."""


class Origin(Protocol):
    """Where a commit's content comes from."""

    def recipe(self, path: str, entry: FileEntry) -> Recipe:
        """The blob's recipe, checked against the entry."""

    def chunks(self, path: str, recipe: Recipe, numbers: list[int], until: ExitStack) -> Source:
        """The bytes of these chunks, one after another; what must be closed is left to ``until``."""


@dataclass(slots=True)
class Arrived:
    """What a commit has cost: bytes of its files, and bytes that travelled."""

    logical: int = 0
    travelled: int = 0
    blobs: int = 0


def check_record(repo: RepoId, record: CommitRecord) -> None:
    """Raises IntegrityError for a record of another repository, and for one that is malformed or too long."""
    data = record.encode()
    if len(data) > MAX_RECORD:
        raise IntegrityError(f"a commit record for {repo} has {len(data)} bytes, more than {MAX_RECORD}")
    CommitRecord.decode(data)
    if record.repo != str(repo) or not is_commit(record.commit):
        raise IntegrityError(f"a commit record of {record.repo[:200]!r} is offered for {repo}")


class Arrivals:
    """Brings commits in. Threads may share it."""

    def __init__(self, catalog: Catalog, sessions: Sessions) -> None:
        self._catalog, self._sessions = catalog, sessions

    def bring(
        self, repo: RepoId, record: CommitRecord, manifest: Manifest, origin: Origin, done: Progressed
    ) -> Arrived:
        """Store what is missing and publish the commit, at no ref. Raises IntegrityError for what makes no sense."""
        if manifest.digest != record.manifest:
            raise IntegrityError(f"the manifest offered for {repo}@{record.commit} is another one, {manifest.digest}")
        try:
            check_bulk(manifest.files)
        except InvalidInput as error:
            raise IntegrityError(f"{repo}@{record.commit} is too large to take: {error.message}") from error
        arrived = Arrived(sum(entry.size for entry in manifest.files.values()))
        files: dict[str, FileEntry] = {}
        with self._sessions.open(repo) as session:
            self._reserve(session, repo, manifest, arrived.logical)
            for path, entry in sorted(manifest.files.items()):
                if session.reuse(entry.sha256) is None:
                    arrived.travelled += self._fetch(session, path, entry, origin)
                    arrived.blobs += 1
                files[path] = entry
                done(path, entry.size, entry.size)
            self._catalog.publisher.publish(
                repo,
                None,
                files,
                commit=record.commit,
                author=record.author,
                message=record.message,
                time=record.time,
                lineage=record.lineage,
                parent=record.parent,
                payer=session.name,
            )
        return arrived

    def _reserve(self, session: Session, repo: RepoId, manifest: Manifest, logical: int) -> None:
        """Have room for all of it under the repository's quotas, before anything travels."""
        quotas, catalog = self._catalog.quotas, self._catalog
        if not quotas.concerning(repo):
            return
        sizes = {entry.sha256: entry.size for entry in manifest.files.values()}
        with catalog.database.read() as connection:
            known = content.find_blobs(connection, session.domain, sizes)
        missing = sum(size for sha256, size in sizes.items() if sha256 not in known)
        quotas.reserve(session.name, repo, {COMMIT: Amount(logical, missing)})

    def _fetch(self, session: Session, path: str, entry: FileEntry, origin: Origin) -> int:
        recipe = origin.recipe(path, entry)
        catalog = self._catalog
        with ExitStack() as until:
            places = locate(session.index, session.domain, recipe)
            missing = origin.chunks(path, recipe, lacking(places, recipe), until)
            source = Composed(catalog.store, recipe, places, missing)
            session.ingest(
                path,
                entry.size,
                source,
                executable=entry.executable,
                lfs=entry.lfs,
                expect_sha256=entry.sha256,
                expect_git_oid=entry.git_oid,
                recipe=recipe,
            )
        return source.travelled
