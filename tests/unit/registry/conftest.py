"""A catalog on a fresh directory store, with real ingest; its metadata in SQLite, and again in PostgreSQL."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from helios.names import RepoId
from heliosfs.store.directory import DirectoryStore
from heliosfs.store.manifest import CommitRecord, FileEntry
from registry.catalog import Catalog
from registry.domains import Domains
from registry.ingest.ingest import Ingest
from registry.metadata.database import Changes, Database
from registry.metadata.tables import processes
from registry.pull.setup import kept_blobs
from registry.sessions import Session, Sessions
from registry.threads import Threads
from tests.support.postgres import open_database

ANY = RepoId.parse("org/any")
"""A repository that no tenant owns."""


@dataclass
class Registry:
    """The parts below the HTTP layer."""

    root: Path
    database: Database
    store: DirectoryStore
    catalog: Catalog
    sessions: Sessions
    clock: list[float]
    url: str | None

    @classmethod
    def open(cls, root: Path, url: str | None = None, domains: Domains | None = None) -> Registry:
        """On the PostgreSQL database at ``url``, or on SQLite below ``root``."""
        database = open_database(root / "registry" / "metadata.db", url)
        store = DirectoryStore(root / "store")
        clock = [1_000_000.0]
        catalog = Catalog(database, store, domains=domains, now=lambda: clock[0])
        sessions = Sessions(catalog, store, Ingest(store, catalog.index), partial(kept_blobs, catalog))
        return cls(root, database, store, catalog, sessions, clock, url)

    def close(self) -> None:
        self.store.close()
        self.database.close()

    def reopen(self) -> Registry:
        """As after a restart."""
        self.close()
        return Registry.open(self.root, self.url, self.catalog.domains)

    def killed(self) -> Registry:
        """As after a kill: nothing was closed, and where others could tell, the lease is over."""
        with self.database.write(changes=Changes.NOTHING) as connection:
            connection.execute(processes.update().values(expires=0.0))
        return self.reopen()

    def put(self, content: bytes, path: str = "file.bin", session: Session | None = None) -> FileEntry:
        """Store a file without publishing it."""
        with_session = session or self.sessions.open(ANY)
        try:
            return with_session.ingest(path, len(content), io.BytesIO(content)).entry
        finally:
            if session is None:
                with_session.close()

    def publish(self, name: str, files: dict[str, bytes], ref: str = "main", **options: object) -> CommitRecord:
        repo = RepoId.parse(name)
        with self.sessions.open(repo) as session:
            entries = {path: self.put(content, path, session) for path, content in files.items()}
            return self.catalog.publisher.publish(repo, ref, entries, author="me", message="", **options).record  # type: ignore[arg-type]

    def objects(self) -> set[str]:
        """Keys of all objects but the owner's mark."""
        return {info.key for info in self.store.list("") if "/registry/" not in info.key}


@pytest.fixture(params=["sqlite", "postgres"])
def engine_url(request: pytest.FixtureRequest) -> str | None:
    """None for SQLite, the URL of a fresh database for PostgreSQL."""
    return request.getfixturevalue("postgres_url") if request.param == "postgres" else None


@pytest.fixture
def registry(tmp_path: Path, engine_url: str | None) -> Iterator[Registry]:
    parts = Registry.open(tmp_path, engine_url)
    yield parts
    parts.close()


@pytest.fixture
def upkeep() -> Iterator[Threads]:
    """What the daemon's upkeep runs in."""
    with closing(Threads("upkeep", 2)) as threads:
        yield threads
