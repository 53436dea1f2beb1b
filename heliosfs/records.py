"""What the mount has seen of the registry, on disk, so that a restart without a registry can show it again.

A cache: it may be deleted at any time, and a file that SQLite can't read is started anew. On a disk that takes nothing
it is read as it is; where that can't be done either, memory stands in. Manifests are checked against their digest when
they are read.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import quote

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


# A page that a power cut left empty has rows without values.
_REFS = """
SELECT repo, ref, commit_id FROM refs
WHERE typeof(repo) = 'text' AND typeof(ref) = 'text' AND typeof(commit_id) = 'text' AND length(commit_id) = 40
"""
_COMMITS = """
SELECT repo, commit_id, manifest, time FROM commits
WHERE typeof(repo) = 'text' AND typeof(commit_id) = 'text' AND length(commit_id) = 40
AND typeof(manifest) = 'text' AND length(manifest) = 64 AND typeof(time) = 'integer' ORDER BY seen
"""
_MANIFEST = "SELECT record FROM manifests WHERE digest = ? AND typeof(record) = 'blob'"


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
            self._db = _open(str(path))
        except sqlite3.OperationalError as error:  # the disk's fault: it is full, or read-only
            self._complain(error)
            self._db = _open_as_it_is(path)
        except sqlite3.DatabaseError as error:
            self._db = self._anew(error)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def load(self) -> Seen:
        """What was seen before."""
        seen = Seen()
        with self._lock:
            try:
                refs = self._db.execute(_REFS).fetchall()
                commits = self._db.execute(_COMMITS).fetchall()
            except sqlite3.DatabaseError as error:  # SQLite looks at a page when it needs it
                self._db.close()
                self._db = self._anew(error)
                return seen
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
        """The record, or None where it was not seen or can't be read."""
        try:
            with self._lock:
                row = self._db.execute(_MANIFEST, (digest,)).fetchone()
        except sqlite3.DatabaseError as error:
            log.warning("a manifest can't be read", extra={"path": str(self._path), "reason": str(error)})
            return None
        return None if row is None else bytes(row[0])

    def _anew(self, error: sqlite3.Error) -> sqlite3.Connection:
        """Start over without what can't be read; in memory where the disk does not allow it."""
        log.warning("a damaged cache file is started anew", extra={"path": str(self._path), "reason": str(error)})
        try:
            for suffix in ("", "-wal", "-shm"):
                self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
            return _open(str(self._path))
        except (OSError, sqlite3.Error) as refused:
            self._complain(refused)
            return _open(":memory:")

    def _write(self, *statements: tuple[str, Sequence[tuple[object, ...]]]) -> None:
        try:
            with self._lock, self._db:
                for statement, rows in statements:
                    self._db.executemany(statement, rows)
        except sqlite3.Error as error:
            self._complain(error)

    def _complain(self, error: Exception) -> None:
        if not self._failed:
            log.warning(
                "what is seen of the registry can't be kept on disk",
                extra={"path": str(self._path), "reason": str(error)},
            )
        self._failed = True


def _open(name: str) -> sqlite3.Connection:
    """Raises sqlite3.OperationalError when the disk does not allow it, another DatabaseError for a damaged file."""
    db = sqlite3.connect(name, check_same_thread=False)
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


def _open_as_it_is(path: Path) -> sqlite3.Connection:
    """Without writing anything, hence without what was not yet moved from its log; or an empty one in memory."""
    with contextlib.suppress(sqlite3.Error):
        db = sqlite3.connect(f"file:{quote(str(path))}?immutable=1", uri=True, check_same_thread=False)
        try:
            if db.execute("PRAGMA user_version").fetchone() == (VERSION,):
                return db
        except sqlite3.Error:
            db.close()
            raise
        db.close()
    return _open(":memory:")


def _repo(name: str) -> RepoId | None:
    try:
        return RepoId.from_canonical(name)
    except InvalidInput:
        return None
