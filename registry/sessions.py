"""Sessions: what a push or a pull stores before anything of it is visible, and cleaning up when it never becomes so.

A session *claims* every blob it ingested or found stored. When it ends without a commit, blobs that no commit holds and
no other session claims are forgotten, and the objects nobody needs then are deleted. The argument why nothing live is
ever deleted:

- An ingest, from its first look at the index to its claim, holds the gate shared; cleaning holds it alone. So an
  ingest sees the store before a cleaning or after it, never in between, and an object whose row is missing while the
  gate is held alone is in nobody's hands.
- After its ingest a blob has a row, which names the objects it needs; cleaning removes the row only of a blob that is
  pending (no commit ever held it), and never of one that a live session claims.
- A publish checks in its own transaction that every blob's row is there, so a commit never names a missing blob.

A killed registry leaves rows in ``unfinished``. The next start then forgets all pending blobs and sweeps the store for
objects without a row. That is safe because a store belongs to one registry (``own_store``) and nothing ingests yet.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
from collections import Counter
from collections.abc import Callable

import sqlalchemy as sa

from helios.errors import HeliosError, IntegrityError, Unavailable
from heliosfs.store.keys import commit_key, manifest_key
from heliosfs.store.manifest import FileEntry
from heliosfs.store.objects import ObjectStore
from heliosfs.store.recipe import Recipe
from registry.catalog import Catalog
from registry.ingest import IngestedBlob, Source
from registry.ingest.ingest import Ingest
from registry.metadata import content, repositories
from registry.metadata.tables import settings

log = logging.getLogger("helios.registry.sessions")


class Session:
    """One push or pull: ingests files and claims their blobs until it is closed. Threads may share it."""

    def __init__(self, sessions: Sessions, name: str) -> None:
        self.name = name
        self._sessions = sessions
        self._claims: set[str] = set()
        self._closed = False

    def ingest(
        self,
        path: str,
        size: int,
        source: Source,
        *,
        executable: bool = False,
        lfs: bool | None = None,
        expect_sha256: str | None = None,
        expect_git_oid: str | None = None,
        recipe: Recipe | None = None,
    ) -> IngestedBlob:
        """Store a file's bytes; see ``Ingest.ingest``. Nothing is visible until a publish names the blob."""
        sessions = self._sessions
        with sessions.gate.shared():
            blob = sessions.ingest.ingest(
                path,
                size,
                source,
                executable=executable,
                lfs=lfs,
                expect_sha256=expect_sha256,
                expect_git_oid=expect_git_oid,
                recipe=recipe,
            )
            self._claim(blob.entry.sha256)
        return blob

    def reuse(self, sha256: str) -> FileEntry | None:
        """The manifest line of a blob that is stored already, claimed from here on; None when it is not stored."""
        with self._sessions.gate.shared():
            entry = self._sessions.catalog.has_blob(sha256)
            if entry is not None:
                self._claim(sha256)
        return entry

    def close(self) -> None:
        """End the session, after its publish or instead of it. Claims are released; calling it again does nothing."""
        with self._sessions.lock:
            if self._closed:
                return
            self._closed = True
            claims, self._claims = self._claims, set()
        self._sessions.ended(self, claims)

    def _claim(self, sha256: str) -> None:
        with self._sessions.lock:
            if self._closed:
                raise Unavailable("the push or pull was given up meanwhile")
            if sha256 not in self._claims:
                self._claims.add(sha256)
                self._sessions.claimed[sha256] += 1

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Sessions:
    """Opens sessions and cleans up after them."""

    def __init__(
        self, catalog: Catalog, store: ObjectStore, ingest: Ingest, keep: Callable[[], set[str]] = set
    ) -> None:
        """``keep`` names blobs that stay although no commit holds them: those of pulls that will be resumed."""
        self.catalog, self.store, self.ingest, self._keep = catalog, store, ingest, keep
        self.gate = catalog.gate
        self.lock = threading.Lock()
        self.claimed: Counter[str] = Counter()
        self.work = threading.Event()
        """Set when ``clean`` has something to do."""
        self._released: set[str] = set()

    def open(self) -> Session:
        """Start a session; it must be closed."""
        session = Session(self, secrets.token_hex(16))
        with self.catalog.database.write() as connection:
            content.begin_session(connection, session.name)
        return session

    def ended(self, session: Session, claims: set[str]) -> None:
        with self.lock:
            self.claimed.subtract(claims)
            self.claimed += Counter()  # drops the zeros
            self._released |= claims
        try:
            with self.catalog.database.write() as connection:
                content.end_session(connection, session.name)
                if content.any_pending(connection, self.catalog.domain, claims):
                    self.work.set()
        except HeliosError as error:  # a full disk, say: whoever ends a session has its result already
            log.warning("a session's end could not be recorded; the next start cleans up", extra={"error": str(error)})
            self.work.set()

    def clean(self, timeout_s: float = 60.0) -> int:
        """Delete what ended sessions left; returns how many objects went. Waits until nobody ingests, or returns 0."""
        if not self.work.is_set():
            return 0
        with self.gate.alone(timeout_s) as entered:
            if not entered:
                return 0
            self.work.clear()
            with self.lock:
                candidates = self._released - self.claimed.keys()
                self._released -= candidates
            return self._forget(candidates - self._keep())  # an ingest that failed has removed its objects itself

    def release(self, digests: set[str]) -> None:
        """Say that these blobs need not be kept any more."""
        with self.lock:
            self._released |= digests
        with self.catalog.database.read() as connection:
            if content.any_pending(connection, self.catalog.domain, digests):
                self.work.set()

    def recover(self) -> int:
        """At start: clean up after a killed registry; returns how many objects went."""
        with self.catalog.database.read() as connection:
            left = content.unfinished_sessions(connection)
        if not left:
            return 0
        count = self._forget(None) + self._sweep()
        with self.catalog.database.write() as connection:
            for name in left:
                content.end_session(connection, name)
        log.warning("cleaned up after a registry that was killed", extra={"sessions": len(left), "objects": count})
        return count

    def _forget(self, digests: set[str] | None) -> int:
        catalog = self.catalog
        with catalog.database.write() as connection:
            gone = content.drop_pending(connection, catalog.domain, digests, self._keep())
        catalog.forget()
        for key in gone:
            self.store.delete(key)
        return len(gone)

    def _sweep(self) -> int:
        """Delete objects that no row names."""
        domain = self.catalog.domain
        with self.catalog.database.read() as connection:
            named = content.object_keys(connection, domain)
            for name, commit, manifest in repositories.all_commits(connection):
                named |= {commit_key(domain, name, commit), manifest_key(domain, manifest)}
        count = 0
        for kind in ("blobs", "packs", "recipes", "xet", "manifests", "commits"):
            stray = [info.key for info in self.store.list(f"{domain}/{kind}/") if info.key not in named]
            for key in stray:
                self.store.delete(key)
            count += len(stray)
        return count


def own_store(catalog: Catalog, home: str) -> None:
    """Make the store this registry's, or raise IntegrityError when it is another one's.

    Two registries on one store would delete each other's unfinished objects.
    """
    with catalog.database.write() as connection:
        owner = connection.scalar(sa.select(settings.c.value).where(settings.c.name == "owner"))
        if owner is None:
            owner = json.dumps({"registry": secrets.token_hex(16), "home": home})
            connection.execute(settings.insert().values(name="owner", value=owner))
    try:
        catalog.store.put_bytes(f"{catalog.domain}/registry/owner", owner.encode())
    except IntegrityError:
        raise IntegrityError(
            f"the object store ({catalog.store.describe()}) belongs to another registry",
            hint="Give each registry a store of its own (registry.store), or use the HELIOS_HOME it was made with.",
        ) from None
