"""What the mount has seen of the registry, on disk, so that a restart without a registry can show it again.

A cache: it may be deleted at any time, and a file that SQLite can't read is started anew. Manifests are checked against
their digest when they are read.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from helios.errors import InvalidInput
from helios.names import RepoId

log = logging.getLogger("heliosfs.records")

VERSION: Final = 1
MAX_COMMITS: Final = 20_000
"""Commits kept; those seen first go first, and with them the manifests that nothing else names."""

_SCHEMA = """
CREATE TABLE refs (repo TEXT, ref TEXT, commit_id TEXT, PRIMARY KEY (repo, ref)) WITHOUT ROWID;
CREATE TABLE commits (
  seen INTEGER PRIMARY KEY, repo TEXT, commit_id TEXT, manifest TEXT, time INTEGER, UNIQUE (repo, commit_id)
);
CREATE INDEX commits_manifest ON commits (manifest);
CREATE TABLE manifests (digest TEXT PRIMARY KEY, record BLOB);
"""


@dataclass(frozen=True, slots=True)
class SeenCommit:
    """A commit's manifest digest, and its time in seconds since 1970."""

    repo: RepoId
    commit: str
    manifest: str
    time: int


@dataclass(frozen=True, slots=True)
class Seen:
    """Everything that ``Records`` holds but the manifests; commits in the order they were seen."""

    refs: dict[RepoId, dict[str, str]] = field(default_factory=dict)
    commits: list[SeenCommit] = field(default_factory=list)


class Records:
    """The file at ``path``. Threads may share it; calls block. A disk that is full or broken costs a warning only."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._failed = False
        try:
            self._db = self._open()
        except sqlite3.DatabaseError as error:
            log.warning("a damaged cache file is started anew", extra={"path": str(path), "reason": str(error)})
            for suffix in ("", "-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            self._db = self._open()

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def load(self) -> Seen:
        """What was seen before."""
        seen = Seen()
        with self._lock:
            refs = self._db.execute("SELECT repo, ref, commit_id FROM refs").fetchall()
            commits = self._db.execute("SELECT repo, commit_id, manifest, time FROM commits ORDER BY seen").fetchall()
        for name, ref, commit in refs:
            if (repo := _repo(name)) is not None:
                seen.refs.setdefault(repo, {})[ref] = commit
        for name, commit, manifest, time in commits:
            if (repo := _repo(name)) is not None:
                seen.commits.append(SeenCommit(repo, commit, manifest, time))
        return seen

    def set_refs(self, refs: Mapping[RepoId, Mapping[str, str]]) -> None:
        """Remember the refs of some repositories."""
        rows = [(str(repo), ref, commit) for repo, named in refs.items() for ref, commit in named.items()]
        self._write(
            ("DELETE FROM refs WHERE repo = ?", [(str(repo),) for repo in refs]),
            ("INSERT INTO refs VALUES (?, ?, ?)", rows),
        )

    def add_commit(self, record: SeenCommit) -> None:
        """Remember a commit."""
        row = (str(record.repo), record.commit, record.manifest, record.time)
        self._write(
            ("INSERT OR IGNORE INTO commits (repo, commit_id, manifest, time) VALUES (?, ?, ?, ?)", [row]),
            ("DELETE FROM commits WHERE seen <= (SELECT max(seen) FROM commits) - ?", [(MAX_COMMITS,)]),
        )

    def drop(self, repos: Iterable[RepoId]) -> None:
        """Forget repositories."""
        rows = [(str(repo),) for repo in repos]
        self._write(
            ("DELETE FROM refs WHERE repo = ?", rows),
            ("DELETE FROM commits WHERE repo = ?", rows),
            ("DELETE FROM manifests WHERE digest NOT IN (SELECT manifest FROM commits)", [()]),
        )

    def add_manifest(self, digest: str, record: bytes) -> None:
        """Remember a manifest."""
        self._write(
            ("DELETE FROM manifests WHERE digest NOT IN (SELECT manifest FROM commits)", [()]),
            ("INSERT OR IGNORE INTO manifests VALUES (?, ?)", [(digest, record)]),
        )

    def manifest(self, digest: str) -> bytes | None:
        """The record, or None where it was not seen."""
        with self._lock:
            row = self._db.execute("SELECT record FROM manifests WHERE digest = ?", (digest,)).fetchone()
        return None if row is None else bytes(row[0])

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, check_same_thread=False)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version not in (0, VERSION):
                raise sqlite3.DatabaseError(f"version {version} of the file is not known")
            if version == 0:
                db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;")
        except BaseException:
            db.close()
            raise
        return db

    def _write(self, *statements: tuple[str, Sequence[tuple[object, ...]]]) -> None:
        try:
            with self._lock, self._db:
                for statement, rows in statements:
                    self._db.executemany(statement, rows)
        except sqlite3.Error as error:
            if not self._failed:
                log.warning(
                    "what is seen of the registry can't be kept on disk",
                    extra={"path": str(self._path), "reason": str(error)},
                )
            self._failed = True


def _repo(name: str) -> RepoId | None:
    try:
        return RepoId.from_canonical(name)
    except InvalidInput:
        return None
