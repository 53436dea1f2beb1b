"""Sessions: what a push or a pull stores before anything of it is visible, and cleaning up when it never becomes so.

A session *claims* every object that it writes or relies on, in SQL, before it does (registry/metadata/claims.py says
why nothing that is needed is ever deleted then). When it ends without a commit, blobs that no commit holds and no other
session claims are forgotten, and the objects nobody needs then are deleted. A publish checks in its own transaction
that every blob's row is there, so a commit never names a missing blob.

Several processes may share the database and the store. What a killed one left is cleaned up by the others when its
lease is over (registry/member.py), or by the next start where only one process uses the database.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
from collections.abc import Callable

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from helios.errors import HeliosError, IntegrityError
from heliosfs.store.keys import commit_key, manifest_key
from heliosfs.store.manifest import FileEntry
from heliosfs.store.objects import ObjectStore
from heliosfs.store.recipe import Recipe
from registry.burial import bury
from registry.catalog import Catalog
from registry.claiming import ClaimingIndex, ClaimingStore, Claims
from registry.ingest import IngestedBlob, Source
from registry.ingest.ingest import Ingest
from registry.metadata import claims, content, pushes, repositories
from registry.metadata.database import Changes
from registry.metadata.tables import settings

log = logging.getLogger("helios.registry.sessions")


class Session:
    """One push or pull: ingests files and claims what they need until it is closed. Threads may share it."""

    def __init__(self, sessions: Sessions, name: str) -> None:
        self.name = name
        self._sessions = sessions
        made = Claims(sessions.catalog.database, name)
        self.index = ClaimingIndex(sessions.catalog.database, made)
        self._ingest = sessions.ingest.on(ClaimingStore(sessions.store, made), self.index)

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
        """Store a file's bytes; see ``Ingest.ingest``. Nothing is visible until a publish names the blob.

        Raises Unavailable when the session was ended meanwhile.
        """
        with self._sessions.catalog.database.read() as connection:
            claims.require(connection, self.name)
        return self._ingest.ingest(
            path,
            size,
            source,
            executable=executable,
            lfs=lfs,
            expect_sha256=expect_sha256,
            expect_git_oid=expect_git_oid,
            recipe=recipe,
        )

    def reuse(self, sha256: str) -> FileEntry | None:
        """The manifest line of a blob that is stored already, claimed from here on; None when it is not stored."""
        known = self.index.blob(self._sessions.catalog.domain, sha256)
        return None if known is None else known.entry()

    def close(self) -> None:
        """End the session, after its publish or instead of it. Claims are released; calling it again does nothing."""
        self._sessions.end([self.name])

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Sessions:
    """Opens sessions and cleans up after them."""

    def __init__(
        self, catalog: Catalog, store: ObjectStore, ingest: Ingest, keep: Callable[[], set[str]] = set
    ) -> None:
        """``keep`` names blobs that stay although no commit holds them: those of pulls that will be resumed.

        This process claims them, in a session of its own, when the session ends that stored them, and at its start.
        """
        self.catalog, self.store, self.ingest, self._keep = catalog, store, ingest, keep
        self._keeping = f"kept-{catalog.member.id}"
        self.work = threading.Event()
        """Set when ``clean`` has something to do."""

    def open(self) -> Session:
        """Start a session that this process holds; it must be closed."""
        name = secrets.token_hex(16)
        with self.catalog.database.write(lazy=True, changes=Changes.NOTHING) as connection:
            self.catalog.member.begin(connection, name)
        return Session(self, name)

    def attach(self, name: str) -> Session:
        """A session that somebody started, also another process."""
        return Session(self, name)

    def end(self, names: list[str]) -> None:
        """End sessions. One whose end can't be recorded ends with its process' lease."""
        self.end_those(lambda _connection: names)

    def end_those(self, choose: Callable[[Connection], list[str]]) -> None:
        """End the sessions that ``choose`` names in the transaction in which they end."""
        try:
            with self.catalog.database.write(lazy=True, changes=Changes.NOTHING) as connection:
                self._claim_kept(connection)
                held = claims.end(connection, choose(connection))
                unneeded = content.any_unneeded(connection, self.catalog.domain, held)
                if unneeded or claims.some_doomed(connection, 1):
                    self.work.set()
        except HeliosError as error:  # a full disk, say: whoever ends a session has its result already
            log.warning("a session's end could not be recorded; it is cleaned up later", extra={"error": str(error)})
            self.work.set()

    def clean(self) -> int:
        """Delete what ended sessions left; returns how many objects went. Nobody waits for it."""
        if not self.work.is_set():
            return 0
        self.work.clear()
        try:
            return self._clean()
        except BaseException:
            self.work.set()
            raise

    def release(self, digests: set[str]) -> None:
        """Say that these blobs need not be kept any more."""
        kept = {claims.of_blob(self.catalog.domain, sha256) for sha256 in digests}
        if not kept:
            return
        with self.catalog.database.write(lazy=True, changes=Changes.NOTHING) as connection:
            claims.release(connection, self._keeping, kept)
            if content.any_unneeded(connection, self.catalog.domain, kept):
                self.work.set()

    def _claim_kept(self, connection: Connection) -> None:
        kept = {claims.of_blob(self.catalog.domain, sha256) for sha256 in self._keep()}
        if kept:
            if not claims.is_under_way(connection, self._keeping):
                self.catalog.member.begin(connection, self._keeping)
            claims.claim(connection, self._keeping, kept)

    def recover(self) -> int:
        """Clean up after processes that died; returns how many objects went.

        Called at start and from time to time. Where processes don't share the database, nobody else is at work, and
        pushes end with the process that took them.
        """
        database = self.catalog.database
        kept = {claims.of_blob(self.catalog.domain, sha256) for sha256 in self._keep()}
        if kept:
            with database.read() as connection:
                missing = kept - claims.claims_of(connection, self._keeping)
            if missing:
                with database.write(lazy=True, changes=Changes.NOTHING) as connection:
                    self._claim_kept(connection)
        ended = self.catalog.member.bury_dead()
        with database.read() as connection:
            left = claims.unheld(connection)
            if not database.kind.shared:
                left += pushes.sessions(connection)
            waiting = bool(claims.some_doomed(connection, 1))
        count = 0
        if left:
            with database.write(changes=Changes.NOTHING) as connection:
                unheld = claims.unheld(connection)
                claims.end(connection, left)
            if unheld:  # their registry noted no claims, so only a look at everything tells what it left
                count += self._sweep()
        if ended or left or waiting:
            count += self._clean()
        if ended or left:
            log.warning(
                "cleaned up after a registry that was killed", extra={"sessions": ended + len(left), "objects": count}
            )
        return count

    def _clean(self) -> int:
        database, domain = self.catalog.database, self.catalog.domain
        with database.read() as connection:
            unneeded = content.any_unneeded(connection, domain)
        if unneeded:
            with database.write() as connection:
                claims.doom(connection, content.drop_pending(connection, domain))
        return bury(database, self.store)

    def _sweep(self) -> int:
        """Doom objects that no row names; returns how many there are."""
        database, domain = self.catalog.database, self.catalog.domain
        stored = [
            info.key
            for kind in ("blobs", "packs", "recipes", "xet", "manifests", "commits")
            for info in self.store.list(f"{domain}/{kind}/")
        ]
        with database.write(changes=Changes.NOTHING) as connection:
            named = content.object_keys(connection, domain)
            for name, commit, manifest in repositories.all_commits(connection):
                named |= {commit_key(domain, name, commit), manifest_key(domain, manifest)}
            claims.doom(connection, set(stored) - named)
        return bury(database, self.store)


def own_store(catalog: Catalog, home: str) -> None:
    """Make the store this registry's, or raise IntegrityError when it is another one's.

    A registry is its metadata: processes that share it share the store. Two registries on one store would delete each
    other's unfinished objects.
    """
    with catalog.database.write(changes=Changes.NOTHING) as connection:
        owner = connection.scalar(sa.select(settings.c.value).where(settings.c.name == "owner"))
        if owner is None:
            owner = json.dumps({"registry": secrets.token_hex(16), "home": home})
            connection.execute(settings.insert().values(name="owner", value=owner))
    try:
        catalog.store.put_bytes(f"{catalog.domain}/registry/owner", owner.encode())
    except IntegrityError:
        raise IntegrityError(
            f"the object store ({catalog.store.describe()}) belongs to another registry",
            hint="Give each registry a store of its own (registry.store), or use the metadata that it was made with "
            "(registry.database, HELIOS_HOME).",
        ) from None
